//! Checks the engine's log-probabilities against the implementation in candle-transformers, over the same stored
//! weights.

pub mod cli;
mod continuation;
mod distance;
mod engine;
mod reference;
mod tensors;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use overfill_kv::KvDtype;
use overfill_model::{ModelConfig, WeightFormat, Weights};
use serde::Serialize;

use crate::{random::Random, train::load_text};
pub use distance::{CLOSE_CALL, Distance};
use engine::Engine;
use reference::Plan;

/// Bound in nats for f32 on both sides. The two sum in different orders, so they differ by rounding.
pub const F32_BOUND: f64 = 0.002;

/// Default prompt lengths in tokens.
const PROMPT_TOKENS: [usize; 6] = [1, 16, 128, 512, 1024, 2048];

/// Settings of a check.
#[derive(Clone, Debug)]
pub struct CheckConfig {
    /// Model that the engine computes: a Hugging Face folder or a .gguf file.
    pub model: PathBuf,
    /// Model that candle-transformers computes. `None` is the same model.
    pub reference: Option<PathBuf>,
    /// Prompt lengths in tokens. By default up to 2,048, limited by the context and the text.
    pub prompt_tokens: Option<Vec<usize>>,
    /// Number of greedy decode steps after each prompt.
    pub decode_tokens: usize,
    /// Text file. Each prompt is the beginning of its text. `None` uses random tokens.
    pub text: Option<PathBuf>,
    /// Seed of the random tokens.
    pub seed: u64,
    /// Weight format of the engine.
    pub weights: WeightFormat,
    /// Type of the engine's KV cache.
    pub kv_dtype: KvDtype,
    /// Greatest allowed difference in nats. The default is [`F32_BOUND`] if both sides compute the same weights in f32,
    /// else no bound.
    pub bound: Option<f64>,
}

/// Verdict of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// All differences are within the bound.
    Pass,
    /// A difference exceeds the bound.
    Fail,
    /// No bound was set.
    NotJudged,
}

/// Result for one prompt and its continuation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PromptReport {
    /// Length of the prompt in tokens.
    pub prompt_tokens: usize,
    /// Distance after the prompt's last token, as a prefill node computes it.
    pub prefill: Distance,
    /// Distances after the tokens of the continuation, as a decode node computes them.
    pub decode: Distance,
}

/// Result of a check.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Model that the engine computed.
    pub model: PathBuf,
    /// Model that the reference computed.
    pub reference: PathBuf,
    /// Name of the implementation in candle-transformers.
    pub implementation: &'static str,
    /// Limitations of this check.
    pub notes: Vec<String>,
    /// Weight format of the engine.
    pub weights: String,
    /// Type of the engine's KV cache.
    pub kv_dtype: String,
    /// Results by prompt.
    pub prompts: Vec<PromptReport>,
    /// Distances over all positions.
    pub total: Distance,
    /// Greatest allowed difference in nats.
    pub bound: Option<f64>,
    /// Verdict by the bound.
    pub verdict: Verdict,
}

