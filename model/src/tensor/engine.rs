//! An engine built on tensor operations over paged KV: the reference that tests compare other engines with.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use overfill_kv::{KvDtype, KvStore};

use super::{
    cache::TensorKv,
    decoder::{Attention, Decoder, Ops},
};
use crate::{
    Engine, LayerSink, LayerSpec, LoadOptions, ModelConfig, ModelError, Outputs, Rows, SequenceSlice, WeightDtype,
    Weights,
    batch::{self, Slot},
};

/// The reference engine.
pub(crate) struct TensorEngine {
    decoder: Decoder,
    dtype: DType,
    kv: Arc<TensorKv>,
}

fn build(
    config: &ModelConfig,
    weights: &Weights,
    dtype: DType,
    device: &Device,
) -> std::result::Result<Decoder, ModelError> {
    Decoder::build(config, Ops::Fused, dtype, &mut |name, shape| {
        Ok(weights.load(name, shape, device)?.to_dtype(dtype)?)
    })
}

impl TensorEngine {
    /// Loads a model's weights onto `device` and creates a cache of `kv_blocks` blocks there.
    pub(crate) fn load(
        config: &ModelConfig,
        weights: &Weights,
        dtype: WeightDtype,
        device: &Device,
        kv_dtype: KvDtype,
        kv_blocks: usize,
    ) -> std::result::Result<Self, ModelError> {
        let dtype = dtype.dtype();
        let decoder = build(config, weights, dtype, device)?;
        let kv = TensorKv::new(config.num_hidden_layers, kv_blocks, config.heads(), kv_dtype, device)?;
        Ok(Self { decoder, dtype, kv: Arc::new(kv) })
    }

    /// Logits of the rows that the batch requests, `[rows * vocab]`.
    fn forward(&self, batch: &[SequenceSlice<'_>], layers: &dyn LayerSink) -> Result<Vec<f32>> {
        let (mut tokens, mut positions, mut slots, mut rows) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for slice in batch {
            let first = slice.want.first_row(slice.tokens.len());
            rows.extend((first..slice.tokens.len()).map(|i| (tokens.len() + i) as u32));
            tokens.extend_from_slice(slice.tokens);
            let places = slice.start..slice.start + slice.tokens.len();
            positions.extend(places.clone().map(|p| p as u32));
            slots.extend(places.map(|p| Slot::of(slice.blocks, p)));
        }
        let device = self.decoder.device();
        let (n, count) = (tokens.len(), rows.len());
        let tokens = Tensor::from_vec(tokens, n, device)?;
        let mut attention = Paged { kv: &self.kv, batch, slots, layers };
        let hidden = self.decoder.forward(&tokens, &positions, &mut attention, None)?;
        if count == 0 {
            return Ok(Vec::new());
        }
        let wanted = hidden.index_select(&Tensor::from_vec(rows, count, device)?, 0)?;
        self.decoder.logits(&wanted)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
    }
}

impl Engine for TensorEngine {
    fn run(
        &mut self,
        batch: &[SequenceSlice<'_>],
        layers: &Arc<dyn LayerSink>,
        out: &mut Outputs,
    ) -> std::result::Result<(), ModelError> {
        let vocab_size = self.decoder.config().vocab_size;
        batch::check(batch, vocab_size)?;
        let logits = self.forward(batch, &**layers)?;
        out.fill(batch, &logits, vocab_size);
        Ok(())
    }

    fn kv(&self) -> Arc<dyn KvStore> {
        self.kv.clone()
    }

    fn load_sibling(
        &self,
        config: &ModelConfig,
        weights: &Weights,
        _: &LoadOptions,
    ) -> std::result::Result<Box<dyn Engine>, ModelError> {
        let decoder = build(config, weights, self.dtype, self.decoder.device())?;
        Ok(Box::new(Self { decoder, dtype: self.dtype, kv: self.kv.clone() }))
    }

    fn set_rows(&mut self, _: Rows) {
        // Nothing to do: tensor operations do not depend on it.
    }

    fn weight_bytes(&self) -> Option<usize> {
        None
    }

    fn step_weight_bytes(&self) -> Option<usize> {
        None
    }
}

/// Attention over the cache. The batch's own keys and values are written to the cache first.
struct Paged<'a> {
    kv: &'a TensorKv,
    batch: &'a [SequenceSlice<'a>],
    slots: Vec<Slot>,
    layers: &'a dyn LayerSink,
}

impl Attention for Paged<'_> {
    fn attend(&mut self, layer: usize, spec: &LayerSpec, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        self.kv.put(layer, &self.slots, k, v)?;
        self.layers.layer_ready(layer);
        self.kv.attend(layer, spec, self.batch, q)
    }
}
