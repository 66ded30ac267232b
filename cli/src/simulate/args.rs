//! The command line of `overfill simulate`.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Result, ensure};
use clap::Args;
use overfill_kv::Role;

use crate::bench::{count, positive, seconds};
use crate::plan::args::{LoadArgs, SettingArgs};

const AFTER_HELP: &str = "\
Examples:
  overfill simulate --profile profile.json --rate 2 --prefill-nodes 2 --decode-nodes 1
  overfill simulate --profile profile.json --rate 2 --at 120=rate:12 --prefill-max-nodes 8 --decode-max-nodes 8 --svg run.svg
  overfill simulate --profile h100.json --decode-profile l40s.json --trace mooncake.jsonl --prefill-nodes 4 --decode-nodes 6 --jsonl run.jsonl
  overfill simulate --profile profile.json --rate 4 --prefill-nodes 2 --decode-nodes 2 --at 60=kill:prefill --at 120=rollout:decode";

/// What is simulated.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct SimulateArgs {
    #[command(flatten)]
    pub load: LoadArgs,
    /// Time in which requests arrive.
    #[arg(long, default_value_t = 300.0, value_parser = seconds, value_name = "SECONDS", help_heading = "Load")]
    pub duration_seconds: f64,
    /// Something that happens at a time in seconds: rate:R, kill:ROLE or rollout:ROLE. May be repeated.
    #[arg(long, value_name = "SECONDS=EVENT", help_heading = "Load")]
    pub at: Vec<Timed>,
    #[command(flatten)]
    pub cluster: ClusterArgs,
    #[command(flatten)]
    pub scaling: ScalingArgs,
    #[command(flatten)]
    pub router: RouterArgs,
    #[command(flatten)]
    pub settings: SettingArgs,
    #[command(flatten)]
    pub output: OutputArgs,
    /// Random seed.
    #[arg(long, default_value_t = 0, help_heading = "Simulation")]
    pub seed: u64,
}

/// Machines and nodes.
#[derive(Args)]
#[command(next_help_heading = "Nodes")]
pub struct ClusterArgs {
    /// Measurements of a machine, written by `overfill bench profile`.
    #[arg(long, value_name = "FILE")]
    pub profile: PathBuf,
    /// Measurements of the decode nodes' machine, if it is another one.
    #[arg(long, value_name = "FILE")]
    pub decode_profile: Option<PathBuf>,
    /// Number of prefill nodes at the start.
    #[arg(long, default_value_t = 1, value_name = "COUNT")]
    pub prefill_nodes: usize,
    /// Number of decode nodes at the start.
    #[arg(long, default_value_t = 1, value_name = "COUNT")]
    pub decode_nodes: usize,
    /// All nodes share one machine, as with `overfill up`. To compare a simulation with a measurement.
    #[arg(long)]
    pub one_machine: bool,
    /// Time until a pod runs. The time in which its model is loaded comes from the profile.
    #[arg(long, default_value_t = 10.0, value_parser = seconds, value_name = "SECONDS")]
    pub pod_start_seconds: f64,
    /// Maximum number of requests that wait on a node.
    #[arg(long, default_value_t = 256, value_parser = count, value_name = "REQUESTS")]
    pub node_max_waiting: usize,
}

/// Autoscaling, with the chart's defaults.
#[derive(Args)]
#[command(next_help_heading = "Autoscaling")]
pub struct ScalingArgs {
    /// Most prefill nodes. Switches the pool's autoscaler on.
    #[arg(long, value_parser = count, value_name = "COUNT")]
    pub prefill_max_nodes: Option<usize>,
    /// Fewest prefill nodes.
    #[arg(long, default_value_t = 1, requires = "prefill_max_nodes", value_name = "COUNT")]
    pub prefill_min_nodes: usize,
    /// Backlog that a prefill node should have.
    #[arg(long, default_value_t = 1.0, requires = "prefill_max_nodes", value_parser = seconds, value_name = "SECONDS")]
    pub prefill_target_seconds: f64,
    /// Most decode nodes. Switches the pool's autoscaler on.
    #[arg(long, value_parser = count, value_name = "COUNT")]
    pub decode_max_nodes: Option<usize>,
    /// Fewest decode nodes.
    #[arg(long, default_value_t = 1, requires = "decode_max_nodes", value_name = "COUNT")]
    pub decode_min_nodes: usize,
    /// Load that a decode node should have. 1 is full.
    #[arg(long, default_value_t = 0.8, requires = "decode_max_nodes", value_parser = positive, value_name = "LOAD")]
    pub decode_target: f64,
    /// The router's limit of the inter-token latency for scaling decode nodes.
    #[arg(long, requires = "decode_max_nodes", value_parser = seconds, value_name = "SECONDS")]
    pub scaling_itl_limit_seconds: Option<f64>,
    /// A pool shrinks when it has been too large for this long.
    #[arg(long, default_value_t = 300.0, value_parser = seconds, value_name = "SECONDS")]
    pub scale_down_seconds: f64,
}

