//! Measures training for `overfill bench train`: the time of each part of a step, and of calibration.

use std::{path::Path, time::Instant};

use anyhow::Result;
use candle_core::DType;
use overfill_model::{DeviceSpec, ModelConfig, WeightFormat};

use crate::{
    batch::respond,
    data::Example,
    full::Full,
    optim::{AdamW, Gradients, OptimConfig},
    prune::{Importance, Norm, calibration_model},
    random::Random,
    train::Trainer,
};

/// What a step trains on: random tokens.
#[derive(Clone, Copy, Debug)]
pub struct StepSize {
    /// Examples per step.
    pub examples: usize,
    /// Mean tokens of a prompt. Lengths vary from half to one and a half times the mean.
    pub prompt_tokens: usize,
    /// Mean tokens of a response. Lengths vary as those of prompts.
    pub response_tokens: usize,
}

/// Time and work of one part.
#[derive(Clone, Copy, Debug, Default)]
pub struct Part {
    /// Seconds.
    pub seconds: f64,
    /// Tokens that the part computed.
    pub tokens: usize,
    /// Floating-point operations of the matrix products, those of attention included. A multiply-add counts as two. What
    /// the backward pass computes again does not count.
    pub operations: f64,
}

/// The parts of one training step.
#[derive(Clone, Copy, Debug, Default)]
pub struct Step {
    /// The frozen full model's prefill of the prompts.
    pub prefill: Part,
    /// The student's forward pass and the loss, with the gradients of the output layer.
    pub forward: Part,
    /// The student's backward pass without the output layer.
    pub backward: Part,
    /// Norm of the gradients and update of the parameters.
    pub optimizer: Part,
}

/// A student and its full model, ready to train.
pub struct Training {
    trainer: Trainer,
    adam: AdamW,
    gradients: Gradients,
    examples: Vec<Example>,
}

impl Training {
    /// Loads a student and its full model.
    pub fn load(full: &Path, student: &Path, weights: WeightFormat, size: StepSize) -> Result<Self> {
        let config = ModelConfig::from_folder(student)?;
        let mut random = Random::new(0, "training steps");
        let mut length = |mean: usize, least| (mean / 2 + random.below(mean + 1)).max(least);
        let examples = (0..size.examples).map(|i| {
            let (prompt, response) = (length(size.prompt_tokens, 1), length(size.response_tokens, 2));
            let tokens =
                (0..prompt + response).map(|t| ((i + 1) * (t + 1) * 7919 % config.vocab_size) as u32).collect();
            Example { tokens, learned: (0..prompt + response).map(|t| t >= prompt).collect() }
        });
        let examples: Vec<Example> = examples.collect();
        let longest = examples.iter().map(|e| e.tokens.len()).max().unwrap_or(1);
        // Nothing is cached, since each run uses the same prompts.
        let full = Full::load(full, DeviceSpec::Cpu, DType::F32, weights, longest, 0)?;
        let trainer = Trainer::load(student, Some(full), DType::F32, DeviceSpec::Cpu)?;
        let optim = OptimConfig {
            learning_rate: 1e-5,
            beta1: 0.9,
            beta2: 0.98,
            eps: 1e-8,
            weight_decay: 0.01,
            clip: 1.0,
            warmup_steps: 0,
            total_steps: 1000,
            final_share: 1.0,
        };
        let adam = AdamW::new(optim, &trainer.params)?;
        let gradients = Gradients::new(&trainer.params)?;
        Ok(Self { trainer, adam, gradients, examples })
    }

    /// The student's configuration.
    pub fn student(&self) -> &ModelConfig {
        &self.trainer.config
    }

    /// Trains one step.
    pub fn step(&mut self) -> Result<Step> {
        let examples: Vec<(&[u32], &[u32])> = self.examples.iter().map(Example::last_response).collect();
        let (prompts, responses): (Vec<&[u32]>, Vec<&[u32]>) = examples.iter().copied().unzip();
        let student = self.trainer.student(&self.gradients)?;
        let mut step = Step::default();
        let begin = Instant::now();
        let kv = self.trainer.prompts(&prompts)?;
        step.prefill.seconds = begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        let (loss, count) = respond(&student, &kv, &responses)?;
        step.forward.seconds = begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        self.gradients.add(&self.trainer.params, &loss.backward()?)?;
        step.backward.seconds = begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        self.adam.update(&self.trainer.params, &mut self.gradients, 1.0 / count as f64)?;
        step.optimizer.seconds = begin.elapsed().as_secs_f64();

        for part in [&mut step.forward, &mut step.backward, &mut step.optimizer] {
            part.tokens = count;
        }
        step.prefill.tokens = prompts.iter().map(|prompt| prompt.len()).sum();
        if let Some(full) = &self.trainer.full {
            let alone = prompts.iter().map(|prompt| (0, prompt.len()));
            step.prefill.operations = layer_operations(full.config(), alone);
        }
        let after = examples.iter().map(|(prompt, response)| (prompt.len(), response.len() - 1));
        let layers = layer_operations(self.student(), after);
        let output = 2.0 * (count * self.student().vocab_size * self.student().hidden_size) as f64;
        step.forward.operations = layers + 3.0 * output;
        step.backward.operations = 2.0 * layers;
        Ok(step)
    }
}

/// Operations of the layers for sequences of a number of tokens after a number of others. The last layer's keys and values
/// need less, which is not subtracted.
fn layer_operations(config: &ModelConfig, sequences: impl Iterator<Item = (usize, usize)>) -> f64 {
    let (hidden, inner, d) = (config.hidden_size, config.intermediate_size, config.head_dim);
    let (q, kv) = (config.num_attention_heads * d, config.num_key_value_heads * d);
    let weights = hidden * (2 * q + 2 * kv) + 3 * hidden * inner;
    let of_layer: f64 = sequences
        .map(|(before, tokens)| {
            let seen = tokens * before + tokens * (tokens + 1) / 2;
            (2 * tokens * weights + 4 * seen * q) as f64
        })
        .sum();
    of_layer * config.num_hidden_layers as f64
}

/// Measures calibration: seconds of each of `runs` passes over `samples` samples of `tokens` tokens.
pub fn calibration(full: &Path, samples: usize, tokens: usize, runs: usize) -> Result<Vec<Part>> {
    let (model, config) = calibration_model(full, DeviceSpec::Cpu)?;
    let text: Vec<u32> = (0..samples * tokens).map(|t| (t * 7919 % config.vocab_size) as u32).collect();
    let samples: Vec<&[u32]> = text.chunks(tokens).collect();
    let operations = layer_operations(&config, samples.iter().map(|sample| (0, sample.len())));
    let run = |_| {
        let (layers, inner) = (config.num_hidden_layers, config.intermediate_size);
        let mut importance = Importance::new(Norm::L2, config.hidden_size, inner, layers);
        let begin = Instant::now();
        importance.observe(&model, &samples)?;
        Ok(Part { seconds: begin.elapsed().as_secs_f64(), tokens: text.len(), operations })
    };
    (0..runs).map(run).collect()
}
