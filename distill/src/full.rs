//! The frozen full model, whose KV of prompts a student learns to use.

use std::{collections::HashMap, path::Path, sync::Arc};

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use overfill_kv::{BLOCK_TOKENS, BlockId, KvDtype, blocks_for};
use overfill_model::{
    Decoder, DeviceSpec, Engine, LoadOptions, Model, ModelConfig, ModelError, Outputs, Rows, SequenceSlice, Want,
    WeightFormat, Weights, no_layers,
};

use crate::{attention::PromptKv, batch::prefill, train::load_frozen};

/// Most prompt tokens of one step of the engine.
const STEP_TOKENS: usize = 2048;

/// The full model: on CPUs as nodes serve it, on GPUs with candle's operations.
pub enum Full {
    /// The serving engine.
    Served(Box<Served>),
    /// A decoder of tensors.
    Dense(Box<Decoder>),
}

impl Full {
    /// Loads the full model. On CPUs, `weights` is its weight format, prompts have up to `longest_tokens` tokens, and up to
    /// `cache_bytes` of their KV are kept. `dtype` is the type of the computation on other devices.
    pub fn load(
        folder: &Path,
        device: DeviceSpec,
        dtype: DType,
        weights: WeightFormat,
        longest_tokens: usize,
        cache_bytes: usize,
    ) -> Result<Self> {
        Ok(match device {
            DeviceSpec::Cpu => Self::Served(Box::new(Served::load(folder, weights, longest_tokens, cache_bytes)?)),
            DeviceSpec::Cuda(_) => Self::Dense(Box::new(load_frozen(folder, dtype, &device.open()?)?)),
        })
    }

    /// The full model's configuration.
    pub fn config(&self) -> &ModelConfig {
        match self {
            Self::Served(served) => &served.config,
            Self::Dense(decoder) => decoder.config(),
        }
    }

    /// Keys and values of prompts in the layers `kept`; `None`: all.
    pub fn prefill(&mut self, prompts: &[&[u32]], kept: Option<&[u32]>, dtype: DType) -> Result<PromptKv> {
        match self {
            Self::Dense(decoder) => Ok(prefill(decoder, prompts)?.select(kept)?),
            Self::Served(served) => served.prefill(prompts, kept, dtype),
        }
    }
}

/// The weight format that a checkpoint is trained under unless another one is asked for: its own type, where the engine has
/// it.
pub fn weights_of(folder: &Path) -> Result<WeightFormat> {
    let name = "model.embed_tokens.weight";
    Ok(match Weights::open(folder)?.info(name).map(|info| info.dtype) {
        Some(safetensors::Dtype::F32) => WeightFormat::F32,
        Some(safetensors::Dtype::F16) => WeightFormat::F16,
        _ => WeightFormat::Bf16,
    })
}

/// Keys and values of one prompt, by layer: `[tokens, K|V, kv_heads, head_dim]` in the engine's type.
type Stored = Arc<Vec<Vec<u8>>>;

/// The serving engine, and the KV of prompts that it has computed.
pub struct Served {
    engine: Box<dyn Engine>,
    config: ModelConfig,
    kv_dtype: KvDtype,
    blocks: u32,
    outputs: Outputs,
    cache: PromptCache,
}

impl Served {
    fn load(folder: &Path, weights: WeightFormat, longest_tokens: usize, cache_bytes: usize) -> Result<Self> {
        // The type in which nodes keep KV unless told otherwise. With f32 weights, nothing is rounded.
        let kv_dtype = if weights == WeightFormat::F32 { KvDtype::F32 } else { KvDtype::Bf16 };
        let options = LoadOptions { weights, kv_dtype, rows: Rows::Many, ..LoadOptions::default() };
        // A step has one long prompt, or short ones, each of which may leave most of a block empty.
        let blocks = blocks_for(longest_tokens).max(2 * blocks_for(STEP_TOKENS));
        let model = Model::load(folder, &options, blocks)?;
        Ok(Self {
            config: model.config().clone(),
            engine: model.into_engine(),
            kv_dtype,
            blocks: blocks as u32,
            outputs: Outputs::default(),
            cache: PromptCache::new(cache_bytes),
        })
    }

