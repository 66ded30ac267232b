//! The command line of `overfill plan`, and the planner that it describes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use overfill_kv::BLOCK_TOKENS;

use super::cluster::{EngineLimits, Layout, NodeModel};
use super::goals::{Goals, Limit};
use super::mix::{Mix, Source};
use super::profile::Profile;
use super::size::Planner;
use super::trace::Trace;
use crate::bench::serve::load::Lengths;
use crate::bench::{count, positive, seconds};

/// Most requests per second.
const MOST_RATE: f64 = 1e6;
/// A router limits the running sequences of a model. A plan assumes that its limit does not bind, and says what it must be.
const UNLIMITED: usize = 1 << 24;

const AFTER_HELP: &str = "\
TTFT is the time to the first token, ITL the time between tokens. ITL percentiles are over all tokens of all answers.
At least one limit of each is needed. The smallest number of nodes that meets all limits is printed.

Examples:
  overfill bench profile --full DIR --decode DIR --out profile.json
  overfill plan --profile profile.json --rate 4 --ttft-p95-seconds 1 --itl-p95-seconds 0.1
  overfill plan --profile h100.json --decode-profile l40s.json --prefill-node-price 4 --decode-node-price 1.2 --trace mooncake.jsonl --ttft-p95-seconds 2 --itl-p99-seconds 0.05 --values values.yaml
  overfill plan --profile profile.json --rate 10 --prompt-tokens lognormal:400,2000,8000 --output-tokens uniform:16,512 --prefix-hit-rate 0.3 --ttft-p99-seconds 3 --itl-p95-seconds 0.1 --json
  overfill plan --profile demo.json --rate 20 --prefill-nodes 1 --decode-nodes 1 --one-machine --prompt-tokens 64 --ttft-p95-seconds 1 --itl-p95-seconds 0.1";

/// The load, the limits and the machines.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct PlanArgs {
    #[command(flatten)]
    load: LoadArgs,
    /// Share of additional load that the nodes must bear within the limits.
    #[arg(long, default_value_t = 0.2, value_parser = headroom, value_name = "SHARE", help_heading = "Load")]
    headroom: f64,
    #[command(flatten)]
    limits: LimitArgs,
    #[command(flatten)]
    hardware: HardwareArgs,
    #[command(flatten)]
    settings: SettingArgs,
    /// Number of prefill nodes. With it, nothing is searched: the plan says what these nodes do.
    #[arg(long, requires = "decode_nodes", value_parser = count, value_name = "COUNT", help_heading = "A given cluster")]
    prefill_nodes: Option<usize>,
    /// Number of decode nodes.
    #[arg(long, requires = "prefill_nodes", value_parser = count, value_name = "COUNT", help_heading = "A given cluster")]
    decode_nodes: Option<usize>,
    /// All nodes share one machine, as with `overfill up`. To compare a plan with a measurement.
    #[arg(long, requires = "prefill_nodes", help_heading = "A given cluster")]
    one_machine: bool,
    /// Measured requests of each simulated run, at least. More requests make high percentiles more exact.
    #[arg(long, default_value_t = 2000, value_parser = count, value_name = "COUNT", help_heading = "Simulation")]
    requests: usize,
    /// Random seed.
    #[arg(long, default_value_t = 0, help_heading = "Simulation")]
    seed: u64,
    /// Print JSON.
    #[arg(long, help_heading = "Output")]
    pub json: bool,
    /// Also write values for the Helm chart to this file.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub values: Option<PathBuf>,
    /// Name of the pair in the chart's `models`.
    #[arg(long, default_value = "demo", value_name = "NAME", help_heading = "Output")]
    pub values_model: String,
    /// Write fixed numbers of nodes to the values, and no autoscaling.
    #[arg(long, requires = "values", help_heading = "Output")]
    pub fixed_replicas: bool,
}

