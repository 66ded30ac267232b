//! Dense, differentiable attention over rectangular batches, for training and evaluation.

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};
use overfill_model::{Attention, LayerSpec, soft_cap};

use crate::fused::{Visibility, masked_softmax};

/// Keys and values of one layer, each `[batch, kv_heads, columns, head_dim]`.
type LayerKv = (Tensor, Tensor);

/// Keys and values of a batch of prompts.
#[derive(Clone)]
pub struct PromptKv {
    /// One pair per layer.
    pub layers: Vec<LayerKv>,
    /// Valid columns per batch row; the rest is padding.
    pub lengths: Vec<usize>,
    /// Number of columns, padding included.
    pub columns: usize,
}

impl PromptKv {
    /// Keeps the layers that a depth-pruned decoder uses, in its order. `None` keeps all layers.
    pub fn select(self, kept: Option<&[u32]>) -> Result<Self> {
        let Some(kept) = kept else { return Ok(self) };
        let pick = |l: &u32| match self.layers.get(*l as usize) {
            Some(pair) => Ok(pair.clone()),
            None => bail!("kept_layers names layer {l}, the full model has {}", self.layers.len()),
        };
        Ok(Self { layers: kept.iter().map(pick).collect::<Result<_>>()?, ..self })
    }
}

/// Causal attention within each row of a `[batch, queries]` rectangle. All queries of a row also see the row's prompt,
/// if there is one. Rows are padded at the end, so only padding sees padding.
pub struct DenseAttention<'a> {
    batch: usize,
    prompt: Option<&'a PromptKv>,
    visibility: Arc<Visibility>,
    /// Keys and values computed so far, per layer. `None` if they are not kept.
    own: Option<Vec<LayerKv>>,
}

impl<'a> DenseAttention<'a> {
    /// Attends with `batch` rows of `queries` tokens each, over `prompt`.
    pub fn new(batch: usize, queries: usize, prompt: Option<&'a PromptKv>) -> Self {
        let visibility = Visibility {
            prompt: prompt.map_or(0, |p| p.columns),
            prompt_lengths: prompt.map_or_else(|| vec![0; batch], |p| p.lengths.clone()),
            past: 0,
            queries,
            window: usize::MAX,
        };
        Self { batch, prompt, visibility: Arc::new(visibility), own: None }
    }

    /// Keeps the computed keys and values, for [`DenseAttention::into_prompt`].
    pub fn keeping(self) -> Self {
        Self { own: Some(Vec::new()), ..self }
    }

    /// Turns the kept keys and values into the prompt of later queries. `lengths` is the number of valid tokens per
    /// row.
    pub fn into_prompt(self, lengths: Vec<usize>) -> PromptKv {
        PromptKv { layers: self.own.unwrap_or_default(), lengths, columns: self.visibility.queries }
    }
}

impl Attention for DenseAttention<'_> {
    fn attend(&mut self, layer: usize, spec: &LayerSpec, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (n, heads, width) = q.dims3()?;
        let kv_heads = k.dim(1)?;
        let (batch, queries) = (self.batch, self.visibility.queries);
        let by_head = |x: &Tensor| x.reshape((batch, queries, kv_heads, width))?.transpose(1, 2)?.contiguous();
        let (mut k, mut v) = (by_head(k)?, by_head(v)?);
        if let Some(own) = &mut self.own {
            if let Some((past_k, past_v)) = own.get(layer) {
                (k, v) = (Tensor::cat(&[past_k, &k], 2)?, Tensor::cat(&[past_v, &v], 2)?);
                own[layer] = (k.clone(), v.clone());
            } else {
                own.push((k.clone(), v.clone()));
            }
        }
        if let Some(prompt) = self.prompt {
            let Some((prompt_k, prompt_v)) = prompt.layers.get(layer) else {
                bail!("no prompt KV for layer {layer}, there are {} layers", prompt.layers.len());
            };
            (k, v) = (Tensor::cat(&[prompt_k, &k], 2)?, Tensor::cat(&[prompt_v, &v], 2)?);
        }
        // Groups the query heads of each KV head: [batch, kv_heads, groups * queries, width]. Keys need not be repeated
        // then.
        let groups = heads / kv_heads;
        let q = q.reshape((batch, queries, kv_heads, groups, width))?.permute((0, 2, 3, 1, 4))?.contiguous()?;
        let q = q.reshape((batch, kv_heads, groups * queries, width))?;
        let scores = q.matmul(&k.transpose(2, 3)?)?;
        let visibility = match spec.window {
            Some(window) => &Arc::new(Visibility { window, ..self.visibility.as_ref().clone() }),
            None => &self.visibility,
        };
        let scale = 1.0 / (width as f32).sqrt();
        let weights = match spec.score_cap {
            Some(cap) => masked_softmax(&soft_cap(&(scores * f64::from(scale))?, cap)?, visibility, 1.0)?,
            None => masked_softmax(&scores, visibility, scale)?,
        };
        let out = weights.matmul(&v)?.reshape((batch, kv_heads, groups, queries, width))?;
        out.permute((0, 3, 1, 2, 4))?.contiguous()?.reshape((n, heads, width))
    }
}
