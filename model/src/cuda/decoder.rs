//! The decoder block of all supported families, as a queue of kernels.

use cudarc::driver::CudaFunction;
use overfill_kv::KvDtype;

use super::{
    blas,
    cache::CudaKv,
    device::{Fault, Gpu},
    launch::{Attention, DECODE_HEADS, POSITION_HEADS, Position, RmsNorm, RopeTable, SiluMul, blocks_across},
    linear::{FormatKernels, Linear, Rows},
    memory::{Buffer, Pointer},
    pack::{Format, Half, padded},
    step::{Arrays, Sizes},
    workspace::Workspace,
};
use crate::{
    Activation, Axis, DeviceSpec, LayerSpec, ModelConfig, ModelError, Parameter, Weights, config::Heads,
    source::Sources,
};

/// Head sizes with attention kernels of their own. Smaller ones than the last run in the next wider kernel.
const HEAD_DIMS: [usize; 5] = [32, 64, 96, 128, 256];
/// Widths of the kernels for other head sizes.
const WIDTHS: [usize; 4] = [32, 64, 128, 256];

struct Block {
    /// Index of the rope that rotates q and k; `None`: no rotation.
    rope: Option<usize>,
    /// Factor of the scores, times log2(e).
    score_scale: f32,
    input_norm: Buffer,
    /// The rows of q, k and v, in this order.
    qkv: Linear,
    /// Norms of the heads of q and of k.
    qk_norm: [Option<Buffer>; 2],
    o: Linear,
    post_attention_norm: Buffer,
    /// The rows of gate and up, each padded.
    gate_up: Linear,
    down: Linear,
}

struct Functions {
    rms_norm: CudaFunction,
    rope_table: CudaFunction,
    position: CudaFunction,
    silu_mul: CudaFunction,
    decode_attention: CudaFunction,
    combine: CudaFunction,
    prefill_attention: CudaFunction,
    /// For the layers, and for embedding and head.
    format: FormatKernels,
    head_format: FormatKernels,
}

/// A model's weights on a device.
pub(super) struct Decoder {
    config: ModelConfig,
    functions: Functions,
    /// Inverse frequencies, f32 `[ropes, head_dim / 2]`.
    frequencies: Buffer,
    /// `None` if tied to the head, which is then used instead.
    embedding: Option<Linear>,
    blocks: Vec<Block>,
    norm: Buffer,
    head: Linear,
}

