//! The decoder block of all supported families, over a flat batch of tokens.
//!
//! The tokens of all sequences are concatenated in one dimension `n`; only attention knows which tokens belong
//! together. So the same code serves (ragged batches over paged KV) and trains (rectangular batches, with gradients).

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::{ops, rotary_emb};

use super::{differentiable, linear::Linear};
use crate::{
    Axis, ModelConfig, ModelError, Parameter,
    family::{Finder, TensorRows},
};

/// Computes attention, with keys and values from any source.
pub trait Attention {
    /// Attention of one layer. `q` is `[n, heads, head_dim]`, `k` and `v` are `[n, kv_heads, head_dim]`, with rope
    /// already applied to q and k. The result is `[n, heads, head_dim]`, contiguous.
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor>;
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

/// The implementation of norm, rope and the MLP's gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ops {
    /// Fused operations, without gradients.
    Fused,
    /// Operations that support gradients.
    Differentiable,
}

struct Block {
    /// Index of the rope that rotates q and k; `None`: no rotation.
    rope: Option<usize>,
    /// Factor of the queries.
    query_factor: Option<f32>,
    input_norm: Tensor,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    q_norm: Option<Tensor>,
    k_norm: Option<Tensor>,
    post_attention_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
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
        let parameters = Parameters { find: Finder::new(config), tensors, compute };
        let embedding = parameters.weight(Parameter::Embedding, None)?;
        let head = match config.tie_word_embeddings {
            true => Linear::new(embedding.clone(), None, compute)?,
            false => parameters.linear(Parameter::Head, None)?,
        };
        let mut blocks = Vec::with_capacity(config.num_hidden_layers);
        for (layer, spec) in config.layers.iter().enumerate() {
            let at = Some(layer);
            blocks.push(Block {
                rope: spec.rope,
                query_factor: spec.query_factor(config.head_dim),
                input_norm: parameters.norm(Parameter::AttentionNorm, at)?,
                q: parameters.linear(Parameter::Query, at)?,
                k: parameters.linear(Parameter::Key, at)?,
                v: parameters.linear(Parameter::Value, at)?,
                q_norm: parameters.head_norm(Parameter::QueryNorm, at)?,
                k_norm: parameters.head_norm(Parameter::KeyNorm, at)?,
                o: parameters.linear(Parameter::AttentionOutput, at)?,
                post_attention_norm: parameters.norm(Parameter::MlpNorm, at)?,
                gate: parameters.linear(Parameter::Gate, at)?,
                up: parameters.linear(Parameter::Up, at)?,
                down: parameters.linear(Parameter::Down, at)?,
            });
        }
        let norm = parameters.norm(Parameter::FinalNorm, None)?;
        parameters.find.all_used()?;
        Ok(Self {
            config: config.clone(),
            ops,
            compute,
            ropes: config.inverse_frequencies(),
            head,
            embedding,
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
        let rotations = self.ropes.iter().map(|rope| self.rotation(rope, positions)).collect::<Result<Vec<_>>>()?;
        let mut x = self.embedding.index_select(tokens, 0)?.to_dtype(self.compute)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            let normed = self.rms_norm(&x, &block.input_norm)?;
            see(Site::Output(Parameter::AttentionNorm), layer, &normed)?;
            let mut q = self.heads(block.q.forward(&normed)?, block.q_norm.as_ref())?;
            let mut k = self.heads(block.k.forward(&normed)?, block.k_norm.as_ref())?;
            let v = self.heads(block.v.forward(&normed)?, None)?;
            if let Some(rope) = block.rope {
                let (cos, sin) = &rotations[rope];
                (q, k) = (self.rope(&q, cos, sin)?, self.rope(&k, cos, sin)?);
            }
            if let Some(factor) = block.query_factor {
                q = (q * f64::from(factor))?;
            }
            let attended = attention.attend(layer, &q, &k, &v)?;
            x = (x + block.o.forward(&attended.flatten_from(1)?)?)?;

            let normed = self.rms_norm(&x, &block.post_attention_norm)?;
            see(Site::Output(Parameter::MlpNorm), layer, &normed)?;
            let inner = self.gated(&block.gate.forward(&normed)?, &block.up.forward(&normed)?)?;
            see(Site::Input(Parameter::Down), layer, &inner)?;
            x = (x + block.down.forward(&inner)?)?;
        }
        Ok(x)
    }

    /// Applies the final norm and the head: hidden states `[rows, hidden]` to logits `[rows, vocab]`.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.head.forward(&self.rms_norm(hidden, &self.norm)?)
    }

    /// Reshapes `[n, heads * head_dim]` to `[n, heads, head_dim]`, and normalises each head if there is a norm.
    fn heads(&self, x: Tensor, norm: Option<&Tensor>) -> Result<Tensor> {
        let x = x.reshape((x.dim(0)?, (), self.config.head_dim))?;
        match norm {
            Some(weight) => self.rms_norm(&x, weight),
            None => Ok(x),
        }
    }

    fn gated(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        match self.ops {
            Ops::Fused => gate.silu()? * up,
            Ops::Differentiable => differentiable::silu_mul(gate, up),
        }
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let eps = self.config.rms_norm_eps;
        match self.ops {
            Ops::Fused => ops::rms_norm(&x.contiguous()?, weight, eps as f32),
            Ops::Differentiable => differentiable::rms_norm(x, weight, eps),
        }
    }

    /// Cosines and sines of a rope's rotations at `positions`, each `[n, head_dim / 2]`.
    fn rotation(&self, frequencies: &[f32], positions: &[u32]) -> Result<(Tensor, Tensor)> {
        let angles = || positions.iter().flat_map(|p| frequencies.iter().map(move |f| *p as f32 * f));
        let shape = (positions.len(), frequencies.len());
        let table = |values: Vec<f32>| Tensor::from_vec(values, shape, self.device())?.to_dtype(self.compute);
        Ok((table(angles().map(f32::cos).collect())?, table(angles().map(f32::sin).collect())?))
    }

    /// Rotates `[n, heads, head_dim]`: the first half of a head with its second (Hugging Face's order).
    fn rope(&self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        match self.ops {
            Ops::Fused => rotary_emb::rope_thd(&x.contiguous()?.unsqueeze(0)?, cos, sin)?.squeeze(0),
            Ops::Differentiable => differentiable::rope(x, cos, sin),
        }
    }
}

/// Finds a model's parameters in the tensors of its files.
struct Parameters<'a> {
    find: Finder<'a>,
    /// Tensors by Hugging Face name.
    tensors: HashMap<String, Tensor>,
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

    fn norm(&self, parameter: Parameter, layer: Option<usize>) -> Result<Tensor> {
        self.take(self.find.norm(parameter, layer)?)?.to_dtype(self.compute)
    }

    fn head_norm(&self, parameter: Parameter, layer: Option<usize>) -> Result<Option<Tensor>> {
        let place = self.find.head_norm(parameter, layer)?;
        place.map(|place| self.take(place)?.to_dtype(self.compute)).transpose()
    }
}
