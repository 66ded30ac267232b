//! A model, loaded and ready to serve.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use candle_core::Device;
use overfill_kv::{BLOCK_TOKENS, KvDtype, KvSchema};
use overfill_text::{TextError, TextFiles, TextModel, token_ids};
use sha2::{Digest, Sha256};

use crate::{
    Decoder, KvCache, LoadOptions, Logits, ModelConfig, ModelError, Ops, Provenance, Rows, SequenceSlice, Weights,
    batch, cpu::CpuDecoder, cpu::kernels::attention::Heads, gguf::folder_of, tensor::paged, text_files,
};

/// Who computes.
enum Engine {
    /// Kernels of ours.
    Cpu(Box<CpuDecoder>),
    /// The tensor library.
    Device(Box<Decoder>),
}

/// A decoder with all that a node needs to know of it.
pub struct Model {
    folder: PathBuf,
    name: String,
    engine: Engine,
    kv_dtype: KvDtype,
    provenance: Option<Provenance>,
    fingerprint: String,
    tokenizer_sha256: String,
    eos_token_ids: Vec<u32>,
}

impl Model {
    /// Loads a Hugging Face folder or a .gguf file. Configuration and tensor shapes are checked before memory is taken.
    pub fn load(folder: &Path, options: &LoadOptions) -> Result<Self, ModelError> {
        let started = Instant::now();
        let (folder, name) = absolute(folder)?;
        let device = options.device.open()?;
        let config = ModelConfig::from_folder(&folder)?;
        let provenance = Provenance::from_folder(&folder)?;
        check_kept_layers(&folder, &config, provenance.as_ref())?;
        let text = text_files(&folder)?;
        let eos_token_ids = eos_token_ids(&folder, &text, &config)?;
        let weights = Weights::open(&folder)?;
        let engine = match &device {
            Device::Cpu => {
                Engine::Cpu(Box::new(CpuDecoder::load(&config, &weights, options.weights.packed(), options.rows)?))
            }
            device => {
                let dtype = options.weights.dtype().ok_or_else(|| ModelError::Device {
                    device: options.device.to_string(),
                    reason: format!("weights are {}, supported here: f32, bf16, f16", options.weights),
                })?;
                let dtype = dtype.dtype();
                Engine::Device(Box::new(Decoder::build(&config, Ops::Fused, dtype, &mut |name, shape| {
                    Ok(weights.load(name, shape, device)?.to_dtype(dtype)?)
                })?))
            }
        };
        tracing::info!(
            model = %folder.display(), weights = %options.weights, kv = %options.kv_dtype, device = %options.device,
            seconds = started.elapsed().as_secs_f64(), "loaded the model"
        );
        Ok(Self {
            fingerprint: weights.fingerprint()?,
            folder,
            name,
            engine,
            kv_dtype: options.kv_dtype,
            provenance,
            tokenizer_sha256: Sha256::digest(text.tokenizer_json).iter().map(|byte| format!("{byte:02x}")).collect(),
            eos_token_ids,
        })
    }

    /// Its geometry.
    pub fn config(&self) -> &ModelConfig {
        match &self.engine {
            Engine::Cpu(decoder) => decoder.config(),
            Engine::Device(decoder) => decoder.config(),
        }
    }

    /// Bytes of its weights in memory, where they are packed for a CPU.
    pub fn weight_bytes(&self) -> Option<usize> {
        match &self.engine {
            Engine::Cpu(decoder) => Some(decoder.weight_bytes()),
            Engine::Device(_) => None,
        }
    }

    /// Bytes of weights that a decode step reads, where they are packed for a CPU.
    pub fn step_weight_bytes(&self) -> Option<usize> {
        match &self.engine {
            Engine::Cpu(decoder) => Some(decoder.step_weight_bytes()),
            Engine::Device(_) => None,
        }
    }

    /// Takes another role, as if it had been loaded for it: packed weights are the same in all.
    pub fn set_rows(&mut self, rows: Rows) {
        match &mut self.engine {
            Engine::Cpu(decoder) => decoder.set_rows(rows),
            // Tensor operations make no difference.
            Engine::Device(_) => {}
        }
    }

    /// Its folder or .gguf file, absolute.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Name of its folder or file, without `.gguf`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Names exactly these weights; see [`Weights::fingerprint`].
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Ids that end a text: those of generation_config.json, of config.json, and the tokenizer's `eos_token`.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }

    /// Longest sequence in tokens.
    pub fn max_context_tokens(&self) -> usize {
        self.config().max_position_embeddings
    }