/// The requests.
#[derive(Args)]
#[command(next_help_heading = "Load")]
pub struct LoadArgs {
    /// Requests per second [default: those of the trace]
    #[arg(long, value_parser = positive)]
    rate: Option<f64>,
    /// Prompt length in tokens: N, uniform:LOW,HIGH or lognormal:MEDIAN,P95[,MAX].
    #[arg(long, default_value_t = Lengths::Fixed(512), value_name = "LENGTH")]
    prompt_tokens: Lengths,
    /// Answer length in tokens, in the same forms.
    #[arg(long, default_value_t = Lengths::Fixed(128), value_name = "LENGTH")]
    output_tokens: Lengths,
    /// Recorded requests in place of random ones: JSON lines (Mooncake, bench serve --record) or CSV (Azure).
    #[arg(long, conflicts_with_all = ["prompt_tokens", "output_tokens"], value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Share of prompt tokens found in the prefix cache, in [0, 1] [default: the trace's share; 0 without a trace]
    #[arg(long, value_parser = share, value_name = "SHARE")]
    prefix_hit_rate: Option<f64>,
}

impl LoadArgs {
    /// Reads the trace, if there is one. Returns the requests, and how many come per second. `cached_tokens`: capacity
    /// of a prefix cache, from which the hits of a trace follow.
    ///
    /// # Errors
    /// The trace can't be read, or the rate is missing or too high.
    pub fn mix(&self, cached_tokens: usize) -> Result<(Mix, f64)> {
        let source = match &self.trace {
            Some(file) => Source::Trace(Trace::read(file, cached_tokens)?),
            None => Source::Drawn { prompt: self.prompt_tokens, output: self.output_tokens },
        };
        let mix = Mix { source, hit_rate: self.prefix_hit_rate, prompt_factor: 1.0, output_factor: 1.0 };
        let rate = self.rate.or(mix.own_rate()).context("--rate is needed, unless --trace has times")?;
        ensure!(rate <= MOST_RATE, "--rate must be at most {MOST_RATE}, got {rate}");
        Ok((mix, rate))
    }
}

/// Limits of latencies.
#[derive(Args)]
#[command(next_help_heading = "Limits")]
struct LimitArgs {
    /// Limit of the median TTFT.
    #[arg(long, value_parser = seconds, value_name = "SECONDS")]
    ttft_p50_seconds: Option<f64>,
    /// Limit of the 90th percentile of TTFT.
    #[arg(long, value_parser = seconds, value_name = "SECONDS")]
    ttft_p90_seconds: Option<f64>,
    /// Limit of the 95th percentile of TTFT.
    #[arg(long, value_parser = seconds, value_name = "SECONDS")]
    ttft_p95_seconds: Option<f64>,
    /// Limit of the 99th percentile of TTFT.
    #[arg(long, value_parser = seconds, value_name = "SECONDS")]
    ttft_p99_seconds: Option<f64>,
    /// Limit of the median ITL.
    #[arg(long, value_parser = seconds, value_name = "SECONDS")]
    itl_p50_seconds: Option<f64>,
    /// Limit of the 90th percentile of ITL.
    #[arg(long, value_parser = seconds, value_name = "SECONDS")]
    itl_p90_seconds: Option<f64>,
    /// Limit of the 95th percentile of ITL.
    #[arg(long, value_parser = seconds, value_name = "SECONDS")]
    itl_p95_seconds: Option<f64>,
    /// Limit of the 99th percentile of ITL.
    #[arg(long, value_parser = seconds, value_name = "SECONDS")]
    itl_p99_seconds: Option<f64>,
}

/// Machines and prices.
#[derive(Args)]
#[command(next_help_heading = "Machines")]
struct HardwareArgs {
    /// Measurements of a machine, written by `overfill bench profile`.
    #[arg(long, value_name = "FILE")]
    profile: PathBuf,
    /// Measurements of the decode nodes' machine, if it is another one.
    #[arg(long, value_name = "FILE")]
    decode_profile: Option<PathBuf>,
    /// A profile for the what-if table, for example int8=int8.json. May be repeated.
    #[arg(long, value_name = "NAME=FILE", value_parser = named)]
    alternative: Vec<(String, PathBuf)>,
    /// Price of a prefill node per hour. Without prices, costs are in node-hours.
    #[arg(long, requires = "decode_node_price", value_parser = positive, value_name = "PRICE")]
    prefill_node_price: Option<f64>,
    /// Price of a decode node per hour.
    #[arg(long, requires = "prefill_node_price", value_parser = positive, value_name = "PRICE")]
    decode_node_price: Option<f64>,
}