impl Decoder {
    /// Copies a model's weights to the device. `half`: type of activations.
    pub(super) fn load(
        gpu: &Gpu,
        index: usize,
        config: &ModelConfig,
        weights: &Weights,
        [format, head_format]: [Format; 2],
        half: Half,
        kv: KvDtype,
    ) -> Result<Self, ModelError> {
        let head_dim = config.head_dim;
        let Some(head_name) = head_name(head_dim) else {
            let reason = format!("head_dim is {head_dim}, supported on GPUs: even numbers up to 256");
            return Err(ModelError::Device { device: DeviceSpec::Cuda(index).to_string(), reason });
        };
        if let Some(what) = unsupported(config) {
            let reason = format!("{:?} models with {what} are supported on CPUs only", config.family);
            return Err(ModelError::Device { device: DeviceSpec::Cuda(index).to_string(), reason });
        }
        for (name, shape) in config.tensor_shapes() {
            weights.check(&name, &shape)?;
        }
        let fault = |e: Fault| e.while_loading(index);
        let find = Sources::new(config, weights);
        let linear = |format, parameters: &[Parameter], layer, result| {
            // Heads follow each other without padding; gates and ups are read as two matrices.
            let pad_each = parameters.contains(&Parameter::Gate);
            Linear::load(gpu, index, half, format, &Rows { find: &find, parameters, layer, pad_each }, result)
        };
        let norm = |mut values: Vec<f32>, width| {
            values.resize(width, 0.0);
            Buffer::of(gpu.launcher.stream(), &values).map_err(fault)
        };
        let hidden = padded(config.hidden_size);
        let embedding = linear(head_format, &[Parameter::Embedding], None, blas::Result::Float)?;
        let (embedding, head) = match config.tie_word_embeddings {
            true => (None, embedding),
            false => (Some(embedding), linear(head_format, &[Parameter::Head], None, blas::Result::Float)?),
        };
        let mut blocks = Vec::with_capacity(config.num_hidden_layers);
        for (layer, spec) in config.layers.iter().enumerate() {
            let at = Some(layer);
            let head_norm = |parameter| find.head_norm(parameter, at)?.map(|values| norm(values, head_dim)).transpose();
            let scale = spec.score_scale.unwrap_or(1.0 / (head_dim as f64).sqrt());
            blocks.push(Block {
                rope: spec.rope,
                score_scale: (scale * std::f64::consts::LOG2_E) as f32,
                input_norm: norm(find.norm(Parameter::AttentionNorm, at)?.unwrap_or_default(), hidden)?,
                qkv: linear(format, &[Parameter::Query, Parameter::Key, Parameter::Value], at, blas::Result::Half)?,
                qk_norm: [head_norm(Parameter::QueryNorm)?, head_norm(Parameter::KeyNorm)?],
                o: linear(format, &[Parameter::AttentionOutput], at, blas::Result::Added)?,
                post_attention_norm: norm(find.norm(Parameter::MlpNorm, at)?.unwrap_or_default(), hidden)?,
                gate_up: linear(format, &[Parameter::Gate, Parameter::Up], at, blas::Result::Half)?,
                down: linear(format, &[Parameter::Down], at, blas::Result::Added)?,
            });
        }
        let last_norm = norm(find.final_norm(config.scales.logits)?, hidden)?;
        find.all_used()?;
        let frequencies: Vec<f32> = config.inverse_frequencies().concat();
        Ok(Self {
            functions: Functions::new(gpu, half, kv, [format, head_format], &head_name).map_err(fault)?,
            config: config.clone(),
            frequencies: Buffer::of(gpu.launcher.stream(), &frequencies).map_err(fault)?,
            embedding,
            blocks,
            norm: last_norm,
            head,
        })
    }

    /// Size of the weights in bytes.
    pub(super) fn weight_bytes(&self) -> usize {
        self.step_weight_bytes() + self.embedding.as_ref().map_or(0, Linear::size_bytes)
    }

    /// Bytes of weights that a decode step reads. Excludes an untied embedding.
    pub(super) fn step_weight_bytes(&self) -> usize {
        self.linears().map(Linear::size_bytes).sum()
    }

    /// Bytes of [`Workspace::scratch`].
    pub(super) fn scratch_bytes(&self) -> usize {
        self.linears().map(Linear::scratch_bytes).max().unwrap_or(0)
    }

    fn linears(&self) -> impl Iterator<Item = &Linear> {
        let of_blocks = self.blocks.iter().flat_map(|b| [&b.qkv, &b.o, &b.gate_up, &b.down]);
        of_blocks.chain([&self.head])
    }

    /// Elements of a row of logits in the workspace. The first `vocab_size` are logits.
    pub(super) fn logits_stride(&self) -> usize {
        self.head.outputs()
    }

