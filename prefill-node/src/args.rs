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
    /// Share of the KV blocks that idle open prefills may hold, in [0, 1]. One prefill is always kept. Requests in mode refresh and exact have such
    /// prefills. Prompts that need room end them in any case.
    #[arg(long, env = "OVERFILL_OPEN_KV_SHARE", default_value_t = 0.5, help_heading = "Scheduling")]
    pub open_kv_share: f64,
    /// Maximum time in seconds that an open prefill waits for its next extension.
    #[arg(long, env = "OVERFILL_OPEN_IDLE_SECONDS", default_value_t = 30.0, help_heading = "Scheduling")]
    pub open_idle_seconds: f64,
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
    /// Share of the KV blocks that idle open prefills may hold.
    pub open_kv_share: f64,
    /// Maximum time between two extensions of an open prefill.
    pub open_idle: Duration,
}

impl Args {
    /// Checks all settings.
    ///
    /// # Errors
    /// All invalid settings, not only the first one.
    pub fn validate(self) -> Result<Config, Vec<ConfigError>> {
        let Self { node, max_batch_tokens, step_target_seconds, max_running, open_kv_share, open_idle_seconds } = self;
        let f = &mut Vec::new();
        let node = node.validate(Rows::Many, f);
        let batch_ok = (BLOCK_TOKENS..=65536).contains(&max_batch_tokens);
        ConfigError::check(f, batch_ok, "max-batch-tokens", format!("in [{BLOCK_TOKENS}, 65536]"), max_batch_tokens);
        let step_target = positive_seconds(f, "step-target-seconds", step_target_seconds);
        ConfigError::check(f, (1..=4096).contains(&max_running), "max-running", "in [1, 4096]", max_running);
        let share_ok = (0.0..=1.0).contains(&open_kv_share);
        ConfigError::check(f, share_ok, "open-kv-share", "in [0, 1]", open_kv_share);
        let open_idle = positive_seconds(f, "open-idle-seconds", open_idle_seconds);
        match (node, step_target, open_idle) {
            (Some(mut node), Some(step_target), Some(open_idle)) if f.is_empty() => {
                // A step has at most this many prompts, and as many extensions.
                (node.load.max_rows, node.load.max_sequences) = (max_batch_tokens, 2 * max_running);
                Ok(Config { node, max_batch_tokens, step_target, max_running, open_kv_share, open_idle })
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
        let line = "x --model /no/such --listen nowhere --max-running 0 --max-batch-tokens 1 --step-target-seconds 0 --open-kv-share 2 --open-idle-seconds 0";
        let faults = Cli::parse_from(line.split(' ')).args.validate().unwrap_err();
        let flags: Vec<_> = faults.iter().map(|f| f.flag).collect();
        assert_eq!(
            flags,
            [
                "model",
                "listen",
                "max-batch-tokens",
                "step-target-seconds",
                "max-running",
                "open-kv-share",
                "open-idle-seconds"
            ]
        );
        assert_eq!(faults[4].to_string(), "--max-running must be in [1, 4096], got 0");
    }
}
