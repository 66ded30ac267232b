//! The decoder block of all supported families, over a flat batch of tokens.
//!
//! The tokens of all sequences are concatenated in one dimension `n`; only attention knows which tokens belong
//! together. So the same code serves (ragged batches over paged KV) and trains (ragged batches over prompts, with
//! gradients).

use std::{collections::HashMap, sync::Arc};

use candle_core::{DType, Device, Error, Result, Tensor, bail};
use candle_nn::{ops, rotary_emb};

use super::{
    attention::{Ragged, Tiled},
    blocks::{AttentionHalf, MlpHalf, TrainedBlock},
    linear::Linear,
    loss, passes,
    trained::{Summed, TrainedEmbedding},
};
use crate::{
    Axis, LayerSpec, ModelConfig, ModelError, Parameter,
    family::{Finder, TensorRows},
};

/// Keys and values of one layer, `[n, kv_heads, head_dim]` each.
pub type LayerKv = (Tensor, Tensor);

/// Computes attention, with keys and values from any source.
pub trait Attention {
    /// Attention of one layer. `q` is `[n, heads, head_dim]`, `k` and `v` are `[n, kv_heads, head_dim]`, with rope
    /// already applied to q and k, and the factor of the scores to q: scores are the products times `1 / sqrt(head_dim)`.
    /// `spec` has the window and the soft cap. The result is `[n, heads, head_dim]`, contiguous.
    fn attend(&mut self, layer: usize, spec: &LayerSpec, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor>;

    /// The sequences that the tokens belong to, and the keys and values of their prompts at a layer. A decoder with sums of
    /// gradients computes the attention over them itself.
    fn ragged(&mut self, layer: usize) -> Result<(Arc<Ragged>, Option<LayerKv>)> {
        bail!("layer {layer}: a decoder with sums of gradients needs attention over whole sequences")
    }
}

/// A point in a layer whose activations, `[n, channels]`, importance scores are computed from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// Output of a parameter.
    Output(Parameter),
    /// Input of a parameter.
    Input(Parameter),
}

impl Site {
    /// What its channels count; `None` if the model has no such parameter.
    pub fn axis(self, config: &ModelConfig) -> Option<Axis> {
        match self {
            Self::Output(parameter) => config.axes_of(parameter).map(|[output, _]| output),
            Self::Input(parameter) => config.axes_of(parameter).map(|[_, input]| input),
        }
    }
}

/// Receives activations during a forward pass: site, layer, activations.
pub type Observer<'a> = dyn FnMut(Site, usize, &Tensor) -> Result<()> + 'a;

/// Returns the weight tensor for a name and shape, or an error.
pub type TensorSource<'a> = dyn FnMut(&str, &[usize]) -> std::result::Result<Tensor, ModelError> + 'a;

/// The implementation of norm and rope.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ops {
    /// Fused operations, without gradients.
    Fused,
    /// Operations that support gradients.
    Differentiable,
}

/// Sums of gradients by Hugging Face name, each of its parameter's shape. Backward passes of [`Decoder::trained`] add to them.
pub type GradientSums = HashMap<String, Tensor>;

struct Block {
    spec: LayerSpec,
    attention_norm: Option<Tensor>,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    q_norm: Option<Tensor>,
    k_norm: Option<Tensor>,
    attention_output_norm: Option<Tensor>,
    mlp_norm: Option<Tensor>,
    gate: Linear,
    up: Linear,
    down: Linear,
    mlp_output_norm: Option<Tensor>,
}

/// A model's weights and the forward pass over them, without any cache.
pub struct Decoder {
    config: ModelConfig,
    ops: Ops,
    compute: DType,
    /// Inverse frequencies of each rope.
    ropes: Vec<Vec<f32>>,
    /// `[vocab, hidden]`.
    embedding: Tensor,
    blocks: Vec<Block>,
    norm: Tensor,
    head: Linear,
    /// The same parameters with sums of their gradients.
    trained: Option<Trained>,
}

struct Trained {
    embedding: Summed,
    blocks: Vec<Arc<TrainedBlock>>,
    norm: Summed,
    head: Summed,
}