    /// What this model's KV is, as a producer of its own (no overfill.json), or as a consumer of the full model's.
    pub fn kv_schema(&self) -> KvSchema {
        let config = self.config();
        let all = || (0..config.num_hidden_layers as u32).collect();
        let (layers, full_model) = match &self.provenance {
            Some(p) => (
                p.kept_layers.clone().unwrap_or_else(all),
                p.full_model.as_ref().and_then(|full| full.fingerprint.clone()),
            ),
            None => (all(), None),
        };
        KvSchema {
            layers,
            kv_heads: config.num_key_value_heads as u32,
            head_dim: config.head_dim as u32,
            rope: config.rope_spec(),
            dtype: self.kv_dtype,
            block_tokens: BLOCK_TOKENS as u32,
            vocab_size: config.vocab_size as u32,
            tokenizer_sha256: self.tokenizer_sha256.clone(),
            full_model,
        }
    }

    /// The schema of the KV that this model computes as the full model of a prefill node.
    pub fn producer_schema(&self) -> KvSchema {
        let layers = (0..self.config().num_hidden_layers as u32).collect();
        KvSchema { layers, full_model: Some(self.fingerprint.clone()), ..self.kv_schema() }
    }

    /// Bytes that one block takes over all layers.
    pub fn block_bytes(&self) -> usize {
        let layers = self.config().num_hidden_layers;
        layers * self.kv_schema().block_bytes()
    }

    /// An empty cache of `num_blocks` blocks for this model.
    pub fn new_cache(&self, num_blocks: usize) -> Result<KvCache, ModelError> {
        let config = self.config();
        let device = match &self.engine {
            Engine::Cpu(_) => &Device::Cpu,
            Engine::Device(decoder) => decoder.device(),
        };
        Ok(KvCache::new(config.num_hidden_layers, num_blocks, heads(config), self.kv_dtype, device)?)
    }

    /// Runs a ragged batch. The KV of every slice's tokens is written into its blocks; `on_layer(l)` is called as soon
    /// as that of layer `l` is there. Logits come for the tokens that the slices ask for.
    pub fn forward(
        &self,
        cache: &KvCache,
        batch: &[SequenceSlice<'_>],
        on_layer: &mut (dyn FnMut(usize) + Send),
        logits: &mut Logits,
    ) -> Result<(), ModelError> {
        batch::check(batch, self.config().vocab_size)?;
        match &self.engine {
            Engine::Cpu(decoder) => decoder.forward(cache, batch, on_layer, logits),
            Engine::Device(decoder) => Ok(paged::forward(decoder, cache, batch, on_layer, logits)?),
        }
    }
}

pub(crate) fn heads(config: &ModelConfig) -> Heads {
    Heads { heads: config.num_attention_heads, kv_heads: config.num_key_value_heads, head_dim: config.head_dim }
}

/// overfill.json must name as many layers as the model has.
fn check_kept_layers(folder: &Path, config: &ModelConfig, p: Option<&Provenance>) -> Result<(), ModelError> {
    let Some(kept) = p.and_then(|p| p.kept_layers.as_ref()) else { return Ok(()) };
    if kept.len() == config.num_hidden_layers {
        return Ok(());
    }
    let supported = format!("as many layers as the configuration's num_hidden_layers ({})", config.num_hidden_layers);
    Err(ModelError::unsupported(
        &folder_of(folder).join(Provenance::FILE),
        "kept_layers",
        format!("{kept:?}"),
        &supported,
    ))
}

/// The path, absolute, and the name that it gives the model. A .gguf file that is a link stays one: what lies beside the
/// link belongs to it.
fn absolute(path: &Path) -> Result<(PathBuf, String), ModelError> {
    let io = |e| ModelError::io(path, e);
    let path = if path.is_file() { std::path::absolute(path) } else { path.canonicalize() }.map_err(io)?;
    let name = if path.is_file() { path.file_stem() } else { path.file_name() };
    let name = name.map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned());
    Ok((path, name))
}

/// Every text file is parsed, though the router is who uses most of them: what is wrong with one ends the start-up here.
fn eos_token_ids(folder: &Path, text: &TextFiles, config: &ModelConfig) -> Result<Vec<u32>, ModelError> {
    let in_folder = |e| match e {
        TextError::Invalid { file, reason } => ModelError::malformed(&folder_of(folder).join(file), reason),
        other => other.into(),
    };
    let text = TextModel::from_files(text).map_err(in_folder)?;
    let mut ids = text.generation_defaults().eos_token_ids.clone();
    let of_config = token_ids("config.json", &config.raw).map_err(in_folder)?;
    for id in of_config.iter().chain(text.eos_token_ids()) {
        if !ids.contains(id) {
            ids.push(*id);
        }
    }
    Ok(ids)
}
