//! Fine-tuning of a student, alone or over the KV of a frozen full model.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor, Var};
use indicatif::{ProgressBar, ProgressStyle};
use overfill_model::{
    Decoder, DeviceSpec, Kind, ModelConfig, Ops, Parameter, Provenance, TensorSpec, WeightDtype, WeightFormat, Weights,
};
use overfill_text::TextModel;
use serde_json::json;

use crate::{
    attention::{PromptKv, RaggedAttention},
    batch::{Flat, pick, respond},
    checkpoint::{self, LossLog},
    data::{self, Example},
    folder,
    full::{Full, weights_of},
    optim::{AdamW, Gradients, OptimConfig, Params},
    random::Random,
};

/// Settings of a training run.
#[derive(Clone, Debug)]
pub struct TrainConfig {
    /// Folder of the model to train.
    pub student: PathBuf,
    /// Starts from random weights. Only the student's configuration and tokenizer are read.
    pub random_init: bool,
    /// Folder of the frozen full model that prefills every prompt. `None` trains the student alone.
    pub full: Option<PathBuf>,
    /// Weight format of the full model on CPUs: f32, bf16 or f16. `None` is its checkpoint's own type.
    pub full_weights: Option<WeightFormat>,
    /// Most bytes of prompt KV kept for prompts that come again, on CPUs. 0 keeps none.
    pub prompt_cache_bytes: usize,
    /// JSONL file of examples.
    pub data: PathBuf,
    /// Folder to write the trained model to.
    pub out: PathBuf,
    /// Examples per forward pass.
    pub batch: usize,
    /// Forward passes per step.
    pub accumulate: usize,
    /// Maximum length of an example in tokens. Longer ones are cut.
    pub max_tokens: usize,
    /// Seed for the order of examples and for random weights.
    pub seed: u64,
    /// Whether to take examples in random order instead of the file's order.
    pub shuffle: bool,
    /// Type of the computation. Parameters and optimiser state are always f32.
    pub dtype: WeightDtype,
    /// Type of the written weights.
    pub save_dtype: WeightDtype,
    /// Device that trains.
    pub device: DeviceSpec,
    /// Optimiser and schedule. `total_steps` is the length of the run.
    pub optim: OptimConfig,
    /// Steps between checkpoints. 0 writes none.
    pub checkpoint_every: usize,
    /// Continues from the newest checkpoint in `out`.
    pub resume: bool,
    /// Stops after this step. The learning-rate schedule still covers `total_steps`.
    pub stop_after: Option<usize>,
    /// Whether to draw a progress bar.
    pub progress: bool,
}

/// Result of a training run.
#[derive(Clone, Debug, PartialEq)]
pub struct Trained {
    /// Mean loss in nats per token over the last steps (at most 20).
    pub loss: f64,
    /// Number of target tokens in the loss.
    pub learned_tokens: u64,
    /// Seconds spent in training steps by this process.
    pub seconds: f64,
}

impl TrainConfig {
    /// Returns all settings that determine the result, for checkpoints and overfill.json. `full_weights` is the weight format
    /// that the full model has been loaded in.
    fn describe(&self, full_weights: Option<WeightFormat>) -> serde_json::Value {
        json!({
            "mode": if self.full.is_some() { "overfill" } else { "plain" },
            "full_weights": full_weights.map(|weights| weights.to_string()),
            "random_init": self.random_init,
            "data": self.data.file_name().map(|n| n.to_string_lossy().into_owned()),
            "steps": self.optim.total_steps, "batch": self.batch, "accumulate": self.accumulate,
            "max_tokens": self.max_tokens, "seed": self.seed, "shuffle": self.shuffle,
            "dtype": self.dtype.to_string(), "optimizer": self.optim,
        })
    }
}

/// Loads a model's tokenizer.
pub fn load_text(folder: &Path) -> Result<TextModel> {
    Ok(TextModel::from_files(&overfill_model::text_files(folder)?)?)
}

/// Loads a model for inference only.
pub fn load_frozen(folder: &Path, dtype: DType, device: &Device) -> Result<Decoder> {
    let config = ModelConfig::from_folder(folder)?;
    let weights = Weights::open(folder)?;
    let mut tensors = HashMap::new();
    for (name, shape) in config.tensor_shapes() {
        let tensor = weights.load(&name, &shape, device)?.to_dtype(dtype)?;
        tensors.insert(name, tensor);
    }
    Ok(Decoder::from_tensors(&config, &tensors, Ops::Fused)?)
}

