//! A model on a GPU: weights, KV, activations, and graphs of decode steps.

use std::{collections::HashMap, sync::Arc};

use cudarc::driver::{CudaEvent, sys};
use overfill_kv::{KvDtype, KvStore, OutputToken};
use rayon::prelude::*;

use super::{
    cache::CudaKv,
    decoder::Decoder,
    device::{Fault, Gpu},
    launch::Graph,
    memory::Pinned,
    pack::{Format, Half},
    sampler::Sampler,
    step::{Sizes, StepArrays, table_blocks},
    workspace::{Limits, Workspace},
};
use crate::{
    Choice, DeviceSpec, Engine, LayerSink, LoadOptions, ModelConfig, ModelError, Outputs, Rows, SequenceSlice, Want,
    WeightFormat, Weights, batch, sampler,
};

/// Largest step in tokens. More would not fit in one dimension of a grid.
const MOST_ROWS: usize = 32768;

/// The engine of `--device cuda:N`.
pub(crate) struct CudaEngine {
    index: usize,
    config: ModelConfig,
    limits: Limits,
    /// Tokens that the device has chosen in the last batch, by slice.
    chosen: HashMap<usize, OutputToken>,
    /// `[rows, vocab]` of the other wanted rows of the last batch.
    logits: Vec<f32>,
    downloaded: Pinned<f32>,
    /// An event for each layer: its keys and values are in the cache.
    events: Vec<CudaEvent>,
    /// Captured decode steps, by number of sequences. Dropped before what they use.
    graphs: HashMap<usize, Graph>,
    /// Whether decode steps run as graphs.
    use_graphs: bool,
    arrays: StepArrays,
    sampler: Sampler,
    workspace: Workspace,
    kv: Arc<CudaKv>,
    decoder: Decoder,
    gpu: Gpu,
}

/// The KV cache of an engine that is loaded.
enum KvOf {
    /// A new one.
    New { blocks: usize },
    /// The KV cache of another engine on the same device.
    Other(Arc<CudaKv>),
}

impl CudaEngine {
    /// Copies a model's weights to device `index` and creates a cache of `kv_blocks` blocks there.
    pub(crate) fn load(
        index: usize,
        config: &ModelConfig,
        weights: &Weights,
        options: &LoadOptions,
        kv_blocks: usize,
    ) -> Result<Self, ModelError> {
        Self::load_over(index, config, weights, options, KvOf::New { blocks: kv_blocks })
    }

    /// As [`Self::load`], with a new KV cache or with the KV cache of another engine.
    fn load_over(
        index: usize,
        config: &ModelConfig,
        weights: &Weights,
        options: &LoadOptions,
        kv: KvOf,
    ) -> Result<Self, ModelError> {
        let unsupported = |reason: String| ModelError::Device { device: DeviceSpec::Cuda(index).to_string(), reason };
        let half = activations(options).map_err(unsupported)?;
        let (format, head_format) = Format::of(options.weights, half, index)?;
        if !(1..=MOST_ROWS).contains(&options.max_rows) {
            let reason = format!("steps of {} tokens, supported on GPUs: 1 to {MOST_ROWS}", options.max_rows);
            return Err(unsupported(reason));
        }
        let limits =
            Limits { rows: options.max_rows.max(options.max_sequences), sequences: options.max_sequences.max(1) };
        let fault = |fault: Fault| fault.while_loading(index);
        let gpu = Gpu::open(index, half).map_err(fault)?;
        let decoder = Decoder::load(&gpu, index, config, weights, [format, head_format], half, options.kv_dtype)?;
        let block_bytes = config.heads().block_elements() * options.kv_dtype.size_bytes();
        let workspace = Workspace::new(&gpu, config, limits, decoder.scratch_bytes()).map_err(fault)?;
        let table_blocks = limits.sequences * overfill_kv::blocks_for(config.max_position_embeddings);
        let arrays = StepArrays::new(&gpu, limits.rows, table_blocks).map_err(fault)?;
        let sampler = Sampler::new(&gpu, limits.sequences, config.vocab_size).map_err(fault)?;
        let kv = match kv {
            KvOf::Other(kv) => kv,
            KvOf::New { blocks } => {
                let free_bytes = gpu.free_bytes().map_err(fault)?;
                let needed_bytes = config.num_hidden_layers * blocks * block_bytes;
                if needed_bytes > free_bytes {
                    let fits = free_bytes / (config.num_hidden_layers * block_bytes) * overfill_kv::BLOCK_TOKENS;
                    return Err(unsupported(format!(
                        "the KV cache needs {needed_bytes} bytes, and {free_bytes} are free: --kv-pool-tokens up to {fits} would fit"
                    )));
                }
                Arc::new(CudaKv::new(&gpu, config.num_hidden_layers, blocks, block_bytes).map_err(fault)?)
            }
        };
        let event = |_| Ok::<_, Fault>(gpu.context.new_event(Some(sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC))?);
        let events = (0..config.num_hidden_layers).map(event).collect::<Result<_, _>>().map_err(fault)?;
        let downloaded =
            Pinned::zeroed(&gpu.context, limits.sequences * decoder.logits_stride()).map_err(|e| fault(e.into()))?;
        Ok(Self {
            index,
            config: config.clone(),
            limits,
            chosen: HashMap::new(),
            logits: Vec::new(),
            downloaded,
            events,
            graphs: HashMap::new(),
            use_graphs: true,
            arrays,
            sampler,
            workspace,
            kv,
            decoder,
            gpu,
        })
    }

