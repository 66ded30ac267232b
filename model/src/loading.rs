//! A loaded model, ready to serve.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use overfill_kv::{BLOCK_TOKENS, KvDtype, KvSchema, KvStore, SchemaMismatch};
use overfill_text::{TextError, TextFiles, TextModel, token_ids};
use sha2::{Digest, Sha256};

use crate::{
    DeviceSpec, Engine, LoadOptions, ModelConfig, ModelError, Provenance, Weights, cpu::CpuEngine, gguf::folder_of,
    text_files,
};

/// A model's metadata, and the engine that runs it.
pub struct Model {
    folder: PathBuf,
    name: String,
    config: ModelConfig,
    engine: Box<dyn Engine>,
    schema: KvSchema,
    fingerprint: String,
    eos_token_ids: Vec<u32>,
}

impl Model {
    /// Loads a Hugging Face folder or a .gguf file, with a KV cache of `kv_blocks` blocks. Checks the configuration and
    /// all tensor shapes before it allocates memory.
    pub fn load(folder: &Path, options: &LoadOptions, kv_blocks: usize) -> Result<Self, ModelError> {
        Self::load_with(folder, options, |config, weights, _| load_engine(config, weights, options, kv_blocks))
    }

    /// Loads another model that shares this one's KV cache: both attend to the same full model's KV, and a block of a prompt is
    /// held once. The engines of the two must not run at the same time.
    ///
    /// # Errors
    /// As [`Self::load`]; or the two models' KV is not the same.
    pub fn load_sibling(&self, folder: &Path, options: &LoadOptions) -> Result<Self, ModelError> {
        let own = self.kv_schema();
        Self::load_with(folder, options, |config, weights, schema| {
            let mismatch = |SchemaMismatch { field, producer, consumer }| {
                let supported = format!("{producer}, as in {}: the two share their KV", self.name);
                ModelError::unsupported(folder, field, consumer, &supported)
            };
            // All layers of both, whichever is named first.
            own.check_consumer(&KvSchema { full_model: None, ..schema.clone() }).map_err(mismatch)?;
            let reverse = KvSchema { layers: schema.layers.clone(), ..own.clone() }.check_consumer(&own);
            reverse.map_err(|e| mismatch(SchemaMismatch { producer: e.consumer, consumer: e.producer, ..e }))?;
            if let (Some(ours), Some(theirs)) = (&own.full_model, &schema.full_model)
                && ours != theirs
            {
                let (producer, consumer) = (ours.clone(), theirs.clone());
                return Err(mismatch(SchemaMismatch { field: "full_model", producer, consumer }));
            }
            self.engine.load_sibling(config, weights, options)
        })
    }