/// Settings of the router, with its own defaults.
#[derive(Args)]
#[command(next_help_heading = "Settings of the router")]
pub struct RouterArgs {
    /// Maximum number of running requests.
    #[arg(long, default_value_t = 256, value_parser = count, value_name = "REQUESTS")]
    pub max_running: usize,
    /// Maximum number of waiting requests.
    #[arg(long, default_value_t = 1024, value_parser = count, value_name = "REQUESTS")]
    pub max_waiting: usize,
    /// Maximum wait of a request for its turn, or for a node with room.
    #[arg(long, default_value_t = 60.0, value_parser = seconds, value_name = "SECONDS")]
    pub max_queue_seconds: f64,
    /// Time limit of a request.
    #[arg(long, default_value_t = 600.0, value_parser = seconds, value_name = "SECONDS")]
    pub deadline_seconds: f64,
}

/// What is written.
#[derive(Args)]
#[command(next_help_heading = "Output")]
pub struct OutputArgs {
    /// Limit of the TTFT of a good request.
    #[arg(long, value_parser = seconds, value_name = "SECONDS")]
    pub ttft_limit_seconds: Option<f64>,
    /// Limit of the mean ITL of a good request.
    #[arg(long, value_parser = seconds, value_name = "SECONDS")]
    pub itl_limit_seconds: Option<f64>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Write every second of the cluster and every request to this file.
    #[arg(long, value_name = "FILE")]
    pub jsonl: Option<PathBuf>,
    /// Draw load, nodes, queue and latencies over time into this file.
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

/// Something that happens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Event {
    /// From now on, requests come at this rate per second.
    Rate(f64),
    /// The oldest node of the role is gone.
    Kill(Role),
    /// All nodes of the role are replaced.
    Rollout(Role),
}

/// An event and its time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timed {
    /// Seconds since the start.
    pub seconds: f64,
    /// What happens.
    pub event: Event,
}

impl FromStr for Timed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = || format!("must be SECONDS=rate:R, SECONDS=kill:ROLE or SECONDS=rollout:ROLE, got {text:?}");
        let (at, event) = text.split_once('=').ok_or_else(form)?;
        let (kind, value) = event.split_once(':').ok_or_else(form)?;
        let role = || match value {
            "prefill" => Ok(Role::Prefill),
            "decode" => Ok(Role::Decode),
            _ => Err(format!("the role must be prefill or decode, got {value:?}")),
        };
        let event = match kind {
            "rate" => Event::Rate(positive(value).map_err(|e| format!("the rate {e}"))?),
            "kill" => Event::Kill(role()?),
            "rollout" => Event::Rollout(role()?),
            _ => return Err(form()),
        };
        Ok(Self { seconds: seconds(at).map_err(|e| format!("the time {e}"))?, event })
    }
}

impl SimulateArgs {
    /// Checks what one flag alone does not show.
    ///
    /// # Errors
    /// Flags contradict each other.
    pub fn check(&self) -> Result<()> {
        self.settings.check()?;
        let (cluster, scaling) = (&self.cluster, &self.scaling);
        for (role, nodes, min, max) in [
            ("prefill", cluster.prefill_nodes, scaling.prefill_min_nodes, scaling.prefill_max_nodes),
            ("decode", cluster.decode_nodes, scaling.decode_min_nodes, scaling.decode_max_nodes),
        ] {
            let Some(max) = max else {
                ensure!(nodes > 0, "--{role}-nodes must be at least 1 without autoscaling, got 0");
                continue;
            };
            ensure!(min <= max, "--{role}-min-nodes must be at most --{role}-max-nodes, {max}, got {min}");
            ensure!((min..=max).contains(&nodes), "--{role}-nodes must be in [{min}, {max}], got {nodes}");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_have_a_time_and_a_kind() {
        let parse = |text: &str| text.parse::<Timed>();
        assert_eq!(parse("60=kill:decode"), Ok(Timed { seconds: 60.0, event: Event::Kill(Role::Decode) }));
        assert_eq!(parse("1.5=rate:3"), Ok(Timed { seconds: 1.5, event: Event::Rate(3.0) }));
        assert_eq!(parse("9=rollout:prefill"), Ok(Timed { seconds: 9.0, event: Event::Rollout(Role::Prefill) }));
        assert!(parse("60=stop").unwrap_err().starts_with("must be SECONDS=rate:R"));
        assert_eq!(parse("x=kill:decode").unwrap_err(), "the time invalid float literal");
        assert_eq!(parse("1=kill:router").unwrap_err(), "the role must be prefill or decode, got \"router\"");
    }
}
