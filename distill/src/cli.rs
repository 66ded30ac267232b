//! Arguments of the subcommands `prune`, `distill`, `eval`, `demo-data`, `demo-pair` and `quality`, and what runs them.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use overfill_model::{DeviceSpec, WeightDtype, resolve};

use crate::{
    data::load,
    demo::{self, data::DataConfig},
    eval::Arm,
    folder,
    optim::OptimConfig,
    prune::{Norm, PruneConfig, Width, prune},
    train::{TrainConfig, load_text, train},
};

/// Fine-tune a pruned model under the KV of its frozen full model, or train a model alone.
#[derive(Args, Clone, Debug)]
pub struct DistillArgs {
    /// Model to train: a Hugging Face folder, .gguf file or hub id.
    #[arg(long)]
    pub student: String,
    /// Frozen full model that prefills every prompt; without it the student is trained alone.
    #[arg(long)]
    pub full: Option<String>,
    /// JSONL of {"messages": [..]} or {"prompt": .., "response": ..}.
    #[arg(long)]
    pub data: PathBuf,
    /// Folder to write the trained model to.
    #[arg(long)]
    pub out: PathBuf,
    /// Optimiser steps.
    #[arg(long, default_value_t = 1000)]
    pub steps: usize,
    /// Rows per forward pass.
    #[arg(long, default_value_t = 8)]
    pub batch: usize,
    /// Forward passes per step, their gradients summed.
    #[arg(long, default_value_t = 1)]
    pub accumulate: usize,
    /// Longest example in tokens; longer ones are cut.
    #[arg(long, default_value_t = 2048)]
    pub max_tokens: usize,
    /// Peak learning rate.
    #[arg(long, default_value_t = 2e-5)]
    pub learning_rate: f64,
    /// Share of the steps that warms up.
    #[arg(long, default_value_t = 0.01)]
    pub warmup_share: f64,
    /// Where the cosine ends, as a share of the peak.
    #[arg(long, default_value_t = 0.0)]
    pub final_share: f64,
    /// AdamW's decay of the first moment.
    #[arg(long, default_value_t = 0.9)]
    pub beta1: f64,
    /// AdamW's decay of the second moment.
    #[arg(long, default_value_t = 0.98)]
    pub beta2: f64,
    /// AdamW's epsilon.
    #[arg(long, default_value_t = 1e-8)]
    pub epsilon: f64,
    /// Decoupled decay of matrices.
    #[arg(long, default_value_t = 0.01)]
    pub weight_decay: f64,
    /// Largest norm of the gradient; 0 leaves it alone.
    #[arg(long, default_value_t = 1.0)]
    pub clip: f64,
    /// Seed of the order of examples, and of random weights.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Take examples in the file's order (a curriculum).
    #[arg(long)]
    pub no_shuffle: bool,
    /// Start from random weights; the student's folder then needs none.
    #[arg(long)]
    pub random_init: bool,
    /// Type of the computation: f32 or bf16.
    #[arg(long, default_value = "f32")]
    pub dtype: WeightDtype,
    /// Type of the written weights: f32, bf16 or f16.
    #[arg(long, default_value = "f32")]
    pub save_dtype: WeightDtype,
    /// cpu or cuda:N.
    #[arg(long, default_value = "cpu")]
    pub device: DeviceSpec,
    /// Steps between checkpoints; 0 writes none.
    #[arg(long, default_value_t = 0)]
    pub checkpoint_every: usize,
    /// Go on from the newest checkpoint in the output folder.
    #[arg(long)]
    pub resume: bool,
}

impl DistillArgs {
    /// Runs the subcommand.
    pub fn run(self) -> Result<()> {
        let config = TrainConfig {
            student: resolve(&self.student)?,
            random_init: self.random_init,
            full: self.full.as_deref().map(resolve).transpose()?,
            data: self.data,
            out: self.out,
            batch: self.batch,
            accumulate: self.accumulate,
            max_tokens: self.max_tokens,
            seed: self.seed,
            shuffle: !self.no_shuffle,
            dtype: self.dtype,
            save_dtype: self.save_dtype,
            device: self.device,
            optim: OptimConfig {
                learning_rate: self.learning_rate,
                beta1: self.beta1,
                beta2: self.beta2,
                eps: self.epsilon,
                weight_decay: self.weight_decay,
                clip: self.clip,
                warmup_steps: (self.warmup_share * self.steps as f64).ceil() as usize,
                total_steps: self.steps,
                final_share: self.final_share,
            },
            checkpoint_every: self.checkpoint_every,
            resume: self.resume,
            stop_after: None,
            progress: true,
        };
        let done = train(&config)?;
        println!(
            "trained {} steps in {:.1} s over {} response tokens, loss {:.4} nats per token: {}",
            config.optim.total_steps,
            done.seconds,
            done.learned_tokens,
            done.loss,
            config.out.display()
        );
        Ok(())
    }
}

