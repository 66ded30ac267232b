//! The decoder block of all supported families, over a flat batch of tokens.
//!
//! Tokens of all sequences lie one behind the other in one dimension `n`; only attention knows which belong together.
//! So the same code serves (ragged batches over paged KV) and trains (rectangular batches, with gradients).

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{ops, rotary_emb};

use super::{differentiable, linear::Linear};
use crate::{ModelConfig, ModelError};

/// Where attention finds its keys and values.
pub trait Attention {
    /// Attention of one layer. `q` is `[n, heads, head_dim]`, `k` and `v` `[n, kv_heads, head_dim]`, rope applied to q
    /// and k; the result is `[n, heads, head_dim]`, contiguous.
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor>;
}

/// A place in a layer whose activations importance scores are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// Output of input_layernorm, `[n, hidden]`.
    InputNorm,
    /// Output of post_attention_layernorm, `[n, hidden]`.
    PostAttentionNorm,
    /// Input of down_proj, `[n, intermediate]`.
    DownInput,
}

/// Sees the activations of a forward pass: site, layer, activations.
pub type Observer<'a> = dyn FnMut(Site, usize, &Tensor) -> Result<()> + 'a;

/// Gives the weight tensor of a name and shape, or says why not.
pub type TensorSource<'a> = dyn FnMut(&str, &[usize]) -> std::result::Result<Tensor, ModelError> + 'a;

/// Which implementation of norm and rope.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ops {
    /// One pass over memory each; no gradient.
    Fused,
    /// Of basic operations, through which gradients flow.
    Differentiable,
}

struct Block {
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
    inverse_frequencies: Vec<f32>,
    /// `[vocab, hidden]`.
    embedding: Tensor,
    blocks: Vec<Block>,
    norm: Tensor,
    head: Linear,
}

impl Decoder {
    /// From tensors by Hugging Face name, all of one type; activations have that type too.
    ///
    /// With [`Ops::Differentiable`] and tensors of variables, gradients reach the variables.
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

    /// From whatever `get(name, shape)` gives. `compute` is the type of the activations.
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
        // Every name was just inserted by the same list, so a miss is a fault of this crate.
        let mut take = |name: &str| {
            tensors
                .remove(name)
                .ok_or_else(|| candle_core::Error::Msg(format!("{name} is not among the tensor shapes")))
        };
        let embedding = take("model.embed_tokens.weight")?;
        let norm = take("model.norm.weight")?.to_dtype(compute)?;
        let head = if config.tie_word_embeddings { embedding.clone() } else { take("lm_head.weight")? };
        let mut blocks = Vec::with_capacity(config.num_hidden_layers);
        for layer in 0..config.num_hidden_layers {
            let mut take = |name: &str| take(&format!("model.layers.{layer}.{name}"));
            let mut linear = |name: &str, bias: bool| {
                let weight = take(&format!("{name}.weight"))?;
                let bias = bias.then(|| take(&format!("{name}.bias"))).transpose()?;
                Linear::new(weight, bias, compute)
            };
            let (qkv, o, mlp) = (config.qkv_bias, config.o_bias, config.mlp_bias);
            let (q, k, v) =
                (linear("self_attn.q_proj", qkv)?, linear("self_attn.k_proj", qkv)?, linear("self_attn.v_proj", qkv)?);
            let o = linear("self_attn.o_proj", o)?;
            let (gate, up, down) =
                (linear("mlp.gate_proj", mlp)?, linear("mlp.up_proj", mlp)?, linear("mlp.down_proj", mlp)?);
            let mut norm = |name: &str| take(name)?.to_dtype(compute);
            let qk_norm = config.qk_norm();
            blocks.push(Block {
                input_norm: norm("input_layernorm.weight")?,
                post_attention_norm: norm("post_attention_layernorm.weight")?,
                q_norm: qk_norm.then(|| norm("self_attn.q_norm.weight")).transpose()?,
                k_norm: qk_norm.then(|| norm("self_attn.k_norm.weight")).transpose()?,
                q,
                k,
                v,
                o,
                gate,
                up,
                down,
            });
        }
        Ok(Self {
            config: config.clone(),
            ops,
            compute,
            inverse_frequencies: config.inverse_frequencies(),
            head: Linear::new(head, None, compute)?,
            embedding,
            blocks,
            norm,
        })
    }

    /// Its geometry.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where its weights are.
    pub fn device(&self) -> &Device {
        self.embedding.device()
    }

    /// Hidden states before the final norm, `[n, hidden]`, of `n` tokens (`[n]`, u32) at `positions` (n of them).
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
        let (cos, sin) = self.rotation(positions)?;
        let mut x = self.embedding.index_select(tokens, 0)?.to_dtype(self.compute)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            let normed = self.rms_norm(&x, &block.input_norm)?;
            see(Site::InputNorm, layer, &normed)?;
            let q = self.heads(block.q.forward(&normed)?, block.q_norm.as_ref())?;
            let k = self.heads(block.k.forward(&normed)?, block.k_norm.as_ref())?;
            let v = self.heads(block.v.forward(&normed)?, None)?;
            let attended = attention.attend(layer, &self.rope(&q, &cos, &sin)?, &self.rope(&k, &cos, &sin)?, &v)?;
            x = (x + block.o.forward(&attended.flatten_from(1)?)?)?;

            let normed = self.rms_norm(&x, &block.post_attention_norm)?;
            see(Site::PostAttentionNorm, layer, &normed)?;
            let inner = self.gated(&block.gate.forward(&normed)?, &block.up.forward(&normed)?)?;
            see(Site::DownInput, layer, &inner)?;
            x = (x + block.down.forward(&inner)?)?;
        }
        Ok(x)
    }

    /// Logits `[rows, vocab]` of hidden states `[rows, hidden]`, through the final norm.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.head.forward(&self.rms_norm(hidden, &self.norm)?)
    }

    /// `[n, heads * head_dim]` as `[n, heads, head_dim]`, each head normed where the family asks for it.
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

    /// Cosines and sines of the rotations at `positions`, each `[n, head_dim / 2]`.
    fn rotation(&self, positions: &[u32]) -> Result<(Tensor, Tensor)> {
        let angles = || positions.iter().flat_map(|p| self.inverse_frequencies.iter().map(move |f| *p as f32 * f));
        let shape = (positions.len(), self.inverse_frequencies.len());
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