impl Decoder {
    /// Builds a decoder from tensors by Hugging Face name, all of one type, which is also the type of the activations.
    ///
    /// With [`Ops::Differentiable`] and tensors that are variables, gradients reach the variables.
    pub fn from_tensors(
        config: &ModelConfig,
        tensors: &HashMap<String, Tensor>,
        ops: Ops,
    ) -> std::result::Result<Self, ModelError> {
        let compute = tensors.values().next().map_or(DType::F32, Tensor::dtype);
        Self::build(config, ops, compute, &mut |name, shape| {
            let missing = || ModelError::MissingTensor {
                file: "(in memory)".into(),
                name: name.into(),
                expected: shape.to_vec(),
            };
            let tensor = tensors.get(name).ok_or_else(missing)?;
            if tensor.dims() != shape {
                return Err(ModelError::WrongShape {
                    file: "(in memory)".into(),
                    name: name.into(),
                    expected: shape.to_vec(),
                    found: tensor.dims().to_vec(),
                });
            }
            Ok(tensor.clone())
        })
    }

    /// Like [`Self::from_tensors`], for variables in f32 on the CPU. Backward passes add the gradients of all parameters to
    /// `sums`, which has one for each, and return none. They start at [`Self::cross_entropy`].
    pub fn trained(
        config: &ModelConfig,
        tensors: &HashMap<String, Tensor>,
        sums: &GradientSums,
    ) -> std::result::Result<Self, ModelError> {
        let mut decoder = Self::from_tensors(config, tensors, Ops::Differentiable)?;
        let detached = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.detach())).collect();
        let find = Finder::new(config);
        let parameters = Parameters { find, tensors: detached, sums: Some(sums), compute: DType::F32 };
        decoder.trained = Some(parameters.trained(config)?);
        Ok(decoder)
    }

    /// Builds a decoder from the tensors that `get(name, shape)` returns. `compute` is the type of the activations.
    pub fn build(
        config: &ModelConfig,
        ops: Ops,
        compute: DType,
        get: &mut TensorSource<'_>,
    ) -> std::result::Result<Self, ModelError> {
        let mut tensors = HashMap::new();
        for (name, shape) in config.tensor_shapes() {
            let tensor = get(&name, &shape)?;
            tensors.insert(name, tensor);
        }
        let parameters = Parameters { find: Finder::new(config), tensors, sums: None, compute };
        let embedding = parameters.weight(Parameter::Embedding, None)?;
        let head = match config.tie_word_embeddings {
            true => Linear::new(embedding.clone(), None, compute)?,
            false => parameters.linear(Parameter::Head, None)?,
        };
        let mut blocks = Vec::with_capacity(config.num_hidden_layers);
        for (layer, spec) in config.layers.iter().enumerate() {
            let at = Some(layer);
            blocks.push(Block {
                spec: spec.clone(),
                attention_norm: parameters.norm(Parameter::AttentionNorm, at)?,
                q: parameters.linear(Parameter::Query, at)?,
                k: parameters.linear(Parameter::Key, at)?,
                v: parameters.linear(Parameter::Value, at)?,
                q_norm: parameters.head_norm(Parameter::QueryNorm, at)?,
                k_norm: parameters.head_norm(Parameter::KeyNorm, at)?,
                o: parameters.linear(Parameter::AttentionOutput, at)?,
                attention_output_norm: parameters.norm(Parameter::AttentionOutputNorm, at)?,
                mlp_norm: parameters.norm(Parameter::MlpNorm, at)?,
                gate: parameters.linear(Parameter::Gate, at)?,
                up: parameters.linear(Parameter::Up, at)?,
                down: parameters.linear(Parameter::Down, at)?,
                mlp_output_norm: parameters.norm(Parameter::MlpOutputNorm, at)?,
            });
        }
        parameters.find.weight(Parameter::FinalNorm, None)?;
        let norm = parameters.norm(Parameter::FinalNorm, None)?.ok_or_else(|| Error::Msg("no final norm".into()))?;
        parameters.find.all_used()?;
        Ok(Self {
            config: config.clone(),
            ops,
            compute,
            ropes: config.inverse_frequencies(),
            head,
            embedding,
            trained: None,
            blocks,
            norm,
        })
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device that holds the weights.
    pub fn device(&self) -> &Device {
        self.embedding.device()
    }

    /// Hidden states before the final norm, `[n, hidden]`, of tokens `[n]` (u32) at the given `n` positions.
    pub fn forward(
        &self,
        tokens: &Tensor,
        positions: &[u32],
        attention: &mut dyn Attention,
        mut observe: Option<&mut Observer<'_>>,
    ) -> Result<Tensor> {
        let mut see = |site, layer, x: &Tensor| match observe.as_mut() {
            Some(observe) => observe(site, layer, x),
            None => Ok(()),
        };
        let rotations = (0..self.ropes.len()).map(|rope| self.rotation(rope, positions)).collect::<Result<Vec<_>>>()?;
        if let Some(trained) = &self.trained {
            return self.forward_trained(trained, tokens, &rotations, attention);
        }
        let mut x = self.embedding.index_select(tokens, 0)?.to_dtype(self.compute)?;
        x = scaled(x, self.config.embedding_scale())?;
        for (layer, block) in self.blocks.iter().enumerate() {
            let input = self.normed(&x, block.attention_norm.as_ref())?;
            see(Site::Input(Parameter::Query), layer, &input)?;
            let mut q = self.heads(block.q.forward(&input)?, block.q_norm.as_ref())?;
            let mut k = self.heads(block.k.forward(&input)?, block.k_norm.as_ref())?;
            let v = self.heads(block.v.forward(&input)?, None)?;
            if let Some(rope) = block.spec.rope {
                let (cos, sin) = &rotations[rope];
                (q, k) = (self.rope(&q, cos, sin)?, self.rope(&k, cos, sin)?);
            }
            if let Some(factor) = block.spec.query_factor(self.config.head_dim) {
                q = (q * f64::from(factor))?;
            }
            let attended = attention.attend(layer, &block.spec, &q, &k, &v)?;
            let added = block.o.forward(&attended.flatten_from(1)?)?;
            let added = self.normed(&added, block.attention_output_norm.as_ref())?;
            x = (x + scaled(added, self.config.scales.residual)?)?;

            let input = self.normed(&x, block.mlp_norm.as_ref())?;
            see(Site::Input(Parameter::Gate), layer, &input)?;
            let inner = self.gated(&block.gate.forward(&input)?, &block.up.forward(&input)?)?;
            see(Site::Input(Parameter::Down), layer, &inner)?;
            let added = self.normed(&block.down.forward(&inner)?, block.mlp_output_norm.as_ref())?;
            x = (x + scaled(added, self.config.scales.residual)?)?;
        }
        Ok(x)
    }

    /// [`Self::forward`] of a decoder with sums of gradients.
    fn forward_trained(
        &self,
        trained: &Trained,
        tokens: &Tensor,
        rotations: &[(Tensor, Tensor)],
        attention: &mut dyn Attention,
    ) -> Result<Tensor> {
        let op = TrainedEmbedding { tokens: tokens.to_vec1()?, sum: trained.embedding.sum.clone() };
        let mut x = scaled(self.embedding.apply_op1(op)?, self.config.embedding_scale())?;
        for (layer, block) in trained.blocks.iter().enumerate() {
            let (ragged, prompt) = attention.ragged(layer)?;
            ragged.check(x.dim(0)?, prompt.as_ref())?;
            let tiled = Tiled { ragged, spec: block.spec.clone(), prompt };
            let rotation = block.spec.rope.map(|rope| rotations[rope].clone());
            x = x.contiguous()?.apply_op1(AttentionHalf::new(block, tiled, rotation))?;
            x = x.apply_op1(MlpHalf::new(block))?;
        }
        Ok(x)
    }

    /// Applies the final norm and the head: hidden states `[rows, hidden]` to logits `[rows, vocab]`.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = scaled(self.head.forward(&self.rms_norm(hidden, &self.norm)?)?, self.config.scales.logits)?;
        match self.config.scales.logit_cap {
            Some(cap) => soft_cap(&logits, cap),
            None => Ok(logits),
        }
    }

    /// Negative log-probability of the targets after hidden states `[rows, hidden]`, summed over the rows: a scalar.
    ///
    /// Each target is below the vocabulary's size. If the decoder has sums of gradients, `backward` must start here.
    pub fn cross_entropy(&self, hidden: &Tensor, targets: &[u32]) -> Result<Tensor> {
        let (rows, vocab) = (hidden.dim(0)?, self.config.vocab_size);
        if targets.len() != rows || targets.iter().any(|t| *t as usize >= vocab) {
            bail!("cross entropy: {} targets for {rows} rows of {vocab} logits", targets.len());
        }
        let weight = self.head.weight_as(hidden)?.detach();
        let scales = &self.config.scales;
        let output = loss::Output {
            norm: &self.norm.detach(),
            eps: self.config.rms_norm_eps as f32,
            weight: &weight,
            sums: self.trained.as_ref().map(|trained| [&trained.norm.sum, &trained.head.sum]),
            scale: scales.logits as f32,
            cap: scales.logit_cap.map(|cap| cap as f32),
        };
        if passes::fuses(hidden) || output.sums.is_some() {
            return loss::cross_entropy(hidden, &output, targets);
        }
        loss::plain_cross_entropy(&self.logits(hidden)?, targets)
    }

    /// Normalised, if there is a norm.
    fn normed(&self, x: &Tensor, norm: Option<&Tensor>) -> Result<Tensor> {
        match norm {
            Some(weight) => self.rms_norm(x, weight),
            None => Ok(x.clone()),
        }
    }

    /// Reshapes `[n, heads * head_dim]` to `[n, heads, head_dim]`. If there is a norm, it is over as many channels as it
    /// has weights: each head, or all of them.
    fn heads(&self, x: Tensor, norm: Option<&Tensor>) -> Result<Tensor> {
        let n = x.dim(0)?;
        let x = match norm {
            Some(weight) => self.rms_norm(&x.reshape((n, (), weight.dim(0)?))?, weight)?,
            None => x,
        };
        x.reshape((n, (), self.config.head_dim))
    }

    fn gated(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        passes::gate_mul(gate, up, self.config.activation)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let eps = self.config.rms_norm_eps;
        if self.ops == Ops::Differentiable || passes::fuses(x) {
            return passes::rms_norm(x, weight, eps);
        }
        ops::rms_norm(&x.contiguous()?, weight, eps as f32)
    }

    /// Cosines and sines of a rope's rotations at `positions`, each `[n, rotary_dim / 2]`.
    fn rotation(&self, rope: usize, positions: &[u32]) -> Result<(Tensor, Tensor)> {
        let (frequencies, factor) = (&self.ropes[rope], self.config.ropes[rope].attention_factor());
        let angles = || positions.iter().flat_map(|p| frequencies.iter().map(move |f| *p as f32 * f));
        let shape = (positions.len(), frequencies.len());
        let table = |values: Vec<f32>| Tensor::from_vec(values, shape, self.device())?.to_dtype(self.compute);
        let cos = angles().map(|angle| angle.cos() * factor).collect();
        let sin = angles().map(|angle| angle.sin() * factor).collect();
        Ok((table(cos)?, table(sin)?))
    }

    /// Rotates the leading channels of heads `[n, heads, head_dim]`: their first half with their second (Hugging Face's
    /// order).
    fn rope(&self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        if self.ops == Ops::Differentiable || passes::fuses(x) {
            return passes::rope(x, cos, sin);
        }
        let (head_dim, rotary_dim) = (self.config.head_dim, self.config.rotary_dim);
        let rotated = |x: &Tensor| rotary_emb::rope_thd(&x.contiguous()?.unsqueeze(0)?, cos, sin)?.squeeze(0);
        if rotary_dim < head_dim {
            let rest = x.narrow(2, rotary_dim, head_dim - rotary_dim)?;
            return Tensor::cat(&[rotated(&x.narrow(2, 0, rotary_dim)?)?, rest], 2);
        }
        rotated(x)
    }
}

