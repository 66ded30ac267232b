//! The decoder block for training on CPUs: each half, attention and MLP, is one operation with a backward pass of its own.
//!
//! candle's backward pass adds the gradient of every operation's input to zeros, in passes over memory that take longer than
//! the products between them. So operations here are as large as the residual stream allows. Gradients of parameters are
//! added to sums. The block is the one of `decoder.rs`; tests compare both, for all families.

use std::{borrow::Cow, sync::Arc};

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use parking_lot::Mutex;

use super::{
    attention::Tiled,
    lanes::{Add, Scale, each_in_parallel, lanes},
    passes::{gated, gated_back, norm, norm_back, norm_weights_back, rotated, slice},
    product::Write,
    trained::{AddColumnSums, Summed, Values, linear, linear_back},
};
use crate::{Activation, LayerSpec};

/// Weight and bias of a linear layer.
pub(super) type Layer = (Summed, Option<Summed>);

/// The parameters of a block, with their gradients' sums.
pub(super) struct TrainedBlock {
    pub(super) spec: LayerSpec,
    pub(super) attention_norm: Option<Summed>,
    pub(super) q: Layer,
    pub(super) k: Layer,
    pub(super) v: Layer,
    pub(super) q_norm: Option<Summed>,
    pub(super) k_norm: Option<Summed>,
    pub(super) o: Layer,
    pub(super) attention_output_norm: Option<Summed>,
    pub(super) mlp_norm: Option<Summed>,
    pub(super) gate: Layer,
    pub(super) up: Layer,
    pub(super) down: Layer,
    pub(super) mlp_output_norm: Option<Summed>,
    pub(super) head_dim: usize,
    pub(super) activation: Activation,
    pub(super) eps: f32,
    /// Factor of what is added to the residual stream.
    pub(super) residual: f32,
}

lanes!(
    /// `target + x factor`.
    AddScaled { factor } 1, |self, target, [x]| S::mul_add(x, S::splat(self.factor), target)
);

impl TrainedBlock {
    /// Normalised, if there is a norm.
    fn normed<'a>(&self, x: &'a [f32], by: Option<&Summed>) -> Result<Cow<'a, [f32]>> {
        Ok(match by {
            Some(by) => Cow::Owned(norm(x, &Values::of(&by.value)?, self.eps)),
            None => Cow::Borrowed(x),
        })
    }

    /// Computes the gradient of the input of [`Self::normed`]. `g` is the gradient of its result. Adds the gradient of the weights
    /// to their sum.
    fn normed_back<'a>(&self, x: &[f32], by: Option<&Summed>, g: Cow<'a, [f32]>) -> Result<Cow<'a, [f32]>> {
        let Some(by) = by else { return Ok(g) };
        let weights = Values::of(&by.value)?;
        by.sum.inplace_op1(&AddColumnSums(&norm_weights_back(x, weights.len(), self.eps, &g)))?;
        Ok(Cow::Owned(norm_back(x, &weights, self.eps, &g)))
    }

    /// The residual stream after something was added.
    fn add(&self, x: &[f32], added: &[f32]) -> Vec<f32> {
        let mut out = x.to_vec();
        each_in_parallel(&AddScaled { factor: self.residual }, &mut out, [added]);
        out
    }

    /// The gradient of what was added.
    fn add_back<'a>(&self, g: &'a [f32]) -> Cow<'a, [f32]> {
        if self.residual == 1.0 {
            return Cow::Borrowed(g);
        }
        let mut scaled = g.to_vec();
        each_in_parallel(&Scale { factor: self.residual }, &mut scaled, []);
        Cow::Owned(scaled)
    }
}

fn apply(x: &[f32], (weight, bias): &Layer) -> Result<Vec<f32>> {
    linear(x, weight, bias.as_ref())
}

fn apply_back(x: &[f32], (weight, bias): &Layer, g: &[f32], dx: (&mut [f32], Write)) -> Result<()> {
    linear_back(x, weight, bias.as_ref(), g, dx)
}

/// What the backward pass needs of the forward pass. It is taken once.
struct Saved<T>(Mutex<Option<T>>);

impl<T> Saved<T> {
    fn none() -> Self {
        Self(Mutex::new(None))
    }

    fn put(&self, value: T) {
        *self.0.lock() = Some(value);
    }

    fn take(&self) -> Result<T> {
        match self.0.lock().take() {
            Some(value) => Ok(value),
            None => bail!("a block's backward pass runs once after its forward pass"),
        }
    }
}

/// Attention and what it adds to the residual stream.
pub(super) struct AttentionHalf {
    block: Arc<TrainedBlock>,
    tiled: Tiled,
    /// Cosines and sines, `[n, rotary_dim / 2]`.
    rotation: Option<(Tensor, Tensor)>,
    saved: Saved<Attended>,
}

struct Attended {
    input: Vec<f32>,
    /// Queries and keys before their norms.
    raw: [Vec<f32>; 2],
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    result: Vec<f32>,
    /// Before the norm.
    output: Vec<f32>,
}