/// Runs both sides and compares them. The reference runs first and is dropped, so that only one copy of the weights is
/// in memory at a time. Fails if the models can't be compared.
pub fn check(config: &CheckConfig) -> Result<Report> {
    if let Some(bound) = config.bound {
        ensure!(bound.is_finite() && bound >= 0.0, "--bound must be a finite number of at least 0, got {bound}");
    }
    let reference_path = config.reference.as_ref().unwrap_or(&config.model);
    let reference_config = ModelConfig::from_folder(reference_path)?;
    let plan = Plan::new(reference_path, &reference_config)?;
    let reference_weights = open_weights(reference_path, &reference_config)?;
    let model_config = ModelConfig::from_folder(&config.model)?;
    // Fails now, before the reference computes for minutes.
    open_weights(&config.model, &model_config)?;
    ensure!(
        model_config.vocab_size == reference_config.vocab_size,
        "vocab_size of {} is {}, but vocab_size of {} is {}",
        config.model.display(),
        model_config.vocab_size,
        reference_path.display(),
        reference_config.vocab_size
    );
    // candle-transformers' windows are one token wider than transformers', and ignored while decoding.
    let context = |config: &ModelConfig| {
        config.layers.iter().filter_map(|layer| layer.window).fold(config.max_position_embeddings, usize::min)
    };
    let context = context(&model_config).min(context(&reference_config));
    let (tokens, lengths) = prompts(config, context, model_config.vocab_size)?;
    let longest = tokens.len() + config.decode_tokens;

    tracing::info!(
        reference_bytes = plan.weight_bytes(),
        engine_bytes = engine_bytes(&model_config, config.weights),
        "loading the weights of reference and engine, one after the other"
    );
    let reference = plan.load(reference_weights, longest)?;
    let expected = reference.continuations(&tokens, &lengths, config.decode_tokens)?;
    let mut engine = Engine::load(&config.model, config.weights, config.kv_dtype, longest)?;
    let mut prompts = Vec::new();
    for expected in &expected {
        let prompt_tokens = expected.prompt_tokens;
        let compared = engine.compare(&tokens[..prompt_tokens], expected)?;
        prompts.push(PromptReport { prompt_tokens, prefill: compared.prefill, decode: compared.decode });
    }

    let total = prompts.iter().fold(Distance::default(), |sum, p| sum.with(&p.prefill).with(&p.decode));
    let exact = config.weights == WeightFormat::F32 && config.kv_dtype == KvDtype::F32 && config.reference.is_none();
    let bound = config.bound.or(exact.then_some(F32_BOUND));
    let mut notes = plan.notes.clone();
    if is_gguf(reference_path) {
        notes.push(
            "Overfill read the reference's weights from the GGUF file too, so its GGUF reader is not checked".into(),
        );
    }
    Ok(Report {
        model: config.model.clone(),
        reference: reference_path.clone(),
        implementation: plan.name(),
        notes,
        weights: config.weights.to_string(),
        kv_dtype: config.kv_dtype.to_string(),
        prompts,
        total,
        bound,
        verdict: match bound {
            None => Verdict::NotJudged,
            Some(bound) if total.greatest <= bound => Verdict::Pass,
            Some(_) => Verdict::Fail,
        },
    })
}

/// Opens a model's weights and checks that every tensor exists with the expected shape.
fn open_weights(path: &Path, config: &ModelConfig) -> Result<Weights> {
    let weights = Weights::open(path)?;
    for (name, shape) in config.tensor_shapes() {
        weights.check(&name, &shape)?;
    }
    Ok(weights)
}

/// Returns whether a readable model is a GGUF file, or a folder with one.
fn is_gguf(path: &Path) -> bool {
    !["model.safetensors", "model.safetensors.index.json"].iter().any(|name| path.join(name).exists())
}

/// Returns the tokens of the longest prompt and all prompt lengths, ascending.
fn prompts(config: &CheckConfig, context: usize, vocab_size: usize) -> Result<(Vec<u32>, Vec<usize>)> {
    let room = context.saturating_sub(config.decode_tokens);
    ensure!(room > 0, "--decode-tokens is {}, supported: fewer than the context's {context}", config.decode_tokens);
    let text = match &config.text {
        None => None,
        Some(file) => {
            let text = fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
            let tokens = load_text(&config.model)?.encode(&text, true)?;
            ensure!(!tokens.is_empty(), "{}: no text", file.display());
            Some(tokens)
        }
    };
    let limit = text.as_ref().map_or(room, |tokens| tokens.len().min(room));
    let mut lengths = match &config.prompt_tokens {
        None => PROMPT_TOKENS.map(|n| n.min(limit)).to_vec(),
        Some(lengths) => lengths.clone(),
    };
    lengths.sort_unstable();
    lengths.dedup();
    if let Some(bad) = lengths.iter().find(|n| !(1..=limit).contains(*n)) {
        let of = if limit == room { "the model's context, less --decode-tokens" } else { "the text's tokens" };
        bail!("--prompt-tokens has {bad}, supported: 1 to {limit} ({of})");
    }
    let longest = lengths.last().copied().context("--prompt-tokens is empty, supported: one length or more")?;
    let mut random = Random::new(config.seed, "check");
    let mut tokens = text.unwrap_or_else(|| (0..longest).map(|_| random.below(vocab_size) as u32).collect());
    tokens.truncate(longest);
    Ok((tokens, lengths))
}

/// Estimates the size of the engine's weights in bytes.
fn engine_bytes(config: &ModelConfig, weights: WeightFormat) -> usize {
    // Twice the bits per weight. In Int8 and Int4, 32 weights share a 16-bit scale.
    let half_bits = match weights {
        WeightFormat::F32 => 64,
        WeightFormat::Bf16 | WeightFormat::F16 => 32,
        WeightFormat::Int8 | WeightFormat::Fp8 => 17,
        WeightFormat::Int8Channel => 16,
        WeightFormat::Int4 => 9,
    };
    config.tensor_shapes().iter().map(|(_, shape)| shape.iter().product::<usize>() * half_bits / 16).sum()
}
