//! The subcommands that make and evaluate models. `overfill_distill` defines them.

use std::process::ExitCode;

use clap::Subcommand;
use overfill_cluster::{EXIT_FAILURE, LogFormat, init_telemetry, process::one_line};
use overfill_distill::{check::cli::CheckArgs, cli, eval::cli::EvalArgs};

/// Exit code of a check that could not run. A failed check has another one.
const EXIT_NOT_CHECKED: u8 = 2;

/// Commands that make and evaluate models.
#[derive(Subcommand)]
pub enum ModelCommand {
    /// Prune the width (and depth) of a model by the importance of its channels.
    Prune(Box<cli::PruneArgs>),
    /// Fine-tune a pruned model over the KV of its frozen full model, or train a model alone.
    Distill(Box<cli::DistillArgs>),
    /// Score models on held-out prompts: greedy exact match and cross-entropy.
    Eval(Box<EvalArgs>),
    /// Check that a model is computed correctly, against an independent implementation.
    Check(Box<CheckArgs>),
    /// Write the data, tokenizer and configuration of the demo task.
    DemoData(cli::DemoDataArgs),
    /// Train the demo pair from scratch: data, full model, pruning, fine-tuning, scores.
    DemoPair(cli::DemoPairArgs),
    /// Measure quality by fine-tuning budget on the demo task.
    Quality(cli::QualityArgs),
}

impl ModelCommand {
    /// Runs the subcommand.
    pub fn run(self) -> ExitCode {
        init_telemetry(LogFormat::Text);
        let result = match self {
            Self::Check(args) => return check(*args),
            Self::Prune(args) => args.run(),
            Self::Distill(args) => args.run(),
            Self::Eval(args) => args.run(),
            Self::DemoData(args) => args.run(),
            Self::DemoPair(args) => args.run(),
            Self::Quality(args) => args.run(),
        };
        crate::exit_code(result)
    }
}

fn check(args: CheckArgs) -> ExitCode {
    match args.run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(EXIT_FAILURE),
        Err(error) => {
            eprintln!("error: {}", one_line(error.as_ref()));
            ExitCode::from(EXIT_NOT_CHECKED)
        }
    }
}
