//! The subcommands `prune`, `distill`, `demo-data`, `demo-pair` and `quality`: their arguments and their implementations.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use overfill_model::{DeviceSpec, WeightDtype, WeightFormat, resolve};

use crate::{
    demo::{self, data::DataConfig},
    optim::OptimConfig,
    prune::{Norm, PruneConfig, Width, prune},
    train::{TrainConfig, train},
};

const DISTILL_HELP: &str = "\
Examples, from the root of the repository, after `overfill demo-data --out target/demo-data`:
  overfill distill --student demo/decode --full demo/full --data target/demo-data/pairs.jsonl --out target/tuned --steps 50
  overfill distill --student demo/decode --data target/demo-data/pairs.jsonl --out target/alone --steps 50";

/// Fine-tune a pruned model over the KV of its frozen full model, or train a model alone.
#[derive(Args, Clone, Debug)]
#[command(after_help = DISTILL_HELP)]
pub struct DistillArgs {
    /// Model to train: a Hugging Face folder, a .gguf file or a hub id.
    #[arg(long, value_name = "MODEL", help_heading = "Models")]
    pub student: String,
    /// Frozen full model that prefills every prompt. Without it, the student is trained alone.
    #[arg(long, value_name = "MODEL", help_heading = "Models")]
    pub full: Option<String>,
    /// Weight format of the full model: f32, bf16 or f16 [default: the type of its checkpoint]
    #[arg(long, requires = "full", value_name = "FORMAT", help_heading = "Models")]
    pub full_weights: Option<WeightFormat>,
    /// Most MiB of the full model's KV kept for prompts that come again. 0 keeps none.
    #[arg(long, default_value_t = 1024, value_name = "MEBIBYTES", help_heading = "Models")]
    pub prompt_cache_mebibytes: usize,
    /// Start from random weights. The student's folder then needs no weights.
    #[arg(long, help_heading = "Models")]
    pub random_init: bool,
    /// JSONL file of {"messages": [..]} or {"prompt": .., "response": ..}.
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    pub data: PathBuf,
    /// Maximum length of an example in tokens. Longer ones are cut.
    #[arg(long, default_value_t = 2048, value_name = "TOKENS", help_heading = "Data")]
    pub max_tokens: usize,
    /// Keep the examples in the order of the file, as a curriculum.
    #[arg(long, help_heading = "Data")]
    pub no_shuffle: bool,
    /// Folder for the trained model.
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    pub out: PathBuf,
    /// Type of the written weights: f32, bf16 or f16.
    #[arg(long, default_value = "f32", value_name = "TYPE", help_heading = "Output")]
    pub save_dtype: WeightDtype,
    /// Number of steps between checkpoints. 0 writes no checkpoints.
    #[arg(long, default_value_t = 0, value_name = "STEPS", help_heading = "Output")]
    pub checkpoint_every: usize,
    /// Continue from the newest checkpoint in the output folder.
    #[arg(long, help_heading = "Output")]
    pub resume: bool,
    /// Number of optimiser steps.
    #[arg(long, default_value_t = 1000, help_heading = "Training")]
    pub steps: usize,
    /// Examples per forward pass.
    #[arg(long, default_value_t = 8, value_name = "EXAMPLES", help_heading = "Training")]
    pub batch: usize,
    /// Forward passes per step. Their gradients are summed.
    #[arg(long, default_value_t = 1, value_name = "PASSES", help_heading = "Training")]
    pub accumulate: usize,
    /// Seed for the order of examples and for random weights.
    #[arg(long, default_value_t = 0, help_heading = "Training")]
    pub seed: u64,
    /// Type of the computation: f32 or bf16.
    #[arg(long, default_value = "f32", value_name = "TYPE", help_heading = "Training")]
    pub dtype: WeightDtype,
    /// Device: cpu or cuda:N.
    #[arg(long, default_value = "cpu", help_heading = "Training")]
    pub device: DeviceSpec,
    /// Peak learning rate.
    #[arg(long, default_value_t = 2e-5, value_name = "RATE", help_heading = "Optimiser")]
    pub learning_rate: f64,
    /// Fraction of the steps used for warm-up.
    #[arg(long, default_value_t = 0.01, value_name = "FRACTION", help_heading = "Optimiser")]
    pub warmup_share: f64,
    /// Final learning rate of the cosine schedule, as a fraction of the peak.
    #[arg(long, default_value_t = 0.0, value_name = "FRACTION", help_heading = "Optimiser")]
    pub final_share: f64,
    /// AdamW decay rate of the first moment.
    #[arg(long, default_value_t = 0.9, help_heading = "Optimiser")]
    pub beta1: f64,
    /// AdamW decay rate of the second moment.
    #[arg(long, default_value_t = 0.98, help_heading = "Optimiser")]
    pub beta2: f64,
    /// AdamW epsilon.
    #[arg(long, default_value_t = 1e-8, help_heading = "Optimiser")]
    pub epsilon: f64,
    /// Decoupled weight decay of matrices.
    #[arg(long, default_value_t = 0.01, help_heading = "Optimiser")]
    pub weight_decay: f64,
    /// Maximum gradient norm. 0 disables clipping.
    #[arg(long, default_value_t = 1.0, value_name = "NORM", help_heading = "Optimiser")]
    pub clip: f64,
}