    /// Queues all layers of a step. Calls `layer_queued` when a layer's keys and values are queued.
    pub(super) fn queue_layers(
        &self,
        gpu: &Gpu,
        kv: &CudaKv,
        w: &Workspace,
        sizes: &Sizes,
        arrays: &Arrays,
        mut layer_queued: impl FnMut(usize) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let f = &self.functions;
        let Heads { heads, kv_heads, head_dim } = self.config.heads();
        let (rows, half, eps) = (sizes.rows, head_dim / 2, self.config.rms_norm_eps as f32);
        let (x, normed, qkv, q) = (w.x.pointer(), w.normed.pointer(), w.qkv.pointer(), w.q.pointer());
        let (attended, inner, gate_up) = (w.attended.pointer(), w.inner.pointer(), w.gate_up.pointer());
        let scratch = w.scratch.pointer();
        let table = self.embedding.as_ref().unwrap_or(&self.head);
        table.embed(gpu, &f.head_format, [arrays.tokens, x], rows)?;
        if !self.config.ropes.is_empty() {
            let angles = RopeTable {
                positions: arrays.positions,
                frequencies: self.frequencies.pointer(),
                cos: w.cos.pointer(),
                sin: w.sin.pointer(),
                rows: rows as i32,
                half: half as i32,
            };
            gpu.launcher.launch(&f.rope_table, [rows, self.config.ropes.len(), 1], &angles)?;
        }
        for (layer, block) in self.blocks.iter().enumerate() {
            self.queue_norm(gpu, &block.input_norm, [x, normed], Pointer::NULL, rows)?;
            block.qkv.multiply(gpu, &f.format, [normed, qkv, scratch], rows, blas::Result::Half)?;
            let norm = |i: usize| block.qk_norm[i].as_ref().map_or(Pointer::NULL, Buffer::pointer);
            let angles = |of: &Buffer| block.rope.map_or(Pointer::NULL, |r| of.pointer().offset(r * rows * half * 4));
            let position = Position {
                qkv,
                query_norm: norm(0),
                key_norm: norm(1),
                cos: angles(&w.cos),
                sin: angles(&w.sin),
                slots: arrays.slots,
                q,
                kv: kv.layer(layer),
                heads: heads as i32,
                kv_heads: kv_heads as i32,
                head_dim: head_dim as i32,
                stride: block.qkv.outputs() as i32,
                eps,
            };
            let across = (heads + 2 * kv_heads).div_ceil(POSITION_HEADS);
            gpu.launcher.launch(&f.position, [rows, across, 1], &position)?;
            layer_queued(layer)?;
            self.queue_attention(gpu, kv.layer(layer), w, sizes, arrays, block.score_scale)?;
            block.o.multiply(gpu, &f.format, [attended, x, scratch], rows, blas::Result::Added)?;

            self.queue_norm(gpu, &block.post_attention_norm, [x, normed], Pointer::NULL, rows)?;
            block.gate_up.multiply(gpu, &f.format, [normed, gate_up, scratch], rows, blas::Result::Half)?;
            let width = padded(self.config.intermediate_size);
            let silu = SiluMul { gate_up, out: inner, width: width as i32 };
            gpu.launcher.launch(&f.silu_mul, [rows, blocks_across(width), 1], &silu)?;
            block.down.multiply(gpu, &f.format, [inner, x, scratch], rows, blas::Result::Added)?;
        }
        Ok(())
    }

    /// Queues the logits of `count` rows whose numbers are at `wanted`.
    pub(super) fn queue_logits(&self, gpu: &Gpu, w: &Workspace, wanted: Pointer, count: usize) -> Result<(), Fault> {
        let (normed, logits) = (w.normed.pointer(), w.logits.pointer());
        self.queue_norm(gpu, &self.norm, [w.x.pointer(), normed], wanted, count)?;
        let operands = [normed, logits, w.scratch.pointer()];
        self.head.multiply(gpu, &self.functions.head_format, operands, count, blas::Result::Float)
    }

    fn queue_norm(
        &self,
        gpu: &Gpu,
        weight: &Buffer,
        [x, out]: [Pointer; 2],
        numbers: Pointer,
        rows: usize,
    ) -> Result<(), Fault> {
        let params = RmsNorm {
            x,
            weight: weight.pointer(),
            out,
            rows: numbers,
            width: self.config.hidden_size as i32,
            padded: padded(self.config.hidden_size) as i32,
            eps: self.config.rms_norm_eps as f32,
        };
        Ok(gpu.launcher.launch(&self.functions.rms_norm, [rows, 1, 1], &params)?)
    }