    fn prefill(&mut self, prompts: &[&[u32]], kept: Option<&[u32]>, dtype: DType) -> Result<PromptKv> {
        let mut stored: Vec<Option<Stored>> = prompts.iter().map(|prompt| self.cache.get(prompt)).collect();
        // Prompts that a step computes together.
        let (mut step, mut tokens) = (Vec::new(), 0);
        for (i, prompt) in prompts.iter().enumerate().filter(|(i, _)| stored[*i].is_none()).collect::<Vec<_>>() {
            if !step.is_empty() && tokens + prompt.len().next_multiple_of(BLOCK_TOKENS) > STEP_TOKENS {
                self.compute(prompts, &std::mem::take(&mut step), &mut stored)?;
                tokens = 0;
            }
            step.push(i);
            tokens += prompt.len().next_multiple_of(BLOCK_TOKENS);
        }
        self.compute(prompts, &step, &mut stored)?;
        let stored: Vec<Stored> = stored.into_iter().flatten().collect();
        let layers: Vec<usize> = match kept {
            Some(kept) => kept.iter().map(|layer| *layer as usize).collect(),
            None => (0..self.config.num_hidden_layers).collect(),
        };
        let lengths: Vec<usize> = prompts.iter().map(|prompt| prompt.len()).collect();
        let layers =
            layers.into_iter().map(|layer| self.tensors(&stored, &lengths, layer, dtype)).collect::<Result<_>>()?;
        Ok(PromptKv { layers, lengths })
    }

    /// Computes the prompts with the indices `step`.
    fn compute(&mut self, prompts: &[&[u32]], step: &[usize], stored: &mut [Option<Stored>]) -> Result<()> {
        let mut free = 0..self.blocks;
        let blocks: Vec<Vec<BlockId>> =
            step.iter().map(|i| free.by_ref().take(blocks_for(prompts[*i].len())).map(BlockId).collect()).collect();
        // More than one chunk is needed only if a step has one prompt.
        let chunks = step.iter().map(|i| prompts[*i].len().div_ceil(STEP_TOKENS)).max().unwrap_or(0);
        for chunk in 0..chunks {
            let start = chunk * STEP_TOKENS;
            let slice = |(i, blocks): (&usize, _)| {
                let prompt = prompts[*i];
                let tokens = &prompt[start..prompt.len().min(start + STEP_TOKENS)];
                SequenceSlice { tokens, start, blocks, want: Want::Nothing }
            };
            let batch: Vec<SequenceSlice<'_>> = step.iter().zip(blocks.iter().map(Vec::as_slice)).map(slice).collect();
            self.engine.run(&batch, &no_layers(), &mut self.outputs)?;
        }
        for (i, blocks) in step.iter().zip(&blocks) {
            let kv: Stored = Arc::new(self.read(blocks, prompts[*i].len())?);
            self.cache.put(prompts[*i], &kv);
            stored[*i] = Some(kv);
        }
        Ok(())
    }

    /// Reads the KV of one prompt.
    fn read(&self, blocks: &[BlockId], tokens: usize) -> Result<Vec<Vec<u8>>, ModelError> {
        let (kv, heads) = (self.engine.kv(), 2 * self.config.num_key_value_heads);
        let row = self.config.head_dim * self.kv_dtype.size_bytes();
        let of_layer = |layer| {
            let mut all = vec![0; tokens * heads * row];
            kv.read(layer, blocks, &mut |i, bytes| {
                // [K|V, kv_heads, 16, head_dim]
                for (head, bytes) in bytes.chunks_exact(BLOCK_TOKENS * row).enumerate() {
                    for (t, bytes) in bytes.chunks_exact(row).enumerate().take(tokens - i * BLOCK_TOKENS) {
                        let at = ((i * BLOCK_TOKENS + t) * heads + head) * row;
                        all[at..at + row].copy_from_slice(bytes);
                    }
                }
            })
            .map_err(candle_core::Error::wrap)?;
            Ok(all)
        };
        (0..self.config.num_hidden_layers).map(of_layer).collect()
    }

    /// Keys and values of one layer of all prompts.
    fn tensors(&self, stored: &[Stored], lengths: &[usize], layer: usize, dtype: DType) -> Result<(Tensor, Tensor)> {
        let parts = stored.iter().map(|kv| kv.get(layer).map(Vec::as_slice));
        let bytes = parts.collect::<Option<Vec<_>>>().with_context(|| {
            format!("kept_layers names layer {layer}, the full model has {}", self.config.num_hidden_layers)
        })?;
        let from = if self.kv_dtype == KvDtype::F32 { DType::F32 } else { DType::BF16 };
        let (heads, width) = (self.config.num_key_value_heads, self.config.head_dim);
        let shape = [lengths.iter().sum(), 2, heads, width];
        let all = Tensor::from_raw_buffer(&bytes.concat(), from, &shape, &Device::Cpu)?;
        let part = |i| all.narrow(1, i, 1)?.squeeze(1)?.contiguous()?.to_dtype(dtype);
        Ok((part(0)?, part(1)?))
    }
}