/// Write the demo's task as data files, with its tokenizer and the full model's configuration.
#[derive(Args, Clone, Debug)]
pub struct DemoDataArgs {
    /// Folder to write to.
    #[arg(long)]
    pub out: PathBuf,
    /// Seed of the data.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Chats that train the full model, from easy to hard.
    #[arg(long, default_value_t = 17_600)]
    pub conversations: usize,
    /// More such chats, all of full difficulty.
    #[arg(long, default_value_t = 16_000)]
    pub more_conversations: usize,
    /// Prompts and responses that fine-tune a student.
    #[arg(long, default_value_t = 12_800)]
    pub pairs: usize,
    /// Prompts and responses of documents that no training file has.
    #[arg(long, default_value_t = 200)]
    pub held_out: usize,
}

impl DemoDataArgs {
    /// Runs the subcommand.
    pub fn run(self) -> Result<()> {
        let Self { out, seed, conversations, more_conversations, pairs, held_out } = self;
        demo::data::write(&out, &DataConfig { seed, conversations, more_conversations, pairs, held_out })
    }
}

/// Cut a decode model out of a full model, by the importance of its channels over a calibration text.
#[derive(Args, Clone, Debug)]
pub struct PruneArgs {
    /// Full model: a Hugging Face folder, .gguf file or hub id.
    #[arg(long)]
    pub model: String,
    /// Folder to write the pruned model to.
    #[arg(long)]
    pub out: PathBuf,
    /// Text file, or JSONL of {"text": ..}, {"messages": [..]} or {"prompt": .., "response": ..}.
    #[arg(long)]
    pub calibration: PathBuf,
    /// Most calibration samples.
    #[arg(long, default_value_t = 512)]
    pub samples: usize,
    /// Most tokens of a sample.
    #[arg(long, default_value_t = 512)]
    pub sample_tokens: usize,
    /// Share of hidden and intermediate channels to cut: int(width * (1 - ratio)) are kept.
    #[arg(long, default_value_t = 0.45)]
    pub ratio: f64,
    /// Hidden channels to keep, in place of the ratio.
    #[arg(long)]
    pub hidden: Option<usize>,
    /// Intermediate channels to keep, in place of the ratio.
    #[arg(long)]
    pub intermediate: Option<usize>,
    /// Cut widths down to a multiple of this.
    #[arg(long, default_value_t = 1)]
    pub multiple_of: usize,
    /// Norm over samples: l1 or l2.
    #[arg(long, default_value = "l2")]
    pub norm: Norm,
    /// Layers to keep, comma-separated and ascending; all of them by default.
    #[arg(long, value_delimiter = ',')]
    pub layers: Option<Vec<u32>>,
    /// cpu or cuda:N.
    #[arg(long, default_value = "cpu")]
    pub device: DeviceSpec,
}

impl PruneArgs {
    /// Runs the subcommand.
    pub fn run(self) -> Result<()> {
        let width = |channels: Option<usize>| channels.map_or(Width::Ratio(self.ratio), Width::Channels);
        let config = PruneConfig {
            model: resolve(&self.model)?,
            hidden: width(self.hidden),
            intermediate: width(self.intermediate),
            out: self.out,
            calibration: self.calibration,
            samples: self.samples,
            sample_tokens: self.sample_tokens,
            multiple_of: self.multiple_of,
            norm: self.norm,
            layers: self.layers,
            device: self.device,
            progress: true,
        };
        let kept = prune(&config)?;
        println!(
            "kept {} layers, {} hidden and {} intermediate channels: {}",
            kept.layers.len(),
            kept.hidden.len(),
            kept.intermediate[0].len(),
            config.out.display()
        );
        Ok(())
    }
}