/// `x * factor`, without an operation if the factor is 1.
fn scaled(x: Tensor, factor: f64) -> Result<Tensor> {
    if factor == 1.0 { Ok(x) } else { x * factor }
}

/// `cap * tanh(x / cap)`.
pub fn soft_cap(x: &Tensor, cap: f64) -> Result<Tensor> {
    (x / cap)?.tanh()? * cap
}

/// Finds a model's parameters in the tensors of its files.
struct Parameters<'a> {
    find: Finder<'a>,
    /// Tensors by Hugging Face name.
    tensors: HashMap<String, Tensor>,
    /// Sums of gradients, if the parameters are trained with them.
    sums: Option<&'a GradientSums>,
    compute: DType,
}

impl Parameters<'_> {
    fn take(&self, TensorRows { name, shape, rows }: TensorRows) -> Result<Tensor> {
        let Some(tensor) = self.tensors.get(&name) else { bail!("{name} is not among the tensors") };
        if rows.len() == shape[0] { Ok(tensor.clone()) } else { tensor.narrow(0, rows.start, rows.len()) }
    }

    fn weight(&self, parameter: Parameter, layer: Option<usize>) -> Result<Tensor> {
        self.take(self.find.weight(parameter, layer)?)
    }

    fn linear(&self, parameter: Parameter, layer: Option<usize>) -> Result<Linear> {
        let bias = self.find.bias(parameter, layer).map(|place| self.take(place)).transpose()?;
        Linear::new(self.weight(parameter, layer)?, bias, self.compute)
    }

    /// A parameter with its rows in the sum of its tensor's gradients.
    fn summed(&self, place: TensorRows) -> Result<Summed> {
        let TensorRows { name, shape, rows } = &place;
        let sum = match self.sums.and_then(|sums| sums.get(name)) {
            Some(sum) if sum.dims() == shape.as_slice() => sum.narrow(0, rows.start, rows.len())?,
            Some(sum) => bail!("the sum of the gradients of {name} is {:?}, expected {shape:?}", sum.dims()),
            None => bail!("there is no sum of the gradients of {name}"),
        };
        Ok(Summed { value: self.take(place)?, sum })
    }

    fn trained(&self, config: &ModelConfig) -> Result<Trained> {
        let weight = |parameter, layer| self.summed(self.find.weight(parameter, layer)?);
        let norm = |place: Option<TensorRows>| {
            let Some(place) = place else { return Ok::<_, Error>(None) };
            let Summed { value, sum } = self.summed(place)?;
            let value =
                if self.find.norm_offset() == 0.0 { value } else { (value + f64::from(self.find.norm_offset()))? };
            Ok(Some(Summed { value, sum }))
        };
        let embedding = weight(Parameter::Embedding, None)?;
        let head = if config.tie_word_embeddings { embedding.clone() } else { weight(Parameter::Head, None)? };
        let final_norm = norm(self.find.norm(Parameter::FinalNorm, None)?)?;
        let mut blocks = Vec::with_capacity(config.num_hidden_layers);
        for (layer, spec) in config.layers.iter().enumerate() {
            let at = Some(layer);
            let linear = |parameter| {
                let bias = self.find.bias(parameter, at).map(|place| self.summed(place)).transpose()?;
                Ok::<_, Error>((weight(parameter, at)?, bias))
            };
            blocks.push(Arc::new(TrainedBlock {
                spec: spec.clone(),
                attention_norm: norm(self.find.norm(Parameter::AttentionNorm, at)?)?,
                q: linear(Parameter::Query)?,
                k: linear(Parameter::Key)?,
                v: linear(Parameter::Value)?,
                q_norm: norm(self.find.head_norm(Parameter::QueryNorm, at)?)?,
                k_norm: norm(self.find.head_norm(Parameter::KeyNorm, at)?)?,
                o: linear(Parameter::AttentionOutput)?,
                attention_output_norm: norm(self.find.norm(Parameter::AttentionOutputNorm, at)?)?,
                mlp_norm: norm(self.find.norm(Parameter::MlpNorm, at)?)?,
                gate: linear(Parameter::Gate)?,
                up: linear(Parameter::Up)?,
                down: linear(Parameter::Down)?,
                mlp_output_norm: norm(self.find.norm(Parameter::MlpOutputNorm, at)?)?,
                head_dim: config.head_dim,
                activation: config.activation,
                eps: config.rms_norm_eps as f32,
                residual: config.scales.residual as f32,
            }));
        }
        let norm = final_norm.ok_or_else(|| Error::Msg("no final norm".into()))?;
        Ok(Trained { embedding, blocks, norm, head })
    }

    /// The factors of a norm over the residual stream.
    fn norm(&self, parameter: Parameter, layer: Option<usize>) -> Result<Option<Tensor>> {
        self.factors(self.find.norm(parameter, layer)?)
    }

    fn head_norm(&self, parameter: Parameter, layer: Option<usize>) -> Result<Option<Tensor>> {
        self.factors(self.find.head_norm(parameter, layer)?)
    }

    fn factors(&self, place: Option<TensorRows>) -> Result<Option<Tensor>> {
        let Some(place) = place else { return Ok(None) };
        let weights = self.take(place)?.to_dtype(self.compute)?;
        match self.find.norm_offset() {
            0.0 => Ok(Some(weights)),
            offset => Ok(Some((weights + f64::from(offset))?)),
        }
    }
}
