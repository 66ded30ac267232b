//! Is a model computed right? Our engine's log-probabilities against those of candle-transformers' own implementation of
//! the family, over the same stored weights.

pub mod cli;
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

/// Greatest distance of a log-probability, in nats, that f32 arithmetic in another order may leave.
pub const F32_BOUND: f64 = 0.002;

/// Prompt lengths where none are asked for.
const PROMPT_TOKENS: [usize; 6] = [1, 16, 128, 512, 1024, 2048];

/// What is compared.
#[derive(Clone, Debug)]
pub struct CheckConfig {
    /// Model that our engine computes: a Hugging Face folder or a .gguf file.
    pub model: PathBuf,
    /// Model that candle-transformers computes; the same one by default.
    pub reference: Option<PathBuf>,
    /// Prompt lengths in tokens; by default up to 2,048, as far as context and text reach.
    pub prompt_tokens: Option<Vec<usize>>,
    /// Greedy steps after each prompt.
    pub decode_tokens: usize,
    /// Text that the prompts are the beginning of; random tokens by default.
    pub text: Option<PathBuf>,
    /// Seed of the random tokens.
    pub seed: u64,
    /// How our engine's weights lie in memory.
    pub weights: WeightFormat,
    /// Type of its KV.
    pub kv_dtype: KvDtype,
    /// Greatest distance that passes; by default [`F32_BOUND`] where both sides compute the same weights in f32, else none.
    pub bound: Option<f64>,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// No distance is above the bound.
    Pass,
    /// One is.
    Fail,
    /// There is no bound.
    NotJudged,
}

/// One prompt and its continuation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PromptReport {
    /// Its length.
    pub prompt_tokens: usize,
    /// After its last token, as a prefill node computes it.
    pub prefill: Distance,
    /// After each token of the continuation, as a decode node computes it.
    pub decode: Distance,
}

/// What a check found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Model of our engine.
    pub model: PathBuf,
    /// Model of the reference.
    pub reference: PathBuf,
    /// The implementation in candle-transformers.
    pub implementation: &'static str,
    /// What else a reader should know.
    pub notes: Vec<String>,
    /// Type of our engine's weights.
    pub weights: String,
    /// Type of its KV.
    pub kv_dtype: String,
    /// By prompt.
    pub prompts: Vec<PromptReport>,
    /// Over all positions.
    pub total: Distance,
    /// What it was judged by.
    pub bound: Option<f64>,
    /// The judgement.
    pub verdict: Verdict,
}

/// Runs both sides. The reference goes first and is dropped, so that only one copy of the weights is in memory at a time.
/// Errors are of what can't be compared.
pub fn check(config: &CheckConfig) -> Result<Report> {
    if let Some(bound) = config.bound {
        ensure!(bound.is_finite() && bound >= 0.0, "--bound must be a finite number of at least 0, got {bound}");
    }
    let reference_path = config.reference.as_ref().unwrap_or(&config.model);
    let reference_config = ModelConfig::from_folder(reference_path)?;
    let plan = Plan::new(reference_path, &reference_config)?;
    let reference_weights = open_weights(reference_path, &reference_config)?;
    let model_config = ModelConfig::from_folder(&config.model)?;
    // Before the reference computes for minutes.
    open_weights(&config.model, &model_config)?;
    ensure!(
        model_config.vocab_size == reference_config.vocab_size,
        "vocab_size of {} is {}, supported: that of {} ({})",
        config.model.display(),
        model_config.vocab_size,
        reference_path.display(),
        reference_config.vocab_size
    );
    let context = model_config.max_position_embeddings.min(reference_config.max_position_embeddings);
    let (tokens, lengths) = prompts(config, context, model_config.vocab_size)?;
    let longest = tokens.len() + config.decode_tokens;

    tracing::info!(
        reference_bytes = plan.weight_bytes(),
        engine_bytes = engine_bytes(&model_config, config.weights),
        "weights of each side, in memory one after the other"
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
            "the reference's weights were read out of the GGUF file by Overfill too: that reader is not checked".into(),
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

/// A model's weights, every tensor of which is there.
fn open_weights(path: &Path, config: &ModelConfig) -> Result<Weights> {
    let weights = Weights::open(path)?;
    for (name, shape) in config.tensor_shapes() {
        weights.check(&name, &shape)?;
    }
    Ok(weights)
}

/// Is a model that could be read a GGUF file, or a folder that holds one?
fn is_gguf(path: &Path) -> bool {
    !["model.safetensors", "model.safetensors.index.json"].iter().any(|name| path.join(name).exists())
}

/// Tokens of the longest prompt, and the lengths of all, ascending.
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

/// About what the engine's weights take.
fn engine_bytes(config: &ModelConfig, weights: WeightFormat) -> usize {
    // Half bits: 32 weights share a scale of 16 bits.
    let half_bits = match weights {
        WeightFormat::F32 => 64,
        WeightFormat::Bf16 | WeightFormat::F16 => 32,
        WeightFormat::Int8 => 17,
        WeightFormat::Int8Channel => 16,
        WeightFormat::Int4 => 9,
    };
    config.tensor_shapes().iter().map(|(_, shape)| shape.iter().product::<usize>() * half_bits / 16).sum()
}