    fn load_with(
        folder: &Path,
        options: &LoadOptions,
        load: impl FnOnce(&ModelConfig, &Weights, &KvSchema) -> Result<Box<dyn Engine>, ModelError>,
    ) -> Result<Self, ModelError> {
        let started = Instant::now();
        let (folder, name) = absolute(folder)?;
        let config = ModelConfig::from_folder(&folder)?;
        let provenance = Provenance::from_folder(&folder)?;
        check_kept_layers(&folder, &config, provenance.as_ref())?;
        let text = text_files(&folder)?;
        let eos_token_ids = eos_token_ids(&folder, &text, &config)?;
        let weights = Weights::open(&folder)?;
        let tokenizer_sha256: String =
            Sha256::digest(text.tokenizer_json).iter().map(|byte| format!("{byte:02x}")).collect();
        let schema = kv_schema(&config, provenance.as_ref(), options.kv_dtype, &tokenizer_sha256);
        let engine = load(&config, &weights, &schema)?;
        tracing::info!(
            model = %folder.display(), weights = %options.weights, kv = %options.kv_dtype, device = %options.device,
            seconds = started.elapsed().as_secs_f64(), "loaded the model"
        );
        Ok(Self { fingerprint: weights.fingerprint()?, folder, name, config, engine, schema, eos_token_ids })
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The engine.
    pub fn engine(&mut self) -> &mut dyn Engine {
        &mut *self.engine
    }

    /// The engine alone, without the metadata.
    pub fn into_engine(self) -> Box<dyn Engine> {
        self.engine
    }

    /// The engine's KV cache.
    pub fn kv(&self) -> Arc<dyn KvStore> {
        self.engine.kv()
    }

    /// Size of the weights in memory, in bytes; `None` if the engine does not know.
    pub fn weight_bytes(&self) -> Option<usize> {
        self.engine.weight_bytes()
    }

    /// Bytes of weights that a decode step reads; `None` if the engine does not know.
    pub fn step_weight_bytes(&self) -> Option<usize> {
        self.engine.step_weight_bytes()
    }

    /// Absolute path of the folder or .gguf file.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Name of the folder or file, without `.gguf`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Identifier of the weights; see [`Weights::fingerprint`].
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Ids of the tokens that end a text: those from generation_config.json and config.json, and the tokenizer's
    /// `eos_token`.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }

    /// Maximum sequence length in tokens.
    pub fn max_context_tokens(&self) -> usize {
        self.config.max_position_embeddings
    }

    /// Schema of this model's KV. If overfill.json names a full model, the model consumes that model's KV; otherwise its own.
    pub fn kv_schema(&self) -> KvSchema {
        self.schema.clone()
    }

    /// Schema of the KV that this model produces as the full model on a prefill node.
    pub fn producer_schema(&self) -> KvSchema {
        let layers = (0..self.config.num_hidden_layers as u32).collect();
        KvSchema { layers, full_model: Some(self.fingerprint.clone()), ..self.kv_schema() }
    }

    /// Size of one block over all layers, in bytes.
    pub fn block_bytes(&self) -> usize {
        let layers = self.config.num_hidden_layers;
        layers * self.schema.block_bytes()
    }
}

fn kv_schema(
    config: &ModelConfig,
    provenance: Option<&Provenance>,
    dtype: KvDtype,
    tokenizer_sha256: &str,
) -> KvSchema {
    let all = || (0..config.num_hidden_layers as u32).collect();
    let (layers, full_model) = match provenance {
        Some(p) => {
            (p.kept_layers.clone().unwrap_or_else(all), p.full_model.as_ref().and_then(|full| full.fingerprint.clone()))
        }
        None => (all(), None),
    };
    KvSchema {
        layers,
        kv_heads: config.num_key_value_heads as u32,
        head_dim: config.head_dim as u32,
        rope: config.rope_spec(),
        layer_attention: config.layer_attention(),
        dtype,
        block_tokens: BLOCK_TOKENS as u32,
        vocab_size: config.vocab_size as u32,
        tokenizer_sha256: tokenizer_sha256.to_owned(),
        full_model,
    }
}

/// The engine of the requested device.
fn load_engine(
    config: &ModelConfig,
    weights: &Weights,
    options: &LoadOptions,
    kv_blocks: usize,
) -> Result<Box<dyn Engine>, ModelError> {
    match options.device {
        DeviceSpec::Cpu => {
            let LoadOptions { weights: format, rows, kv_dtype, .. } = *options;
            Ok(Box::new(CpuEngine::load(config, weights, format, rows, kv_dtype, kv_blocks)?))
        }
        #[cfg(feature = "cuda")]
        DeviceSpec::Cuda(index) => {
            Ok(Box::new(crate::cuda::CudaEngine::load(index, config, weights, options, kv_blocks)?))
        }
        #[cfg(not(feature = "cuda"))]
        DeviceSpec::Cuda(index) => Err(ModelError::no_gpu_support(index)),
    }
}

/// Checks that overfill.json lists as many layers as the model has.
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

/// The absolute path, and the model's name derived from it. A link to a .gguf file is not resolved: the files next to
/// the link belong to the model.
fn absolute(path: &Path) -> Result<(PathBuf, String), ModelError> {
    let io = |e| ModelError::io(path, e);
    let path = if path.is_file() { std::path::absolute(path) } else { path.canonicalize() }.map_err(io)?;
    let name = if path.is_file() { path.file_stem() } else { path.file_name() };
    let name = name.map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned());
    Ok((path, name))
}

/// Collects the end-of-text ids. It parses every text file, although mainly the router uses them, so that an invalid
/// file fails at start-up.
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