/// Score models on held-out prompts: greedy exact match and cross-entropy. Name the arms to compare.
#[derive(Args, Clone, Debug)]
pub struct EvalArgs {
    /// JSONL of {"messages": [..]} or {"prompt": .., "response": ..}; the last response of each line is scored.
    #[arg(long)]
    pub data: PathBuf,
    /// Full model; by itself it is the arm `full`.
    #[arg(long)]
    pub full: Option<String>,
    /// Decode model over the full model's KV: the arm `overfill`. Needs --full.
    #[arg(long, requires = "full")]
    pub decode: Option<String>,
    /// A pruned model fine-tuned alone: the arm `pruned-only`.
    #[arg(long)]
    pub pruned: Option<String>,
    /// A model trained from scratch: the arm `scratch`.
    #[arg(long)]
    pub scratch: Option<String>,
    /// Most examples to score.
    #[arg(long, default_value_t = 1000)]
    pub limit: usize,
    /// Prompts at once.
    #[arg(long, default_value_t = 32)]
    pub batch: usize,
    /// Longest example in tokens.
    #[arg(long, default_value_t = 2048)]
    pub max_tokens: usize,
    /// Type of weights and computation: f32, bf16 or f16.
    #[arg(long, default_value = "f32")]
    pub dtype: WeightDtype,
    /// cpu or cuda:N.
    #[arg(long, default_value = "cpu")]
    pub device: DeviceSpec,
    /// Also write the scores to this JSON file.
    #[arg(long)]
    pub json: Option<PathBuf>,
}

impl EvalArgs {
    /// Runs the subcommand.
    pub fn run(self) -> Result<()> {
        let device = self.device.open()?;
        let dtype = self.dtype.dtype();
        let alone = |model: &Option<String>| model.as_deref().map(resolve).transpose();
        let folders =
            [("full", alone(&self.full)?), ("pruned-only", alone(&self.pruned)?), ("scratch", alone(&self.scratch)?)];
        let decode = alone(&self.decode)?;
        let Some(any) = folders.iter().find_map(|(_, folder)| folder.clone()) else {
            bail!("name at least one model: --full, --pruned or --scratch");
        };
        let (mut examples, left_out) = load(&self.data, &load_text(&any)?, self.max_tokens)?;
        examples.truncate(self.limit);
        if left_out > 0 {
            tracing::warn!(left_out, max_tokens = self.max_tokens, "examples without a response within max_tokens");
        }
        let mut scores = Vec::new();
        for (name, folder) in &folders {
            if let Some(folder) = folder {
                scores.push((*name, Arm::alone(folder, dtype, &device)?.score(&examples, self.batch)?));
            }
        }
        if let (Some(full), Some(decode)) = (&folders[0].1, &decode) {
            scores.push(("overfill", Arm::two_stage(full, decode, dtype, &device)?.score(&examples, self.batch)?));
        }
        println!("{:<12} {:>11} {:>26} {:>9}", "arm", "exact match", "cross-entropy (nats/token)", "examples");
        for (name, score) in &scores {
            println!("{name:<12} {:>11.4} {:>26.4} {:>9}", score.exact_match, score.cross_entropy, score.examples);
        }
        let json: serde_json::Map<_, _> = scores
            .iter()
            .map(|(name, score)| Ok(((*name).into(), serde_json::to_value(score)?)))
            .collect::<Result<_>>()?;
        println!("{}", serde_json::to_string(&json)?);
        match &self.json {
            Some(path) => folder::write_json(path, &json),
            None => Ok(()),
        }
    }
}

/// Make the demo pair from nothing: data, full model, pruning, fine-tuning, scores.
#[derive(Args, Clone, Debug)]
pub struct DemoPairArgs {
    /// Folder to write `full/`, `decode/` and `scores.json` to.
    #[arg(long)]
    pub out: PathBuf,
    /// Seed of data and weights.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl DemoPairArgs {
    /// Runs the subcommand.
    pub fn run(self) -> Result<()> {
        demo::recipe::make_pair(&self.out, self.seed)
    }
}

/// Measure the arms by fine-tuning budget on the demo's task; writes table and plot.
#[derive(Args, Clone, Debug)]
pub struct QualityArgs {
    /// The demo's full model.
    #[arg(long, default_value = "demo/full")]
    pub full: PathBuf,
    /// Folder for cells.jsonl, table.json, table.md and exact-match.svg; measurements it has already are kept.
    #[arg(long, default_value = "docs/quality")]
    pub out: PathBuf,
    /// Folder for data and models that are made on the way.
    #[arg(long, default_value = "target/quality")]
    pub work: PathBuf,
    /// Seeds, comma-separated.
    #[arg(long, value_delimiter = ',', default_value = "0,1,2")]
    pub seeds: Vec<u64>,
    /// Only draw what was measured before.
    #[arg(long)]
    pub render: bool,
}

impl QualityArgs {
    /// Runs the subcommand.
    pub fn run(self) -> Result<()> {
        demo::quality::measure(&self.full, &self.out, &self.work, &self.seeds, self.render)
    }
}