    fn queue_attention(
        &self,
        gpu: &Gpu,
        kv: Pointer,
        w: &Workspace,
        sizes: &Sizes,
        arrays: &Arrays,
        scale: f32,
    ) -> Result<(), Fault> {
        let f = &self.functions;
        let Heads { heads, kv_heads, head_dim } = self.config.heads();
        let splits = w.splits(sizes.single);
        let params = Attention {
            q: w.q.pointer(),
            kv,
            slices: arrays.slices,
            tables: arrays.tables,
            partial: w.partial.pointer(),
            tiles: arrays.tiles,
            out: w.attended.pointer(),
            heads: heads as i32,
            kv_heads: kv_heads as i32,
            splits: splits as i32,
            head_dim: head_dim as i32,
            out_stride: padded(heads * head_dim) as i32,
            scale,
        };
        if sizes.single > 0 {
            let across = kv_heads * (heads / kv_heads).div_ceil(DECODE_HEADS);
            gpu.launcher.launch(&f.decode_attention, [splits, across, sizes.single], &params)?;
            gpu.launcher.launch(&f.combine, [sizes.single, heads, 1], &params)?;
        }
        if sizes.tiles > 0 {
            gpu.launcher.launch(&f.prefill_attention, [heads, sizes.tiles, 1], &params)?;
        }
        Ok(())
    }
}

/// What a model needs that these kernels do not compute.
fn unsupported(config: &ModelConfig) -> Option<&'static str> {
    let has = |parameter| config.axes_of(parameter).is_some();
    let any = |test: fn(&LayerSpec) -> bool| config.layers.iter().any(test);
    [
        (any(|layer| layer.window.is_some()), "sliding windows"),
        (any(|layer| layer.score_cap.is_some()) || config.scales.logit_cap.is_some(), "soft caps"),
        (config.activation != Activation::Silu, "other activations than silu"),
        (!has(Parameter::AttentionNorm) || has(Parameter::AttentionOutputNorm), "norms after attention"),
        (config.axes_of(Parameter::QueryNorm).is_some_and(|[axis, _]| axis != Axis::HeadDim), "norms over all heads"),
        (config.embedding_scale() != 1.0 || config.scales.residual != 1.0, "factors of activations"),
        (config.rotary_dim != config.head_dim, "heads that are rotated in part"),
        (config.ropes.iter().any(|rope| rope.attention_factor() != 1.0), "factors of rotated queries and keys"),
    ]
    .into_iter()
    .find_map(|(needed, what)| needed.then_some(what))
}

/// What stands for a head size in the names of attention kernels; `None` if there are none for it.
fn head_name(head_dim: usize) -> Option<String> {
    if HEAD_DIMS.contains(&head_dim) {
        return Some(head_dim.to_string());
    }
    let width = WIDTHS.iter().find(|width| **width >= head_dim).filter(|_| head_dim.is_multiple_of(2))?;
    Some(format!("up_to_{width}"))
}

impl Functions {
    fn new(gpu: &Gpu, half: Half, kv: KvDtype, [format, head_format]: [Format; 2], head: &str) -> Result<Self, Fault> {
        let (t, of) = (half.name(), |name: String| gpu.launcher.function(&name));
        let kv = if kv.size_bytes() == 1 { "fp8" } else { t };
        Ok(Self {
            rms_norm: of(format!("rms_norm_{t}"))?,
            rope_table: of("rope_table_f32".into())?,
            position: of(format!("position_{t}_{kv}"))?,
            silu_mul: of(format!("silu_mul_{t}"))?,
            decode_attention: of(format!("decode_attention_{t}_{kv}_{head}"))?,
            combine: of(format!("combine_{t}"))?,
            prefill_attention: of(format!("prefill_attention_{t}_{kv}_{head}"))?,
            format: FormatKernels::new(gpu, half, format)?,
            head_format: FormatKernels::new(gpu, half, head_format)?,
        })
    }
}
