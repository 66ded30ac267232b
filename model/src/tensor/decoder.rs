//! The decoder block of all supported families, over a flat batch of tokens.
//!
//! The tokens of all sequences are concatenated in one dimension `n`; only attention knows which tokens belong
//! together. So the same code serves (ragged batches over paged KV) and trains (ragged batches over prompts, with
//! gradients).

use std::collections::HashMap;

use candle_core::{DType, Device, Error, Result, Tensor, bail};
use candle_nn::{ops, rotary_emb};

use super::{differentiable, linear::Linear, loss, trained::TrainedEmbedding};
use crate::{
    Axis, LayerSpec, ModelConfig, ModelError, Parameter,
    family::{Finder, TensorRows},
};

/// Computes attention, with keys and values from any source.
pub trait Attention {
    /// Attention of one layer. `q` is `[n, heads, head_dim]`, `k` and `v` are `[n, kv_heads, head_dim]`, with rope
    /// already applied to q and k, and the factor of the scores to q: scores are the products times `1 / sqrt(head_dim)`.
    /// `spec` has the window and the soft cap. The result is `[n, heads, head_dim]`, contiguous.
    fn attend(&mut self, layer: usize, spec: &LayerSpec, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor>;
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

/// The implementation of norm, rope, the MLP's gate and the loss. In f32 on CPUs, both are the same operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ops {
    /// Fused operations, without gradients.
    Fused,
    /// Operations that support gradients.
    Differentiable,
}

/// Sums of gradients by Hugging Face name, each of its parameter's shape. Backward passes add to them in place.
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
    /// Sum of the embedding's gradients, that the backward pass adds to.
    embedding_sum: Option<Tensor>,
    blocks: Vec<Block>,
    norm: Tensor,
    head: Linear,
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
        Self::trained(config, tensors, ops, &GradientSums::new())
    }

    /// Like [`Self::from_tensors`]. The gradients of the embedding and of linear layers in `sums` are added there, and are
    /// not in the result of `backward`. These parameters and the sums are f32 on the CPU, and the loss is
    /// [`Self::cross_entropy`]'s.
    pub fn trained(
        config: &ModelConfig,
        tensors: &HashMap<String, Tensor>,
        ops: Ops,
        sums: &GradientSums,
    ) -> std::result::Result<Self, ModelError> {
        let compute = tensors.values().next().map_or(DType::F32, Tensor::dtype);
        Self::build_with_sums(config, ops, compute, sums, &mut |name, shape| {
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

    /// Builds a decoder from the tensors that `get(name, shape)` returns. `compute` is the type of the activations.
    pub fn build(
        config: &ModelConfig,
        ops: Ops,
        compute: DType,
        get: &mut TensorSource<'_>,
    ) -> std::result::Result<Self, ModelError> {
        Self::build_with_sums(config, ops, compute, &GradientSums::new(), get)
    }

    fn build_with_sums(
        config: &ModelConfig,
        ops: Ops,
        compute: DType,
        sums: &GradientSums,
        get: &mut TensorSource<'_>,
    ) -> std::result::Result<Self, ModelError> {
        let mut tensors = HashMap::new();
        for (name, shape) in config.tensor_shapes() {
            let tensor = get(&name, &shape)?;
            tensors.insert(name, tensor);
        }
        let parameters = Parameters { find: Finder::new(config), tensors, sums, compute };
        let place = parameters.find.weight(Parameter::Embedding, None)?;
        let embedding_sum = parameters.sum(&place)?;
        let embedding = parameters.take(place)?;
        let head = match config.tie_word_embeddings {
            true => {
                let tied = Linear::new(embedding.clone(), None, compute)?;
                if let Some(sum) = &embedding_sum { tied.summed(sum.clone(), None) } else { tied }
            }
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
            embedding_sum,
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
        let mut x = match &self.embedding_sum {
            Some(sum) => self.embedding.apply_op1(TrainedEmbedding { tokens: tokens.to_vec1()?, sum: sum.clone() })?,
            None => self.embedding.index_select(tokens, 0)?.to_dtype(self.compute)?,
        };
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
        let x = self.rms_norm(hidden, &self.norm)?;
        let (weight, sum) = self.head.weight(&x)?;
        if differentiable::fits(&x) && (sum.is_some() || self.ops == Ops::Fused) {
            let scales = &self.config.scales;
            let (scale, cap) = (scales.logits as f32, scales.logit_cap.map(|cap| cap as f32));
            let output = loss::Output { weight: &weight.detach(), sum, scale, cap };
            return loss::cross_entropy(&x, &output, targets);
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
        differentiable::gate_mul(gate, up, self.config.activation)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let eps = self.config.rms_norm_eps;
        match self.ops {
            Ops::Fused if !differentiable::fits(x) => ops::rms_norm(&x.contiguous()?, weight, eps as f32),
            _ => differentiable::rms_norm(x, weight, eps),
        }
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
        if self.ops == Ops::Differentiable || differentiable::fits(x) {
            return differentiable::rope(x, cos, sin);
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
    sums: &'a GradientSums,
    compute: DType,
}

impl Parameters<'_> {
    fn take(&self, TensorRows { name, shape, rows }: TensorRows) -> Result<Tensor> {
        let Some(tensor) = self.tensors.get(&name) else { bail!("{name} is not among the tensors") };
        if rows.len() == shape[0] { Ok(tensor.clone()) } else { tensor.narrow(0, rows.start, rows.len()) }
    }

    /// The rows of a parameter in the sum of its tensor's gradients, if there is one.
    fn sum(&self, TensorRows { name, shape, rows }: &TensorRows) -> Result<Option<Tensor>> {
        let Some(sum) = self.sums.get(name) else { return Ok(None) };
        if sum.dims() != shape.as_slice() {
            bail!("the sum of the gradients of {name} is {:?}, expected {shape:?}", sum.dims());
        }
        sum.narrow(0, rows.start, rows.len()).map(Some)
    }

    fn linear(&self, parameter: Parameter, layer: Option<usize>) -> Result<Linear> {
        let (weight, bias) = (self.find.weight(parameter, layer)?, self.find.bias(parameter, layer));
        let of_bias = bias.as_ref().map(|place| self.sum(place)).transpose()?.flatten();
        let of_weight = self.sum(&weight)?;
        let linear = Linear::new(self.take(weight)?, bias.map(|place| self.take(place)).transpose()?, self.compute)?;
        Ok(match of_weight {
            Some(of_weight) => linear.summed(of_weight, of_bias),
            None => linear,
        })
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