impl DistillArgs {
    /// Runs the subcommand.
    pub fn run(self) -> Result<()> {
        let config = TrainConfig {
            student: resolve(&self.student)?,
            random_init: self.random_init,
            full: self.full.as_deref().map(resolve).transpose()?,
            full_weights: self.full_weights,
            prompt_cache_bytes: self.prompt_cache_mebibytes.saturating_mul(1 << 20),
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

const DEMO_DATA_HELP: &str = "\
Examples:
  overfill demo-data --out target/demo-data
  overfill demo-data --out target/demo-data --seed 1 --pairs 1000";

/// Write the data files of the demo task, its tokenizer and the configuration of its full model.
#[derive(Args, Clone, Debug)]
#[command(after_help = DEMO_DATA_HELP)]
pub struct DemoDataArgs {
    /// Folder for the files.
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    pub out: PathBuf,
    /// Seed of the data.
    #[arg(long, default_value_t = 0, help_heading = "Data")]
    pub seed: u64,
    /// Number of chats that train the full model, in order of difficulty.
    #[arg(long, default_value_t = 17_600, value_name = "COUNT", help_heading = "Data")]
    pub conversations: usize,
    /// Number of further chats, all of full difficulty.
    #[arg(long, default_value_t = 16_000, value_name = "COUNT", help_heading = "Data")]
    pub more_conversations: usize,
    /// Number of prompt and response pairs that fine-tune a student.
    #[arg(long, default_value_t = 12_800, value_name = "COUNT", help_heading = "Data")]
    pub pairs: usize,
    /// Number of held-out prompt and response pairs. Their documents are in no training file.
    #[arg(long, default_value_t = 200, value_name = "COUNT", help_heading = "Data")]
    pub held_out: usize,
}

impl DemoDataArgs {
    /// Runs the subcommand.
    pub fn run(self) -> Result<()> {
        let Self { out, seed, conversations, more_conversations, pairs, held_out } = self;
        demo::data::write(&out, &DataConfig { seed, conversations, more_conversations, pairs, held_out })
    }
}

const PRUNE_HELP: &str = "\
Examples, from the root of the repository, after `overfill demo-data --out target/demo-data`:
  overfill prune --model demo/full --calibration target/demo-data/pairs.jsonl --out target/pruned
  overfill prune --model demo/full --calibration target/demo-data/pairs.jsonl --out target/pruned --hidden 36 --intermediate 108";

/// Prune the width of a full model by the importance of its channels over calibration text.
#[derive(Args, Clone, Debug)]
#[command(after_help = PRUNE_HELP)]
pub struct PruneArgs {
    /// Full model: a Hugging Face folder, a .gguf file or a hub id.
    #[arg(long, help_heading = "Model")]
    pub model: String,
    /// Folder for the pruned model.
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    pub out: PathBuf,
    /// Device: cpu or cuda:N.
    #[arg(long, default_value = "cpu", help_heading = "Model")]
    pub device: DeviceSpec,
    /// Fraction of hidden and intermediate channels to remove. int(width * (1 - ratio)) channels are kept.
    #[arg(long, default_value_t = 0.45, help_heading = "Pruning")]
    pub ratio: f64,
    /// Number of hidden channels to keep, in place of --ratio.
    #[arg(long, value_name = "CHANNELS", help_heading = "Pruning")]
    pub hidden: Option<usize>,
    /// Number of intermediate channels to keep, in place of --ratio.
    #[arg(long, value_name = "CHANNELS", help_heading = "Pruning")]
    pub intermediate: Option<usize>,
    /// Round widths down to a multiple of this number.
    #[arg(long, default_value_t = 1, value_name = "CHANNELS", help_heading = "Pruning")]
    pub multiple_of: usize,
    /// Layers to keep, comma-separated and ascending [default: all layers]
    #[arg(long, value_delimiter = ',', help_heading = "Pruning")]
    pub layers: Option<Vec<u32>>,
    /// Text file, or JSONL file of {"text": ..}, {"messages": [..]} or {"prompt": .., "response": ..}.
    #[arg(long, value_name = "FILE", help_heading = "Calibration")]
    pub calibration: PathBuf,
    /// Maximum number of calibration samples.
    #[arg(long, default_value_t = 512, value_name = "COUNT", help_heading = "Calibration")]
    pub samples: usize,
    /// Maximum length of a sample.
    #[arg(long, default_value_t = 512, value_name = "TOKENS", help_heading = "Calibration")]
    pub sample_tokens: usize,
    /// Norm over samples: l1 or l2.
    #[arg(long, default_value = "l2", help_heading = "Calibration")]
    pub norm: Norm,
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

const DEMO_PAIR_HELP: &str = "\
Examples:
  overfill demo-pair --out target/demo-pair
  overfill demo-pair --out target/demo-pair --seed 1";

/// Train the demo pair from scratch: data, full model, pruning, fine-tuning, scores.
#[derive(Args, Clone, Debug)]
#[command(after_help = DEMO_PAIR_HELP)]
pub struct DemoPairArgs {
    /// Folder for `full/`, `decode/` and `scores.json`.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Seed of the data and the weights.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl DemoPairArgs {
    /// Runs the subcommand.
    pub fn run(self) -> Result<()> {
        demo::recipe::make_pair(&self.out, self.seed)
    }
}

const QUALITY_HELP: &str = "\
Examples, from the root of the repository:
  overfill quality --render
  overfill quality --out target/quality-table --seeds 0";

/// Measure quality by fine-tuning budget on the demo task. Writes a table and a plot.
#[derive(Args, Clone, Debug)]
#[command(after_help = QUALITY_HELP)]
pub struct QualityArgs {
    /// The demo's full model.
    #[arg(long, default_value = "demo/full", value_name = "DIR")]
    pub full: PathBuf,
    /// Folder for cells.jsonl, table.json, table.md and exact-match.svg. Existing measurements are kept.
    #[arg(long, default_value = "docs/quality", value_name = "DIR")]
    pub out: PathBuf,
    /// Folder for intermediate data and models.
    #[arg(long, default_value = "target/quality", value_name = "DIR")]
    pub work: PathBuf,
    /// Seeds, comma-separated.
    #[arg(long, value_delimiter = ',', default_value = "0,1,2")]
    pub seeds: Vec<u64>,
    /// Only write the table and the plot of existing measurements.
    #[arg(long)]
    pub render: bool,
}

impl QualityArgs {
    /// Runs the subcommand.
    pub fn run(self) -> Result<()> {
        demo::quality::measure(&self.full, &self.out, &self.work, &self.seeds, self.render)
    }
}