/// Random weights with standard deviation `1/sqrt(inputs)`, smaller for projections that add to the residual stream.
/// Norms multiply by 1, biases are 0.
fn random_params(config: &ModelConfig, seed: u64, device: &Device) -> Result<Params> {
    let residual = 1.0 / (2.0 * config.num_hidden_layers as f64).sqrt();
    let mut params = Params::new();
    for TensorSpec { name, shape, module, kind, .. } in config.tensors() {
        let mut random = Random::new(seed, &name);
        let (count, inputs) = (shape.iter().product::<usize>(), *shape.last().unwrap_or(&1));
        let adds = module.parts.iter().any(|(p, _)| matches!(p, Parameter::AttentionOutput | Parameter::Down));
        let deviation = (inputs as f64).sqrt().recip() * if adds { residual } else { 1.0 };
        let ones = if config.norms_around_zero() { 0.0 } else { 1.0 };
        let value = |_| match kind {
            Kind::Bias => 0.0,
            Kind::Weight if module.columns.is_none() => ones,
            Kind::Weight => (random.normal() * deviation) as f32,
        };
        let values: Vec<f32> = (0..count).map(value).collect();
        params.insert(name, Var::from_tensor(&Tensor::from_vec(values, shape, device)?)?);
    }
    Ok(params)
}

fn load_params(folder: &Path, config: &ModelConfig, device: &Device) -> Result<Params> {
    let weights = Weights::open(folder)?;
    let mut params = Params::new();
    for (name, shape) in config.tensor_shapes() {
        let tensor = weights.load(&name, &shape, device)?.to_dtype(DType::F32)?;
        params.insert(name, Var::from_tensor(&tensor)?);
    }
    Ok(params)
}

/// A student's parameters, and the full model that it is trained under.
pub struct Trainer {
    /// The student's configuration.
    pub config: ModelConfig,
    /// The student's parameters.
    pub params: Params,
    /// The full model. `None`: the student is trained alone.
    pub full: Option<Full>,
    kept_layers: Option<Vec<u32>>,
    dtype: DType,
    device: Device,
}

impl Trainer {
    /// Loads a student. `dtype` is the type of the computation.
    pub fn load(student: &Path, full: Option<Full>, dtype: DType, device: DeviceSpec) -> Result<Self> {
        let (config, device) = (ModelConfig::from_folder(student)?, device.open()?);
        let params = load_params(student, &config, &device)?;
        Self::new(student, config, params, full, dtype, device)
    }

    fn new(
        student: &Path,
        config: ModelConfig,
        params: Params,
        full: Option<Full>,
        dtype: DType,
        device: Device,
    ) -> Result<Self> {
        let kept_layers = Provenance::from_folder(student)?.and_then(|provenance| provenance.kept_layers);
        if let Some(full) = &full {
            check_pair(full.config(), &config, kept_layers.as_deref())?;
        }
        Ok(Self { config, params, full, kept_layers, dtype, device })
    }

    /// The full model's KV of prompts, in the layers that the student keeps.
    pub fn prompts(&mut self, prompts: &[&[u32]]) -> Result<PromptKv> {
        let full = self.full.as_mut().context("a student that is trained alone has no full model")?;
        full.prefill(prompts, self.kept_layers.as_deref(), self.dtype)
    }

    /// Builds the student's differentiable model from the current parameters. Gradients that its backward pass can add in
    /// place are added to `gradients`.
    pub fn student(&self, gradients: &Gradients) -> Result<Decoder> {
        let cast = |(name, var): (&String, &Var)| Ok((name.clone(), var.as_tensor().to_dtype(self.dtype)?));
        let tensors = self.params.iter().map(cast).collect::<Result<HashMap<_, _>>>()?;
        if self.device.is_cpu() && self.dtype == DType::F32 {
            return Ok(Decoder::trained(&self.config, &tensors, gradients.sums())?);
        }
        Ok(Decoder::from_tensors(&self.config, &tensors, Ops::Differentiable)?)
    }

    /// Returns the loss summed over the learned tokens of `examples`, and the number of these tokens.
    fn loss(&mut self, student: &Decoder, examples: &[&Example]) -> Result<(Tensor, usize)> {
        if self.full.is_none() {
            return self.whole(student, examples);
        }
        let (prompts, responses): (Vec<&[u32]>, Vec<&[u32]>) = examples.iter().map(|e| e.last_response()).unzip();
        let kv = self.prompts(&prompts)?;
        Ok(respond(student, &kv, &responses)?)
    }