    /// Checks a batch against the room that was allocated for it.
    fn check_limits(&self, batch: &[SequenceSlice<'_>], sizes: &Sizes) -> Result<(), ModelError> {
        let (blocks, room) = (table_blocks(batch), self.arrays.table_blocks(sizes));
        let checks = [
            ("tokens", sizes.rows, self.limits.rows),
            ("slices of one token", sizes.single, self.limits.sequences),
            ("blocks in tables", blocks, room),
        ];
        match checks.into_iter().find(|(_, count, limit)| count > limit) {
            None => Ok(()),
            Some((what, count, limit)) => Err(ModelError::Device {
                device: DeviceSpec::Cuda(self.index).to_string(),
                reason: format!("a batch has {count} {what}, at most {limit} were allocated"),
            }),
        }
    }

    /// Runs a batch; leaves chosen tokens in `self.chosen`, and the other wanted logits in `self.logits`.
    fn step(&mut self, batch: &[SequenceSlice<'_>], sizes: &Sizes, layers: &dyn LayerSink) -> Result<(), Fault> {
        self.gpu.context.bind_to_thread()?;
        self.chosen.clear();
        self.logits.clear();
        match sizes.is_decode() && sizes.rows <= self.limits.sequences {
            true => self.decode(batch, sizes.rows, layers)?,
            false => self.prefill(batch, sizes, layers)?,
        }
        Ok(())
    }

    /// A step of several tokens per sequence. Layers are announced while later ones are computed.
    fn prefill(&mut self, batch: &[SequenceSlice<'_>], sizes: &Sizes, layers: &dyn LayerSink) -> Result<(), Fault> {
        self.arrays.queue(&self.gpu, batch, sizes)?;
        let at = self.arrays.arrays(sizes);
        self.decoder.queue_layers(&self.gpu, &self.kv, &self.workspace, sizes, &at, |layer| {
            Ok(self.events[layer].record(self.gpu.launcher.stream())?)
        })?;
        for (layer, event) in self.events.iter().enumerate() {
            event.synchronize()?;
            layers.layer_ready(layer);
        }
        let rows = wanted_rows(batch);
        for (i, rows) in rows.chunks(self.limits.sequences).enumerate() {
            let wanted = at.wanted.offset(i * self.limits.sequences * size_of::<i32>());
            self.decoder.queue_logits(&self.gpu, &self.workspace, wanted, rows.len())?;
            self.choose(rows)?;
        }
        Ok(self.gpu.launcher.stream().synchronize()?)
    }

    /// A step of one token per sequence, as one graph: its kernels are short, and launching each would take as long.
    fn decode(&mut self, batch: &[SequenceSlice<'_>], sequences: usize, layers: &dyn LayerSink) -> Result<(), Fault> {
        let rounded = sequences.next_power_of_two().min(self.limits.sequences);
        let sizes = Sizes::decode(rounded);
        self.arrays.queue(&self.gpu, batch, &sizes)?;
        if self.use_graphs && !self.graphs.contains_key(&rounded) {
            let graph = self.capture(&sizes)?;
            self.graphs.insert(rounded, graph);
        }
        match self.graphs.get(&rounded).filter(|_| self.use_graphs) {
            Some(graph) => graph.launch()?,
            None => self.queue_decode(&sizes)?,
        }
        self.choose(&wanted_rows(batch))?;
        (0..self.config.num_hidden_layers).for_each(|layer| layers.layer_ready(layer));
        Ok(())
    }

    /// Captures a decode step. All of its addresses depend on the number of sequences only.
    fn capture(&self, sizes: &Sizes) -> Result<Graph, Fault> {
        self.gpu.launcher.capture(|| self.queue_decode(sizes))
    }

    fn queue_decode(&self, sizes: &Sizes) -> Result<(), Fault> {
        let at = self.arrays.arrays(sizes);
        self.decoder.queue_layers(&self.gpu, &self.kv, &self.workspace, sizes, &at, |_| Ok(()))?;
        self.decoder.queue_logits(&self.gpu, &self.workspace, at.wanted, sizes.wanted)
    }

    /// Chooses tokens on the device, from the rows of logits that are queued, and copies the other rows to the host.
    fn choose(&mut self, rows: &[Option<(usize, Choice<'_>)>]) -> Result<(), Fault> {
        let (stride, stream) = (self.decoder.logits_stride(), self.gpu.launcher.stream());
        let changes =
            rows.par_iter().map(|row| row.map(|(_, choice)| sampler::changes(choice.params, &choice.context)));
        let changes: Vec<_> = changes.collect();
        self.sampler.clear();
        let (mut slices, mut copied) = (Vec::new(), 0);
        for (i, (row, changes)) in rows.iter().zip(&changes).enumerate() {
            match (*row, changes) {
                (Some((slice, choice)), Some(changes)) if self.sampler.add(i, &choice, changes) => slices.push(slice),
                _ => {
                    let (from, to) = (i * stride * size_of::<f32>(), copied * stride);
                    self.workspace.logits.queue_download(stream, from, &mut self.downloaded, to, stride)?;
                    copied += 1;
                }
            }
        }
        self.sampler.queue(&self.gpu, self.workspace.logits.pointer(), stride)?;
        stream.synchronize()?;
        self.chosen.extend(slices.into_iter().zip(self.sampler.chosen()));
        for row in self.downloaded.as_slice().chunks_exact(stride).take(copied) {
            self.logits.extend_from_slice(&row[..self.config.vocab_size]);
        }
        Ok(())
    }
}

/// For each wanted row of a batch, in order: the slice and the choice, if only the slice's next token is wanted.
fn wanted_rows<'a>(batch: &[SequenceSlice<'a>]) -> Vec<Option<(usize, Choice<'a>)>> {
    let mut rows = Vec::new();
    for (i, slice) in batch.iter().enumerate() {
        let count = slice.tokens.len();
        let next = if let Want::Next(choice) = slice.want { Some((i, choice)) } else { None };
        rows.extend((slice.want.first_row(count)..count).map(|_| next));
    }
    rows
}

/// Type of activations. A cache of 16 bits decides; with a cache of 8 bits, the weights decide.
fn activations(options: &LoadOptions) -> Result<Half, String> {
    match (options.kv_dtype, options.weights) {
        (KvDtype::F32, _) => Err("kv is f32, supported on GPUs: bf16, f16 or fp8".into()),
        (KvDtype::Bf16, WeightFormat::F16) => Err("kv is bf16 and weights are f16; use one type for both".into()),
        (KvDtype::F16, WeightFormat::Bf16) => Err("kv is f16 and weights are bf16; use one type for both".into()),
        (KvDtype::F16, _) | (KvDtype::Fp8, WeightFormat::F16) => Ok(Half::F16),
        (KvDtype::Bf16 | KvDtype::Fp8, _) => Ok(Half::Bf16),
    }
}

impl Engine for CudaEngine {
    fn run(
        &mut self,
        batch: &[SequenceSlice<'_>],
        layers: &Arc<dyn LayerSink>,
        out: &mut Outputs,
    ) -> Result<(), ModelError> {
        let vocab_size = self.config.vocab_size;
        batch::check(batch, vocab_size)?;
        let sizes = Sizes::of(batch);
        self.check_limits(batch, &sizes)?;
        self.step(batch, &sizes, &**layers).map_err(|fault| fault.while_serving(self.index))?;
        out.fill_rest(batch, |slice| self.chosen.remove(&slice), &self.logits, vocab_size);
        Ok(())
    }

    fn kv(&self) -> Arc<dyn KvStore> {
        self.kv.clone()
    }

    fn load_sibling(
        &self,
        config: &ModelConfig,
        weights: &Weights,
        options: &LoadOptions,
    ) -> Result<Box<dyn Engine>, ModelError> {
        Ok(Box::new(Self::load_over(self.index, config, weights, options, KvOf::Other(self.kv.clone()))?))
    }

    fn set_rows(&mut self, _: Rows) {
        // The number of rows decides at each product.
    }

    fn set_graphs(&mut self, on: bool) {
        self.use_graphs = on;
    }

    fn weight_bytes(&self) -> Option<usize> {
        Some(self.decoder.weight_bytes())
    }

    fn step_weight_bytes(&self) -> Option<usize> {
        Some(self.decoder.step_weight_bytes())
    }
}
