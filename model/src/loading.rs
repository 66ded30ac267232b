//! A model, loaded and ready to serve.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use candle_core::Device;
use overfill_kv::{BLOCK_TOKENS, KvDtype, KvSchema, KvStore};
use overfill_text::{TextError, TextFiles, TextModel, token_ids};
use sha2::{Digest, Sha256};

use crate::{
    Engine, LoadOptions, ModelConfig, ModelError, Provenance, Weights, cpu::CpuEngine, gguf::folder_of,
    tensor::TensorEngine, text_files,
};

/// What a node needs to know of a model, and the engine that runs it.
pub struct Model {
    folder: PathBuf,
    name: String,
    config: ModelConfig,
    engine: Box<dyn Engine>,
    kv_dtype: KvDtype,
    provenance: Option<Provenance>,
    fingerprint: String,
    tokenizer_sha256: String,
    eos_token_ids: Vec<u32>,
}

impl Model {
    /// Loads a Hugging Face folder or a .gguf file, with a KV cache of `kv_blocks` blocks. Configuration and tensor shapes
    /// are checked before memory is taken.
    pub fn load(folder: &Path, options: &LoadOptions, kv_blocks: usize) -> Result<Self, ModelError> {
        let started = Instant::now();
        let (folder, name) = absolute(folder)?;
        let device = options.device.open()?;
        let config = ModelConfig::from_folder(&folder)?;
        let provenance = Provenance::from_folder(&folder)?;
        check_kept_layers(&folder, &config, provenance.as_ref())?;
        let text = text_files(&folder)?;
        let eos_token_ids = eos_token_ids(&folder, &text, &config)?;
        let weights = Weights::open(&folder)?;
        let engine: Box<dyn Engine> = match &device {
            Device::Cpu => Box::new(CpuEngine::load(
                &config,
                &weights,
                options.weights,
                options.rows,
                options.kv_dtype,
                kv_blocks,
            )?),
            device => {
                let dtype = options.weights.dtype().ok_or_else(|| ModelError::Device {
                    device: options.device.to_string(),
                    reason: format!("weights are {}, supported here: f32, bf16, f16", options.weights),
                })?;
                Box::new(TensorEngine::load(&config, &weights, dtype, device, options.kv_dtype, kv_blocks)?)
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
            config,
            engine,
            kv_dtype: options.kv_dtype,
            provenance,
            tokenizer_sha256: Sha256::digest(text.tokenizer_json).iter().map(|byte| format!("{byte:02x}")).collect(),
            eos_token_ids,
        })
    }

    /// Its geometry.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What computes.
    pub fn engine(&mut self) -> &mut dyn Engine {
        &mut *self.engine
    }

    /// What computes, without what is known of the model.
    pub fn into_engine(self) -> Box<dyn Engine> {
        self.engine
    }

    /// The KV cache of its engine.
    pub fn kv(&self) -> Arc<dyn KvStore> {
        self.engine.kv()
    }

    /// Bytes of its weights in memory; `None` where the engine does not know.
    pub fn weight_bytes(&self) -> Option<usize> {
        self.engine.weight_bytes()
    }

    /// Bytes of weights that a decode step reads; `None` where the engine does not know.
    pub fn step_weight_bytes(&self) -> Option<usize> {
        self.engine.step_weight_bytes()
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
        self.config.max_position_embeddings
    }

    /// What this model's KV is, as a producer of its own (no overfill.json), or as a consumer of the full model's.
    pub fn kv_schema(&self) -> KvSchema {
        let config = &self.config;
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
        let layers = (0..self.config.num_hidden_layers as u32).collect();
        KvSchema { layers, full_model: Some(self.fingerprint.clone()), ..self.kv_schema() }
    }

    /// Bytes that one block takes over all layers.
    pub fn block_bytes(&self) -> usize {
        let layers = self.config.num_hidden_layers;
        layers * self.kv_schema().block_bytes()
    }
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