impl AttentionHalf {
    pub(super) fn new(block: &Arc<TrainedBlock>, tiled: Tiled, rotation: Option<(Tensor, Tensor)>) -> Self {
        Self { block: block.clone(), tiled, rotation, saved: Saved::none() }
    }

    /// Heads of queries and of keys.
    fn heads(&self) -> Result<[usize; 2]> {
        let of = |layer: &Layer| Ok::<_, candle_core::Error>(layer.0.value.dim(0)? / self.block.head_dim);
        Ok([of(&self.block.q)?, of(&self.block.k)?])
    }

    fn rotate(&self, x: Vec<f32>, back: bool) -> Result<Vec<f32>> {
        let Some((cos, sin)) = &self.rotation else { return Ok(x) };
        let (cos, sin) = (Values::of(cos)?, Values::of(sin)?);
        let row = x.len() / self.tiled.ragged.lengths.iter().sum::<usize>().max(1);
        Ok(rotated(&x, [row, self.block.head_dim], [&cos, &sin], back))
    }

    fn scale_queries(&self, q: &mut [f32]) {
        if let Some(factor) = self.block.spec.query_factor(self.block.head_dim) {
            each_in_parallel(&Scale { factor }, q, []);
        }
    }
}

impl CustomOp1 for AttentionHalf {
    fn name(&self) -> &'static str {
        "train-attention"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (block, x) = (&self.block, slice(s, l)?);
        let input = block.normed(x, block.attention_norm.as_ref())?.into_owned();
        let raw = [apply(&input, &block.q)?, apply(&input, &block.k)?];
        let v = apply(&input, &block.v)?;
        let [q, k] = [(&raw[0], &block.q_norm), (&raw[1], &block.k_norm)]
            .map(|(x, by)| self.rotate(block.normed(x, by.as_ref())?.into_owned(), false));
        let (mut q, k) = (q?, k?);
        self.scale_queries(&mut q);
        let result = self.tiled.forward([&q, &k, &v], self.heads()?, block.head_dim)?;
        let output = apply(&result, &block.o)?;
        let out = block.add(x, &block.normed(&output, block.attention_output_norm.as_ref())?);
        // Only norms need their inputs.
        let [raw_q, raw_k] = raw;
        let kept = |x: Vec<f32>, by: &Option<Summed>| if by.is_some() { x } else { Vec::new() };
        self.saved.put(Attended {
            raw: [kept(raw_q, &block.q_norm), kept(raw_k, &block.k_norm)],
            output: kept(output, &block.attention_output_norm),
            input,
            q,
            k,
            v,
            result,
        });
        Ok((CpuStorage::F32(out), l.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (block, Attended { input, raw, q, k, v, result, output }) = (&self.block, self.saved.take()?);
        let grad = grad.contiguous()?;
        let g = Values::of(&grad)?;
        let of_output = block.normed_back(&output, block.attention_output_norm.as_ref(), block.add_back(&g))?;
        let mut of_result = vec![0.0; result.len()];
        apply_back(&result, &block.o, &of_output, (&mut of_result, Write::Replace))?;
        let (heads, width) = (self.heads()?, block.head_dim);
        let [mut dq, dk, dv] = self.tiled.backward([&q, &k, &v], heads, width, [&result, &of_result])?;
        self.scale_queries(&mut dq);
        let (dq, dk) = (self.rotate(dq, true)?, self.rotate(dk, true)?);
        let dq = block.normed_back(&raw[0], block.q_norm.as_ref(), dq.into())?;
        let dk = block.normed_back(&raw[1], block.k_norm.as_ref(), dk.into())?;
        let mut of_input = vec![0.0; input.len()];
        apply_back(&input, &block.q, &dq, (&mut of_input, Write::Replace))?;
        apply_back(&input, &block.k, &dk, (&mut of_input, Write::Add))?;
        apply_back(&input, &block.v, &dv, (&mut of_input, Write::Add))?;
        let values = Values::of(x)?;
        let mut dx = block.normed_back(&values, block.attention_norm.as_ref(), of_input.into())?.into_owned();
        each_in_parallel(&Add {}, &mut dx, [&g]);
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

/// The MLP and what it adds to the residual stream.
pub(super) struct MlpHalf {
    block: Arc<TrainedBlock>,
    saved: Saved<Expanded>,
}

struct Expanded {
    input: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    inner: Vec<f32>,
    /// Before the norm.
    output: Vec<f32>,
}

impl MlpHalf {
    pub(super) fn new(block: &Arc<TrainedBlock>) -> Self {
        Self { block: block.clone(), saved: Saved::none() }
    }
}

impl CustomOp1 for MlpHalf {
    fn name(&self) -> &'static str {
        "train-mlp"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (block, x) = (&self.block, slice(s, l)?);
        let input = block.normed(x, block.mlp_norm.as_ref())?.into_owned();
        let (gate, up) = (apply(&input, &block.gate)?, apply(&input, &block.up)?);
        let inner = gated(&gate, &up, block.activation);
        let output = apply(&inner, &block.down)?;
        let out = block.add(x, &block.normed(&output, block.mlp_output_norm.as_ref())?);
        let output = if block.mlp_output_norm.is_some() { output } else { Vec::new() };
        self.saved.put(Expanded { input, gate, up, inner, output });
        Ok((CpuStorage::F32(out), l.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (block, Expanded { input, gate, up, inner, output }) = (&self.block, self.saved.take()?);
        let grad = grad.contiguous()?;
        let g = Values::of(&grad)?;
        let of_output = block.normed_back(&output, block.mlp_output_norm.as_ref(), block.add_back(&g))?;
        let mut of_inner = vec![0.0; inner.len()];
        apply_back(&inner, &block.down, &of_output, (&mut of_inner, Write::Replace))?;
        let [of_gate, of_up] = gated_back(&gate, &up, block.activation, &of_inner);
        let mut of_input = vec![0.0; input.len()];
        apply_back(&input, &block.gate, &of_gate, (&mut of_input, Write::Replace))?;
        apply_back(&input, &block.up, &of_up, (&mut of_input, Write::Add))?;
        let values = Values::of(x)?;
        let mut dx = block.normed_back(&values, block.mlp_norm.as_ref(), of_input.into())?.into_owned();
        each_in_parallel(&Add {}, &mut dx, [&g]);
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, path::Path};

    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::{
        ModelConfig, Weights,
        tensor::{Attention, Decoder, GradientSums, LayerKv, Ops, Ragged, ragged_attention},
    };

    struct Sequences(Arc<Ragged>, Vec<LayerKv>);

    impl Attention for Sequences {
        fn attend(&mut self, layer: usize, spec: &LayerSpec, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
            ragged_attention(&self.0, spec, Some(&self.1[layer]), [q, k, v])
        }

        fn ragged(&mut self, layer: usize) -> Result<(Arc<Ragged>, Option<LayerKv>)> {
            Ok((self.0.clone(), Some(self.1[layer].clone())))
        }
    }

    /// Loss, and the gradients of all parameters, are those of candle's backward pass over basic operations.
    #[test]
    fn every_family_is_trained_as_basic_operations_are() {
        for family in
            ["llama-untied", "llama-tied", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3", "olmo2", "granite"]
        {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(family).join("full");
            let (config, weights) = (ModelConfig::from_folder(&folder).unwrap(), Weights::open(&folder).unwrap());
            let load = |(name, shape): (String, Vec<usize>)| {
                let tensor = weights.load(&name, &shape, &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
                (name, Var::from_tensor(&tensor).unwrap())
            };
            let vars: HashMap<String, Var> = config.tensor_shapes().into_iter().map(load).collect();
            let tensors = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
            let ragged = Arc::new(Ragged { lengths: vec![3, 70, 1], prompts: vec![5, 0, 20] });
            let prompt = |_| {
                let kv = || Tensor::randn(0f32, 1f32, (25, config.num_key_value_heads, config.head_dim), &Device::Cpu);
                (kv().unwrap(), kv().unwrap())
            };
            let mut attention = Sequences(ragged, (0..config.num_hidden_layers).map(prompt).collect());
            let ids = |times: u32| (0..74).map(|i| (i * times + 3) % config.vocab_size as u32).collect::<Vec<_>>();
            let positions: Vec<u32> = (5..8).chain(0..70).chain(20..21).collect();
            let mut run = |decoder: &Decoder| {
                let tokens = Tensor::new(ids(7), &Device::Cpu).unwrap();
                let hidden = decoder.forward(&tokens, &positions, &mut attention, None).unwrap();
                let loss = decoder.cross_entropy(&hidden, &ids(11)).unwrap();
                (loss.to_scalar::<f32>().unwrap(), loss.backward().unwrap())
            };
            let basic = Decoder::from_tensors(&config, &tensors, Ops::Differentiable).unwrap();
            let (expected_loss, expected) = run(&basic);
            let sums: GradientSums = vars.iter().map(|(name, var)| (name.clone(), var.zeros_like().unwrap())).collect();
            let trained = Decoder::trained(&config, &tensors, &sums).unwrap();
            let (loss, _) = run(&trained);
            assert!((loss - expected_loss).abs() < 1e-4 * expected_loss, "{family}: {loss}, expected {expected_loss}");
            let norm = |x: &Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
            for (name, var) in &vars {
                let expected = expected.get(var).unwrap();
                let gap = norm(&(&sums[name] - expected).unwrap());
                assert!(gap <= 2e-4 * norm(expected) + 1e-5, "{family}, {name}: {gap} of {}", norm(expected));
            }
            // A second pass adds.
            run(&trained);
            for (name, var) in &vars {
                let expected = (expected.get(var).unwrap() * 2.0).unwrap();
                assert!(norm(&(&sums[name] - &expected).unwrap()) <= 2e-4 * norm(&expected) + 1e-5, "{family}, {name}");
            }
        }
    }
}
