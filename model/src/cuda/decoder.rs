//! The decoder block of all supported families, as a queue of kernels.

use cudarc::driver::CudaFunction;
use overfill_kv::KvDtype;

use super::{
    blas,
    cache::CudaKv,
    device::{Fault, Gpu},
    launch::{
        AddNorm, Attention, DECODE_HEADS, GateMul, POSITION_HEADS, Position, QueryKeyNorm, RmsNorm, RopeTable, SoftCap,
        blocks_across,
    },
    linear::{FormatKernels, Linear, Rows},
    memory::{Buffer, Pointer},
    pack::{Format, Half, padded},
    step::{Arrays, Sizes},
    workspace::{Workspace, adds_directly},
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
    scoring: Scoring,
    attention_norm: Option<Buffer>,
    /// The rows of q, k and v, in this order.
    qkv: Linear,
    /// Norms of q and of k: of each head, or of all heads at once.
    qk_norm: [Option<Buffer>; 2],
    o: Linear,
    attention_output_norm: Option<Buffer>,
    mlp_norm: Option<Buffer>,
    /// The rows of gate and up, each padded.
    gate_up: Linear,
    down: Linear,
    mlp_output_norm: Option<Buffer>,
}

/// What a layer does with scores, in units of log2(e).
#[derive(Clone, Copy)]
struct Scoring {
    window: i32,
    scale: f32,
    /// 0: none.
    cap: f32,
}

impl Scoring {
    fn of(spec: &LayerSpec, head_dim: usize) -> Self {
        let scale = spec.score_scale.unwrap_or(1.0 / (head_dim as f64).sqrt());
        Self {
            window: spec.window.and_then(|window| i32::try_from(window).ok()).unwrap_or(i32::MAX),
            scale: (scale * std::f64::consts::LOG2_E) as f32,
            cap: (spec.score_cap.unwrap_or(0.0) * std::f64::consts::LOG2_E) as f32,
        }
    }
}

