//! The subcommands that make and judge models, as `overfill_distill` defines them.

use anyhow::Result;
use clap::Subcommand;
use overfill_cluster::{LogFormat, init_telemetry};
use overfill_distill::cli;

/// From a full model to a decode model, and what came of it.
#[derive(Subcommand)]
pub enum ModelCommand {
    /// Cut a model's width (and depth) by the importance of its channels.
    Prune(Box<cli::PruneArgs>),
    /// Fine-tune a pruned model under the frozen full model's KV, or train any model alone.
    Distill(Box<cli::DistillArgs>),
    /// Score models on held-out prompts: greedy exact match and cross-entropy.
    Eval(Box<cli::EvalArgs>),
    /// Write the demo task's data, tokenizer and configuration.
    DemoData(cli::DemoDataArgs),
    /// Make the demo pair from nothing: data, full model, pruning, fine-tuning, scores.
    DemoPair(cli::DemoPairArgs),
    /// Measure the arms by fine-tuning budget on the demo's task.
    Quality(cli::QualityArgs),
}

impl ModelCommand {
    /// Runs the subcommand.
    pub fn run(self) -> Result<()> {
        init_telemetry(LogFormat::Text);
        match self {
            Self::Prune(args) => args.run(),
            Self::Distill(args) => args.run(),
            Self::Eval(args) => args.run(),
            Self::DemoData(args) => args.run(),
            Self::DemoPair(args) => args.run(),
            Self::Quality(args) => args.run(),
        }
    }
}