    /// Returns the loss of every learned token, and their number. The student itself reads all preceding tokens.
    fn whole(&self, student: &Decoder, examples: &[&Example]) -> Result<(Tensor, usize)> {
        let inputs: Vec<&[u32]> = examples.iter().map(|e| &e.tokens[..e.tokens.len() - 1]).collect();
        let batch = Flat::new(&inputs, &vec![0; inputs.len()], &self.device)?;
        let (mut rows, mut targets, mut first) = (Vec::new(), Vec::new(), 0);
        for example in examples {
            for i in (1..example.tokens.len()).filter(|i| example.learned[*i]) {
                rows.push((first + i - 1) as u32);
                targets.push(example.tokens[i]);
            }
            first += example.tokens.len() - 1;
        }
        let mut attention = RaggedAttention::new(&batch.lengths, None);
        let hidden = student.forward(&batch.tokens, &batch.positions, &mut attention, None)?;
        Ok((student.cross_entropy(&pick(&hidden, rows)?, &targets)?, targets.len()))
    }
}

/// Batches in training order, across epochs. The settings determine the order, so a resumed run sees the same batches.
struct Order<'a> {
    config: &'a TrainConfig,
    lengths: Vec<usize>,
    epoch: usize,
    batches: std::vec::IntoIter<Vec<usize>>,
}

impl Order<'_> {
    fn next(&mut self) -> Vec<usize> {
        loop {
            if let Some(batch) = self.batches.next() {
                return batch;
            }
            let c = self.config;
            self.batches = data::epoch(&self.lengths, c.batch, c.shuffle, c.seed, self.epoch).into_iter();
            self.epoch += 1;
        }
    }
}

/// Trains a model and writes its folder.
pub fn train(config: &TrainConfig) -> Result<Trained> {
    if config.batch == 0 || config.accumulate == 0 || config.optim.total_steps == 0 {
        bail!("batch, accumulate and steps must be 1 or more");
    }
    if config.dtype == WeightDtype::F16 {
        bail!("dtype is f16, supported for training: f32, bf16 (gradients may exceed the range of f16)");
    }
    let device = config.device.open()?;
    let text = load_text(&config.student)?;
    let model = ModelConfig::from_folder(&config.student)?;
    let mut provenance = Provenance::from_folder(&config.student)?.unwrap_or_default();
    let params = if config.random_init {
        random_params(&model, config.seed, &device)?
    } else {
        load_params(&config.student, &model, &device)?
    };
    let (mut examples, left_out) = data::load(&config.data, &text, config.max_tokens)?;
    if config.full.is_some() {
        // The full model predicts the first response token. The student needs a prompt and at least one more response
        // token.
        examples.retain(|e| !e.last_response().0.is_empty() && e.last_response().1.len() > 1);
        if examples.is_empty() {
            bail!("{}: no example has a prompt and at least two response tokens", config.data.display());
        }
    }
    let full_weights = match (&config.full, config.full_weights) {
        (Some(full), None) => Some(weights_of(full)?),
        (None, Some(weights)) => bail!("full_weights is {weights}, but there is no full model"),
        (_, weights) => weights,
    };
    if let Some(weights) = full_weights
        && ![WeightFormat::F32, WeightFormat::Bf16, WeightFormat::F16].contains(&weights)
    {
        bail!("full_weights is {weights}, supported: f32, bf16, f16");
    }
    let longest = examples.iter().map(|e| e.last_response().0.len()).max().unwrap_or(0);
    let load = |(folder, weights)| {
        Full::load(folder, config.device, config.dtype.dtype(), weights, longest, config.prompt_cache_bytes)
    };
    let full = config.full.as_deref().zip(full_weights).map(load).transpose()?;
    if let Some(token) = examples.iter().flat_map(|e| &e.tokens).find(|t| **t as usize >= model.vocab_size) {
        bail!("the tokenizer produces token {token}, but vocab_size in config.json is {}", model.vocab_size);
    }
    if left_out > 0 {
        tracing::warn!(
            left_out,
            max_tokens = config.max_tokens,
            "skipped examples that have no response token within max_tokens"
        );
    }

    folder::copy_text_files(&config.student, &config.out)?;
    let mut trainer = Trainer::new(&config.student, model, params, full, config.dtype.dtype(), device)?;
    let mut adam = AdamW::new(config.optim.clone(), &trainer.params)?;
    let mut grads = Gradients::new(&trainer.params)?;
    let described = config.describe(full_weights);
    if config.resume {
        checkpoint::restore(&config.out, &described, &trainer.params, &mut adam, &trainer.device)?;
    }
    let mut log = LossLog::open(&config.out.join("loss.jsonl"), adam.step())?;
    let lengths = examples.iter().map(|e| e.tokens.len()).collect();
    let mut order = Order { config, lengths, epoch: 0, batches: Vec::new().into_iter() };
    for _ in 0..adam.step() * config.accumulate {
        order.next();
    }

    let bar = progress_bar(config, adam.step())?;
    let mut recent = Vec::new();
    let mut done = Trained { loss: f64::NAN, learned_tokens: 0, seconds: 0.0 };
    let end = config.stop_after.unwrap_or(usize::MAX).min(config.optim.total_steps);
    while adam.step() < end {
        let started = Instant::now();
        let step = adam.step();
        let rate = config.optim.rate(step);
        let (mut sum, mut count) = (0.0, 0);
        for _ in 0..config.accumulate {
            let batch: Vec<&Example> = order.next().iter().map(|i| &examples[*i]).collect();
            let student = trainer.student(&grads)?;
            let (loss, tokens) = trainer.loss(&student, &batch)?;
            grads.add(&trainer.params, &loss.backward()?)?;
            sum += f64::from(loss.to_scalar::<f32>()?);
            count += tokens;
        }
        let norm = adam.update(&trainer.params, &mut grads, 1.0 / count as f64)?;
        let (loss, seconds) = (sum / count as f64, started.elapsed().as_secs_f64());
        log.write(&json!({"step": step + 1, "loss": loss, "learning_rate": rate, "gradient_norm": norm,
                          "tokens": count, "seconds": seconds}))?;
        recent.push(loss);
        done.learned_tokens += count as u64;
        done.seconds += seconds;
        bar.inc(1);
        bar.set_message(format!("loss {loss:.4}"));
        if config.checkpoint_every > 0 && adam.step().is_multiple_of(config.checkpoint_every) {
            checkpoint::save(&config.out, &described, &trainer.params, &adam)?;
        }
    }
    bar.finish_and_clear();
    let tail = &recent[recent.len().saturating_sub(20)..];
    done.loss = tail.iter().sum::<f64>() / tail.len().max(1) as f64;

    let tensors = trainer.params.iter().map(|(name, var)| {
        Ok((name.clone(), var.as_detached_tensor().to_device(&Device::Cpu)?.to_dtype(config.save_dtype.dtype())?))
    });
    folder::write_tensors(&config.out.join("model.safetensors"), &tensors.collect::<Result<_>>()?)?;
    folder::write_config(&config.out, &trainer.config, config.save_dtype)?;
    provenance.version = 1;
    match (&config.full, &provenance.full_model) {
        // An unpruned student. A node that serves it then takes the KV of this full model only.
        (Some(full), None) => provenance.full_model = Some(folder::full_model(full, &Weights::open(full)?)?),
        // It was fine-tuned over its own KV, so it is served alone, with all of its layers.
        (None, Some(_)) => (provenance.full_model, provenance.kept_layers) = (None, None),
        (Some(_), Some(_)) | (None, None) => {}
    }
    provenance.training = Some(described);
    folder::write_provenance(&config.out, &provenance)?;
    Ok(done)
}

