//! A model on the CPU: packed weights, KV in host memory, and the workspace of a step.

use std::sync::Arc;

use overfill_kv::{KvDtype, KvStore};

use super::{cache::CpuKv, decoder::CpuDecoder, kernels::packed::WeightFormat, team, workspace::Workspace};
use crate::{
    DeviceSpec, Engine, LayerSink, LoadOptions, ModelConfig, ModelError, Outputs, Rows, SequenceSlice, Weights, batch,
};

/// Reading this many bytes of weights takes about a millisecond, which makes waking all threads worthwhile.
const WORTH_WAKING_BYTES: usize = 32 << 20;

/// The engine of `--device cpu`.
pub(crate) struct CpuEngine {
    decoder: CpuDecoder,
    kv: Arc<CpuKv>,
    workspace: Workspace,
    /// `[requested rows, vocab]` of the last batch.
    logits: Vec<f32>,
}

impl CpuEngine {
    /// Packs a model's weights and creates a cache of `kv_blocks` blocks. `rows`: number of rows per product to
    /// optimise for.
    pub(crate) fn load(
        config: &ModelConfig,
        weights: &Weights,
        format: WeightFormat,
        rows: Rows,
        kv_dtype: KvDtype,
        kv_blocks: usize,
    ) -> Result<Self, ModelError> {
        if format == WeightFormat::Fp8 || kv_dtype == KvDtype::Fp8 {
            let reason = format!("weights are {format} and kv is {kv_dtype}; fp8 is supported on GPUs only");
            return Err(ModelError::Device { device: DeviceSpec::Cpu.to_string(), reason });
        }
        let decoder = CpuDecoder::load(config, weights, format, rows)?;
        let kv = CpuKv::new(config.num_hidden_layers, kv_blocks, config.heads(), kv_dtype)?;
        Ok(Self::new(decoder, Arc::new(kv)))
    }

    fn new(decoder: CpuDecoder, kv: Arc<CpuKv>) -> Self {
        Self { decoder, kv, workspace: Workspace::default(), logits: Vec::new() }
    }
}

impl Engine for CpuEngine {
    fn run(
        &mut self,
        batch: &[SequenceSlice<'_>],
        layers: &Arc<dyn LayerSink>,
        out: &mut Outputs,
    ) -> Result<(), ModelError> {
        let Self { decoder, kv, workspace, logits } = self;
        let vocab_size = decoder.config().vocab_size;
        batch::check(batch, vocab_size)?;
        team::run(decoder.weight_bytes() >= WORTH_WAKING_BYTES, || {
            decoder.run(kv, batch, &**layers, logits, workspace);
            out.fill(batch, logits, vocab_size);
        });
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
        let decoder = CpuDecoder::load(config, weights, options.weights, options.rows)?;
        Ok(Box::new(Self::new(decoder, self.kv.clone())))
    }

    fn set_rows(&mut self, rows: Rows) {
        self.decoder.set_rows(rows);
    }

    fn weight_bytes(&self) -> Option<usize> {
        Some(self.decoder.weight_bytes())
    }

    fn step_weight_bytes(&self) -> Option<usize> {
        Some(self.decoder.step_weight_bytes())
    }
}