/// Settings of the nodes, with their own defaults.
#[derive(Args)]
#[command(next_help_heading = "Settings of the nodes")]
pub struct SettingArgs {
    /// Maximum number of prompt tokens in one step of a prefill node.
    #[arg(long, default_value_t = 512, value_parser = count, value_name = "TOKENS")]
    pub max_batch_tokens: usize,
    /// Target time of one step of a prefill node.
    #[arg(long, default_value_t = 1.0, value_parser = seconds, value_name = "SECONDS")]
    pub step_target_seconds: f64,
    /// Maximum number of prompts in progress on a prefill node.
    #[arg(long, default_value_t = 16, value_parser = count, value_name = "PROMPTS")]
    pub prefill_max_running: usize,
    /// Maximum number of requests that hold blocks on a decode node.
    #[arg(long, default_value_t = 32, value_parser = count, value_name = "REQUESTS")]
    pub decode_max_running: usize,
    /// Capacity of the KV cache of a node, in tokens [default: the profile's capacity]
    #[arg(long, value_parser = count, value_name = "TOKENS")]
    pub kv_pool_tokens: Option<usize>,
}

impl SettingArgs {
    /// Checks the settings.
    ///
    /// # Errors
    /// The first setting that is out of range.
    pub fn check(&self) -> Result<()> {
        let least = |flag: &str, tokens: usize| {
            ensure!(tokens >= BLOCK_TOKENS, "{flag} must be at least {BLOCK_TOKENS}, got {tokens}");
            Ok(())
        };
        least("--max-batch-tokens", self.max_batch_tokens)?;
        self.kv_pool_tokens.map_or(Ok(()), |tokens| least("--kv-pool-tokens", tokens))
    }

    /// Limits of the engines, with this limit of the router.
    pub fn limits(&self, router_running: usize) -> EngineLimits {
        EngineLimits {
            max_batch_tokens: self.max_batch_tokens,
            step_target: Duration::from_secs_f64(self.step_target_seconds),
            prefill_running: self.prefill_max_running,
            decode_running: self.decode_max_running,
            router_running,
        }
    }

    /// Reads a profile and applies the settings to it.
    ///
    /// # Errors
    /// The profile can't be read.
    pub fn profile(&self, file: &Path) -> Result<Profile> {
        let profile = Profile::read(file)?;
        Ok(Profile { kv_pool_tokens: self.kv_pool_tokens.unwrap_or(profile.kv_pool_tokens), ..profile })
    }

    /// Reads the profiles of the prefill nodes' and of the decode nodes' machine, which may be the same.
    ///
    /// # Errors
    /// A profile can't be read, or they are not of the same pair.
    pub fn profiles(&self, file: &Path, decode_file: Option<&Path>) -> Result<(Profile, Profile)> {
        let prefill = self.profile(file)?;
        let decode = decode_file.map_or_else(|| Ok(prefill.clone()), |file| self.profile(file))?;
        let (a, b) = (prefill.kv_bytes_per_token, decode.kv_bytes_per_token);
        ensure!(
            a == b,
            "kv_bytes_per_token must be the same in both profiles, got {a} and {b}: they are of other models or KV types"
        );
        Ok((prefill, decode))
    }
}

fn share(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|e| format!("{e}"))?;
    if (0.0..=1.0).contains(&value) { Ok(value) } else { Err(format!("must be in [0, 1], got {value}")) }
}

fn headroom(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|e| format!("{e}"))?;
    if (0.0..=10.0).contains(&value) { Ok(value) } else { Err(format!("must be in [0, 10], got {value}")) }
}

fn named(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, file)) if !name.is_empty() && !file.is_empty() => Ok((name.into(), file.into())),
        _ => Err(format!("must be NAME=FILE, got {text:?}")),
    }
}