/// KV of prompts, by their tokens. The prompt that was used longest ago leaves first.
struct PromptCache {
    most_bytes: usize,
    bytes: usize,
    /// With the time of its last use.
    prompts: HashMap<Vec<u32>, (u64, Stored)>,
    time: u64,
}

impl PromptCache {
    fn new(most_bytes: usize) -> Self {
        Self { most_bytes, bytes: 0, prompts: HashMap::new(), time: 0 }
    }

    fn size(kv: &Stored) -> usize {
        kv.iter().map(Vec::len).sum()
    }

    fn get(&mut self, prompt: &[u32]) -> Option<Stored> {
        self.time += 1;
        let (used, kv) = self.prompts.get_mut(prompt)?;
        *used = self.time;
        Some(kv.clone())
    }

    fn put(&mut self, prompt: &[u32], kv: &Stored) {
        let size = Self::size(kv);
        if size > self.most_bytes || self.prompts.contains_key(prompt) {
            return;
        }
        while self.bytes + size > self.most_bytes {
            let oldest = self.prompts.iter().min_by_key(|(_, (used, _))| *used).map(|(prompt, _)| prompt.clone());
            let Some((_, kv)) = oldest.and_then(|prompt| self.prompts.remove(&prompt)) else { break };
            self.bytes -= Self::size(&kv);
        }
        self.time += 1;
        self.bytes += size;
        self.prompts.insert(prompt.to_vec(), (self.time, kv.clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kv(bytes: usize) -> Stored {
        Arc::new(vec![vec![0; bytes / 2], vec![0; bytes - bytes / 2]])
    }

    #[test]
    fn the_cache_keeps_to_its_bytes_and_drops_what_was_used_longest_ago() {
        let mut cache = PromptCache::new(100);
        cache.put(&[1], &kv(40));
        cache.put(&[2], &kv(40));
        assert!(cache.get(&[1]).is_some());
        cache.put(&[3], &kv(30));
        assert!(cache.get(&[2]).is_none() && cache.get(&[1]).is_some() && cache.get(&[3]).is_some());
        assert_eq!(cache.bytes, 70);
        cache.put(&[4], &kv(101));
        assert!(cache.get(&[4]).is_none() && cache.bytes == 70);
        assert!(PromptCache::new(0).get(&[1]).is_none());
    }

    /// The engine computes the same KV as the dense decoder, in one step and in several. The cache returns the same KV again.
    #[test]
    fn the_engine_prefills_as_the_decoder_does() {
        for pair in ["llama-tied", "gemma3", "phi3"] {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(pair).join("full");
            let vocab = ModelConfig::from_folder(&folder).unwrap().vocab_size as u32;
            let prompt = |n: u32| (0..n).map(|i| (i * 7 + n) % vocab).collect::<Vec<u32>>();
            // More tokens together than one step has, and one prompt of more than a step.
            let prompts = [prompt(40), prompt(1100), prompt(1000), prompt(2100), prompt(1)];
            let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
            let dense = load_frozen(&folder, DType::F32, &Device::Cpu).unwrap();
            let expected = prefill(&dense, &prompts).unwrap().select(Some(&[1])).unwrap();
            let mut full =
                Full::load(&folder, DeviceSpec::Cpu, DType::F32, WeightFormat::F32, 2100, usize::MAX).unwrap();
            let first = full.prefill(&prompts, Some(&[1]), DType::F32).unwrap();
            let again = full.prefill(&prompts, Some(&[1]), DType::F32).unwrap();
            assert_eq!(first.lengths, expected.lengths);
            let gap = |a: &Tensor, b: &Tensor| {
                (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap()
            };
            for ((k, v), of) in [(&first.layers[0], &expected.layers[0]), (&again.layers[0], &first.layers[0])] {
                let bound = if std::ptr::eq(of, &first.layers[0]) { f32::MIN_POSITIVE } else { 2e-3 };
                assert!(gap(k, &of.0) < bound && gap(v, &of.1) < bound, "{pair}");
            }
            assert!(full.prefill(&prompts, Some(&[99]), DType::F32).is_err());
        }
    }
}