/// Checks that `student` can attend to the KV of the layers of `full` that it keeps; `None`: all. An error names the field
/// that differs.
pub fn check_pair(full: &ModelConfig, student: &ModelConfig, kept_layers: Option<&[u32]>) -> Result<()> {
    let facts = |c: &ModelConfig| {
        [
            ("num_key_value_heads", c.num_key_value_heads.to_string()),
            ("head_dim", c.head_dim.to_string()),
            ("vocab_size", c.vocab_size.to_string()),
        ]
    };
    let kept = |layer: usize| kept_layers.map_or(layer, |kept| kept.get(layer).map_or(usize::MAX, |at| *at as usize));
    let layers = (0..student.num_hidden_layers).map(|layer| {
        let text =
            |config: &ModelConfig, layer| config.attention_of(layer).map_or("absent".into(), |of| of.to_string());
        (("rope and window of a layer", text(full, kept(layer))), ("", text(student, layer)))
    });
    for ((field, of_full), (_, of_student)) in facts(full).into_iter().zip(facts(student)).chain(layers) {
        if of_full != of_student {
            bail!(
                "the student can't use the full model's KV: {field} is {of_student} in the student, {of_full} in the full model"
            );
        }
    }
    Ok(())
}

fn progress_bar(config: &TrainConfig, at: usize) -> Result<ProgressBar> {
    if !config.progress {
        return Ok(ProgressBar::hidden());
    }
    let bar = ProgressBar::new(config.optim.total_steps as u64);
    let style = ProgressStyle::with_template("{wide_bar} step {pos}/{len} {msg} {elapsed} (left {eta})");
    bar.set_style(style.context("progress bar")?);
    bar.set_position(at as u64);
    Ok(bar)
}
