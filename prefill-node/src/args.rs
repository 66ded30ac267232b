//! Settings of a prefill node: the command line arguments and their checked form.

use std::time::Duration;

use overfill_cluster::ConfigError;
use overfill_kv::BLOCK_TOKENS;
use overfill_model::Rows;
use overfill_node::{NodeArgs, NodeConfig, positive_seconds};

/// A node that computes prompts with the full model and hands over their KV.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// What both roles have.
    #[command(flatten)]
    pub node: NodeArgs,
    /// Maximum number of prompt tokens in one step.
    #[arg(long, env = "OVERFILL_MAX_BATCH_TOKENS", default_value_t = 512, help_heading = "Scheduling")]
    pub max_batch_tokens: usize,
    /// Target time of one step, in seconds. A new prompt waits for the running step, so slow steps get fewer tokens, but at
    /// least 64 (or --max-batch-tokens).
    #[arg(long, env = "OVERFILL_STEP_TARGET_SECONDS", default_value_t = 1.0, help_heading = "Scheduling")]
    pub step_target_seconds: f64,
    /// Maximum number of prompts in progress.
    #[arg(long, env = "OVERFILL_MAX_RUNNING", default_value_t = 16, help_heading = "Scheduling")]
    pub max_running: usize,
}

/// Checked settings of a prefill node.
#[derive(Clone, Debug)]
pub struct Config {
    /// Settings that both roles have.
    pub node: NodeConfig,
    /// Maximum number of prompt tokens in one step.
    pub max_batch_tokens: usize,
    /// Target time of one step.
    pub step_target: Duration,
    /// Maximum number of prompts in progress.
    pub max_running: usize,
}

impl Args {
    /// Checks all settings.
    ///
    /// # Errors
    /// All invalid settings, not only the first one.
    pub fn validate(self) -> Result<Config, Vec<ConfigError>> {
        let Self { node, max_batch_tokens, step_target_seconds, max_running } = self;
        let f = &mut Vec::new();
        let node = node.validate(Rows::Many, f);
        let batch_ok = (BLOCK_TOKENS..=65536).contains(&max_batch_tokens);
        ConfigError::check(f, batch_ok, "max-batch-tokens", format!("in [{BLOCK_TOKENS}, 65536]"), max_batch_tokens);
        let step_target = positive_seconds(f, "step-target-seconds", step_target_seconds);
        ConfigError::check(f, (1..=4096).contains(&max_running), "max-running", "in [1, 4096]", max_running);
        match (node, step_target) {
            (Some(mut node), Some(step_target)) if f.is_empty() => {
                (node.load.max_rows, node.load.max_sequences) = (max_batch_tokens, max_running);
                Ok(Config { node, max_batch_tokens, step_target, max_running })
            }
            _ => Err(std::mem::take(f)),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn every_fault_is_reported_at_once() {
        let line = "x --model /no/such --listen nowhere --max-running 0 --max-batch-tokens 1 --step-target-seconds 0";
        let faults = Cli::parse_from(line.split(' ')).args.validate().unwrap_err();
        let flags: Vec<_> = faults.iter().map(|f| f.flag).collect();
        assert_eq!(flags, ["model", "listen", "max-batch-tokens", "step-target-seconds", "max-running"]);
        assert_eq!(faults[4].to_string(), "--max-running must be in [1, 4096], got 0");
    }
}
