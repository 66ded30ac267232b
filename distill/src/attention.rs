//! Attention over flat batches of sequences, each after a prompt, for training and evaluation.

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};
use overfill_model::{Attention, LayerKv, LayerSpec, Ragged, ragged_attention};

/// Keys and values of a batch of prompts, one prompt after the other.
#[derive(Clone)]
pub struct PromptKv {
    /// One pair per layer.
    pub layers: Vec<LayerKv>,
    /// Tokens of each prompt.
    pub lengths: Vec<usize>,
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

/// Causal attention within each sequence of a flat batch. All queries of a sequence also see its prompt, if there is one.
pub struct RaggedAttention<'a> {
    ragged: Arc<Ragged>,
    prompt: Option<&'a PromptKv>,
    /// Keys and values computed so far, per layer. `None` if they are not kept.
    own: Option<Vec<LayerKv>>,
}

impl<'a> RaggedAttention<'a> {
    /// Attends with sequences of `lengths` tokens, over `prompt`.
    pub fn new(lengths: &[usize], prompt: Option<&'a PromptKv>) -> Self {
        let prompts = prompt.map_or_else(|| vec![0; lengths.len()], |p| p.lengths.clone());
        Self { ragged: Arc::new(Ragged { lengths: lengths.to_vec(), prompts }), prompt, own: None }
    }

    /// Keeps the computed keys and values, for [`Self::into_kv`].
    pub fn keeping(self) -> Self {
        Self { own: Some(Vec::new()), ..self }
    }

    fn prompt_at(&self, layer: usize) -> Result<Option<&LayerKv>> {
        let Some(prompt) = self.prompt else { return Ok(None) };
        match prompt.layers.get(layer) {
            None => bail!("no prompt KV for layer {layer}, there are {} layers", prompt.layers.len()),
            pair => Ok(pair),
        }
    }

    /// The kept keys and values.
    pub fn into_kv(self) -> PromptKv {
        PromptKv { layers: self.own.unwrap_or_default(), lengths: self.ragged.lengths.clone() }
    }
}

impl Attention for RaggedAttention<'_> {
    fn attend(&mut self, layer: usize, spec: &LayerSpec, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        if let Some(own) = &mut self.own {
            own.push((k.clone(), v.clone()));
        }
        ragged_attention(&self.ragged, spec, self.prompt_at(layer)?, [q, k, v])
    }

    fn ragged(&mut self, layer: usize) -> Result<(Arc<Ragged>, Option<LayerKv>)> {
        Ok((self.ragged.clone(), self.prompt_at(layer)?.cloned()))
    }
}