impl LimitArgs {
    fn goals(&self) -> Result<Goals> {
        let list = |limits: [(f64, Option<f64>); 4]| -> Vec<Limit> {
            limits.into_iter().filter_map(|(share, limit)| Some(Limit { share, seconds: limit? })).collect()
        };
        let goals = Goals {
            ttft: list([
                (0.5, self.ttft_p50_seconds),
                (0.9, self.ttft_p90_seconds),
                (0.95, self.ttft_p95_seconds),
                (0.99, self.ttft_p99_seconds),
            ]),
            itl: list([
                (0.5, self.itl_p50_seconds),
                (0.9, self.itl_p90_seconds),
                (0.95, self.itl_p95_seconds),
                (0.99, self.itl_p99_seconds),
            ]),
        };
        for (name, limits) in [("ttft", &goals.ttft), ("itl", &goals.itl)] {
            ensure!(!limits.is_empty(), "at least one limit of {name} is needed, for example --{name}-p95-seconds 1");
        }
        Ok(goals)
    }
}

/// A plan to make, as the command line describes it.
pub struct Task {
    /// The planner.
    pub planner: Planner,
    /// The same planner with other profiles, by name.
    pub alternatives: Vec<(String, Planner)>,
    /// Requests per second.
    pub rate: f64,
    /// Share of additional load.
    pub headroom: f64,
    /// Whether prices were given.
    pub priced: bool,
    /// Seconds from the start of a prefill node and of a decode node until it can serve.
    pub start_seconds: (f64, f64),
    /// The machines of prefill and decode nodes.
    pub machines: (String, String),
    /// Capacity of the KV cache of a prefill node and of a decode node, in tokens.
    pub kv_pool_tokens: (usize, usize),
    /// Settings of the nodes.
    pub settings: SettingArgs,
    /// The nodes of a given cluster.
    pub given: Option<Layout>,
}

impl PlanArgs {
    /// Reads all files and checks all settings.
    ///
    /// # Errors
    /// A file can't be read, or settings are missing or contradict each other.
    pub fn task(self) -> Result<Task> {
        let goals = self.limits.goals()?;
        let settings = &self.settings;
        settings.check()?;
        let (prefill, decode) = settings.profiles(&self.hardware.profile, self.hardware.decode_profile.as_deref())?;
        let (mix, rate) = self.load.mix(prefill.kv_pool_tokens)?;
        let limits = settings.limits(UNLIMITED);
        let prices = self.hardware.prefill_node_price.zip(self.hardware.decode_node_price);
        let planner = |prefill: &Profile, decode: &Profile| -> Result<Planner> {
            let none = "the profile lists no steps";
            Ok(Planner {
                full: NodeModel::new(prefill, &prefill.full).context(none)?,
                pruned: prefill.pruned.as_ref().and_then(|model| NodeModel::new(prefill, model)),
                decode: NodeModel::new(decode, decode.decoder()).context(none)?,
                transfer_bytes_per_second: prefill.transfer_bytes_per_second.min(decode.transfer_bytes_per_second),
                kv_bytes_per_token: prefill.kv_bytes_per_token,
                limits,
                mix: mix.clone(),
                goals: goals.clone(),
                prices: prices.unwrap_or((1.0, 1.0)),
                requests: self.requests,
                seed: self.seed,
                one_machine: self.one_machine,
            })
        };
        let alternatives = self.hardware.alternative.iter().map(|(name, file)| {
            let profile = settings.profile(file)?;
            Ok((name.clone(), planner(&profile, &profile)?))
        });
        Ok(Task {
            planner: planner(&prefill, &decode)?,
            alternatives: alternatives.collect::<Result<_>>()?,
            rate,
            headroom: self.headroom,
            priced: prices.is_some(),
            start_seconds: (prefill.full.start_seconds, decode.decoder().start_seconds),
            machines: (prefill.machine.clone(), decode.machine.clone()),
            kv_pool_tokens: (prefill.kv_pool_tokens, decode.kv_pool_tokens),
            settings: self.settings,
            given: self
                .prefill_nodes
                .zip(self.decode_nodes)
                .map(|(prefill, decode)| Layout::TwoStage { prefill, decode }),
        })
    }
}
