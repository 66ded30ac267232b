//! The subcommands that make and judge models, as `overfill_distill` defines them.

use std::process::ExitCode;

use clap::Subcommand;
use overfill_cluster::{EXIT_FAILURE, LogFormat, init_telemetry, process::one_line};
use overfill_distill::{check::cli::CheckArgs, cli};

/// Exit code of a check that could not be made: that is no failed check.
const EXIT_NOT_CHECKED: u8 = 2;

/// From a full model to a decode model, and what came of it.
#[derive(Subcommand)]
pub enum ModelCommand {
    /// Cut a model's width (and depth) by the importance of its channels.
    Prune(Box<cli::PruneArgs>),
    /// Fine-tune a pruned model under the frozen full model's KV, or train any model alone.
    Distill(Box<cli::DistillArgs>),
    /// Score models on held-out prompts: greedy exact match and cross-entropy.
    Eval(Box<cli::EvalArgs>),
    /// Is a model computed right? Compare log-probabilities with those of an independent implementation.
    Check(Box<CheckArgs>),
    /// Write the demo task's data, tokenizer and configuration.
    DemoData(cli::DemoDataArgs),
    /// Make the demo pair from nothing: data, full model, pruning, fine-tuning, scores.
    DemoPair(cli::DemoPairArgs),
    /// Measure the arms by fine-tuning budget on the demo's task.
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