struct Functions {
    rms_norm: CudaFunction,
    rope_table: CudaFunction,
    position: CudaFunction,
    gate_mul: CudaFunction,
    add_norm: CudaFunction,
    query_key_norm: CudaFunction,
    soft_cap: CudaFunction,
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
    /// Inverse frequencies, f32 `[ropes, rotary_dim / 2]`, and factors of cosines and sines, f32 `[ropes]`.
    frequencies: Buffer,
    rope_factors: Buffer,
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
            let block_norm = |parameter| find.norm(parameter, at)?.map(|values| norm(values, hidden)).transpose();
            let head_norm = |parameter| {
                let values = find.head_norm(parameter, at)?;
                values.map(|values| Buffer::of(gpu.launcher.stream(), &values).map_err(fault)).transpose()
            };
            blocks.push(Block {
                rope: spec.rope,
                scoring: Scoring::of(spec, head_dim),
                attention_norm: block_norm(Parameter::AttentionNorm)?,
                qkv: linear(format, &[Parameter::Query, Parameter::Key, Parameter::Value], at, blas::Result::Half)?,
                qk_norm: [head_norm(Parameter::QueryNorm)?, head_norm(Parameter::KeyNorm)?],
                o: linear(format, &[Parameter::AttentionOutput], at, blas::Result::Added)?,
                attention_output_norm: block_norm(Parameter::AttentionOutputNorm)?,
                mlp_norm: block_norm(Parameter::MlpNorm)?,
                gate_up: linear(format, &[Parameter::Gate, Parameter::Up], at, blas::Result::Half)?,
                down: linear(format, &[Parameter::Down], at, blas::Result::Added)?,
                mlp_output_norm: block_norm(Parameter::MlpOutputNorm)?,
            });
        }
        let last_norm = norm(find.final_norm(config.scales.logits)?, hidden)?;
        find.all_used()?;
        let frequencies: Vec<f32> = config.inverse_frequencies().concat();
        let rope_factors: Vec<f32> = config.ropes.iter().map(|rope| rope.attention_factor()).collect();
        Ok(Self {
            functions: Functions::new(gpu, half, kv, [format, head_format], &head_name).map_err(fault)?,
            config: config.clone(),
            frequencies: Buffer::of(gpu.launcher.stream(), &frequencies).map_err(fault)?,
            rope_factors: Buffer::of(gpu.launcher.stream(), &rope_factors).map_err(fault)?,
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
        let (rows, half, eps) = (sizes.rows, self.config.rotary_dim / 2, self.config.rms_norm_eps as f32);
        let (x, normed, qkv, q) = (w.x.pointer(), w.normed.pointer(), w.qkv.pointer(), w.q.pointer());
        let (attended, inner, gate_up) = (w.attended.pointer(), w.inner.pointer(), w.gate_up.pointer());
        let scratch = w.scratch.pointer();
        let table = self.embedding.as_ref().unwrap_or(&self.head);
        table.embed(gpu, &f.head_format, [arrays.tokens, x], rows, self.config.embedding_scale() as f32)?;
        if !self.config.ropes.is_empty() {
            let angles = RopeTable {
                positions: arrays.positions,
                frequencies: self.frequencies.pointer(),
                factors: self.rope_factors.pointer(),
                cos: w.cos.pointer(),
                sin: w.sin.pointer(),
                rows: rows as i32,
                half: half as i32,
            };
            gpu.launcher.launch(&f.rope_table, [rows, self.config.ropes.len(), 1], &angles)?;
        }
        for (layer, block) in self.blocks.iter().enumerate() {
            self.queue_norm(gpu, block.attention_norm.as_ref(), [x, normed], Pointer::NULL, rows)?;
            block.qkv.multiply(gpu, &f.format, [normed, qkv, scratch], rows, blas::Result::Half)?;
            let mut norms = block.qk_norm.each_ref().map(pointer_of);
            if self.norms_all_heads() {
                let params = QueryKeyNorm {
                    qkv,
                    query_norm: norms[0],
                    key_norm: norms[1],
                    query_width: (heads * head_dim) as i32,
                    key_width: (kv_heads * head_dim) as i32,
                    stride: block.qkv.outputs() as i32,
                    eps,
                };
                gpu.launcher.launch(&f.query_key_norm, [rows, 2, 1], &params)?;
                norms = [Pointer::NULL; 2];
            }
            let angles = |of: &Buffer| block.rope.map_or(Pointer::NULL, |r| of.pointer().offset(r * rows * half * 4));
            let position = Position {
                qkv,
                query_norm: norms[0],
                key_norm: norms[1],
                cos: angles(&w.cos),
                sin: angles(&w.sin),
                slots: arrays.slots,
                q,
                kv: kv.layer(layer),
                heads: heads as i32,
                kv_heads: kv_heads as i32,
                head_dim: head_dim as i32,
                rotary_dim: 2 * half as i32,
                stride: block.qkv.outputs() as i32,
                eps,
            };
            let across = (heads + 2 * kv_heads).div_ceil(POSITION_HEADS);
            gpu.launcher.launch(&f.position, [rows, across, 1], &position)?;
            layer_queued(layer)?;
            self.queue_attention(gpu, kv.layer(layer), w, sizes, arrays, block.scoring)?;
            self.queue_added(gpu, w, &block.o, block.attention_output_norm.as_ref(), attended, rows)?;

            self.queue_norm(gpu, block.mlp_norm.as_ref(), [x, normed], Pointer::NULL, rows)?;
            block.gate_up.multiply(gpu, &f.format, [normed, gate_up, scratch], rows, blas::Result::Half)?;
            let width = padded(self.config.intermediate_size);
            let gelu = i32::from(self.config.activation == Activation::GeluTanh);
            let gated = GateMul { gate_up, out: inner, width: width as i32, gelu };
            gpu.launcher.launch(&f.gate_mul, [rows, blocks_across(width), 1], &gated)?;
            self.queue_added(gpu, w, &block.down, block.mlp_output_norm.as_ref(), inner, rows)?;
        }
        Ok(())
    }

    /// Whether queries and keys have norms over all heads at once.
    fn norms_all_heads(&self) -> bool {
        self.config.axes_of(Parameter::QueryNorm).is_some_and(|[axis, _]| axis == Axis::QueryHeads)
    }

    /// Queues what a layer's product adds to the residual stream.
    fn queue_added(
        &self,
        gpu: &Gpu,
        w: &Workspace,
        linear: &Linear,
        norm: Option<&Buffer>,
        input: Pointer,
        rows: usize,
    ) -> Result<(), Fault> {
        let (f, x, y, scratch) = (&self.functions, w.x.pointer(), w.added.pointer(), w.scratch.pointer());
        if adds_directly(&self.config) {
            return linear.multiply(gpu, &f.format, [input, x, scratch], rows, blas::Result::Added);
        }
        linear.multiply(gpu, &f.format, [input, y, scratch], rows, blas::Result::Float)?;
        let params = AddNorm {
            y,
            weight: norm.map_or(Pointer::NULL, Buffer::pointer),
            x,
            width: self.config.hidden_size as i32,
            padded: padded(self.config.hidden_size) as i32,
            eps: self.config.rms_norm_eps as f32,
            factor: self.config.scales.residual as f32,
        };
        Ok(gpu.launcher.launch(&f.add_norm, [rows, 1, 1], &params)?)
    }

    /// Queues the logits of `count` rows whose numbers are at `wanted`.
    pub(super) fn queue_logits(&self, gpu: &Gpu, w: &Workspace, wanted: Pointer, count: usize) -> Result<(), Fault> {
        let (normed, logits) = (w.normed.pointer(), w.logits.pointer());
        self.queue_norm(gpu, Some(&self.norm), [w.x.pointer(), normed], wanted, count)?;
        let operands = [normed, logits, w.scratch.pointer()];
        self.head.multiply(gpu, &self.functions.head_format, operands, count, blas::Result::Float)?;
        let Some(cap) = self.config.scales.logit_cap else { return Ok(()) };
        let params = SoftCap { x: logits, count: self.head.outputs() as i32, cap: cap as f32 };
        let across = blocks_across(self.head.outputs());
        Ok(gpu.launcher.launch(&self.functions.soft_cap, [count, across, 1], &params)?)
    }

    fn queue_norm(
        &self,
        gpu: &Gpu,
        weight: Option<&Buffer>,
        [x, out]: [Pointer; 2],
        numbers: Pointer,
        rows: usize,
    ) -> Result<(), Fault> {
        let params = RmsNorm {
            x,
            weight: weight.map_or(Pointer::NULL, Buffer::pointer),
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
        Scoring { window, scale, cap }: Scoring,
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
            window,
            scale,
            cap,
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

fn pointer_of(buffer: &Option<Buffer>) -> Pointer {
    buffer.as_ref().map_or(Pointer::NULL, Buffer::pointer)
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
            gate_mul: of(format!("gate_mul_{t}"))?,
            add_norm: of("add_norm_f32".into())?,
            query_key_norm: of(format!("query_key_norm_{t}"))?,
            soft_cap: of("soft_cap_f32".into())?,
            decode_attention: of(format!("decode_attention_{t}_{kv}_{head}"))?,
            combine: of(format!("combine_{t}"))?,
            prefill_attention: of(format!("prefill_attention_{t}_{kv}_{head}"))?,
            format: FormatKernels::new(gpu, half, format)?,
            head_format: FormatKernels::new(gpu, half, head_format)?,
        })
    }
}
