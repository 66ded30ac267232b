//! `overfill bench`: measures this machine. Each figure is printed with the figure to compare it with.

mod engine;
mod formats;
mod geometry;
mod gpu;
mod handoff;
mod kernels;
mod models;
mod modes;
mod nodes;
mod profile;
mod report;
mod router;
pub mod serve;
mod train;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use overfill_cluster::{LogFormat, init_telemetry};

use models::ModelArgs;
use report::Report;

const AFTER_HELP: &str = "\
Without a command, bench runs engine, overlap, handoff and router.

Examples:
  overfill bench
  overfill bench --runs 1 --json
  overfill bench engine --batch 1,8
  overfill bench serve --requests 50";

const ENGINE_HELP: &str = "\
Examples:
  overfill bench engine --batch 1,8 --weights int8
  overfill bench engine --geometry small --prefill-tokens 2048 --runs 1
  overfill bench engine --geometry llama-3.2-3b,llama-3.2-3b-overfill --models-dir random-models";

const HANDOFF_HELP: &str = "\
Examples:
  overfill bench handoff
  overfill bench handoff --handoff-mebibytes 64 --rounds 20 --json
  overfill bench handoff --kv-transport rdma --kv-rdma-device mlx5_0
  overfill bench handoff --device cuda:0 --to-device cuda:1";

const OVERLAP_HELP: &str = "\
Examples:
  overfill bench overlap
  overfill bench overlap --geometry small --prompt-tokens 512 --runs 5";

const TRAIN_HELP: &str = "\
Examples:
  overfill bench train --geometry smollm2-135m,smollm2-135m-overfill
  overfill bench train --examples 16 --prompt-tokens 64 --response-tokens 32";

const ROUTER_HELP: &str = "\
Examples:
  overfill bench router
  overfill bench router --runs 10 --json";

/// Measures the engine, the KV handoff and the router, or puts load on a running cluster.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true, after_help = AFTER_HELP)]
pub struct BenchArgs {
    /// The measurement to run [default: engine, overlap, handoff and router]
    #[command(subcommand)]
    part: Option<Part>,
    #[command(flatten)]
    models: ModelArgs,
    #[command(flatten)]
    sizes: engine::Sizes,
    #[command(flatten)]
    handoff: handoff::HandoffSize,
    #[command(flatten)]
    overlap: nodes::OverlapSize,
    #[command(flatten)]
    runs: Runs,
    #[command(flatten)]
    output: Output,
}

#[derive(Subcommand)]
enum Part {
    /// Measure prefill and decode speed, memory, and two stages against one.
    #[command(after_help = ENGINE_HELP)]
    Engine {
        #[command(flatten)]
        models: ModelArgs,
        #[command(flatten)]
        sizes: engine::Sizes,
        #[command(flatten)]
        runs: Runs,
        #[command(flatten)]
        output: Output,
    },
    /// Measure the KV handoff over a transport against a plain copy of the same kind and a memory copy.
    #[command(after_help = HANDOFF_HELP)]
    Handoff {
        #[command(flatten)]
        size: handoff::HandoffSize,
        #[command(flatten)]
        handoff: handoff::HandoffArgs,
        /// Number of rounds. The medians are reported.
        #[arg(
            long,
            default_value_t = HANDOFF_ROUNDS,
            value_parser = count,
            value_name = "COUNT",
            help_heading = "Measurement"
        )]
        rounds: usize,
        #[command(flatten)]
        output: Output,
    },
    /// Measure the time that a handoff adds to a prefill.
    #[command(after_help = OVERLAP_HELP)]
    Overlap {
        #[command(flatten)]
        models: ModelArgs,
        #[command(flatten)]
        overlap: nodes::OverlapSize,
        #[command(flatten)]
        runs: Runs,
        #[command(flatten)]
        output: Output,
    },
    /// Measure training of the second model under the first one, and calibration, against this machine's matrix products.
    #[command(after_help = TRAIN_HELP)]
    Train {
        #[command(flatten)]
        models: ModelArgs,
        #[command(flatten)]
        size: train::TrainSize,
        #[command(flatten)]
        runs: Runs,
        #[command(flatten)]
        output: Output,
    },
    /// Measure the latency that the router adds per request and per token.
    #[command(after_help = ROUTER_HELP)]
    Router {
        #[command(flatten)]
        runs: Runs,
        #[command(flatten)]
        output: Output,
    },
    /// Measure each kernel as a share of this machine's memory bandwidth and peak arithmetic.
    Kernels(kernels::KernelsArgs),
    /// Measure an NVIDIA GPU: decode, prefill and handoffs, against what the GPU can do.
    Gpu(Box<gpu::GpuArgs>),
    /// Measure exact match and cross-entropy of a pair in each weight format.
    Formats(formats::FormatsArgs),
    /// Measure each mode against the full model alone, at given rates of accepted drafts.
    Modes(Box<modes::ModesArgs>),
    /// Measure what `overfill plan` needs to know about this machine and a pair of models.
    Profile(Box<profile::ProfileArgs>),
    /// Put load on a running router over its OpenAI API, and report latency and throughput.
    Serve(Box<serve::ServeArgs>),
}

#[derive(Args)]
#[command(next_help_heading = "Measurement")]
struct Runs {
    /// Runs of each measurement. The median is reported.
    #[arg(long, default_value_t = 3, value_parser = count, value_name = "COUNT")]
    runs: usize,
}

#[derive(Args)]
#[command(next_help_heading = "Output")]
struct Output {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Rounds of the handoff measurement.
const HANDOFF_ROUNDS: usize = 10;
/// Largest count accepted on the command line.
const MOST_COUNT: usize = 10_000_000;
/// Longest time accepted on the command line: a week.
const MOST_SECONDS: f64 = 604_800.0;

/// Parses a number of at least 1.
///
/// # Errors
/// The text is no such number.
pub fn count(text: &str) -> Result<usize, String> {
    let value: usize = text.parse().map_err(|e| format!("{e}"))?;
    let ok = (1..=MOST_COUNT).contains(&value);
    if ok { Ok(value) } else { Err(format!("must be in [1, {MOST_COUNT}], got {value}")) }
}

/// Parses a time in seconds, above 0 and at most a week.
///
/// # Errors
/// The text is no such number.
pub fn seconds(text: &str) -> Result<f64, String> {
    let value = positive(text)?;
    if value <= MOST_SECONDS { Ok(value) } else { Err(format!("must be at most {MOST_SECONDS}, got {value}")) }
}

/// Parses a number above 0.
///
/// # Errors
/// The text is no such number.
pub fn positive(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|e| format!("{e}"))?;
    if value > 0.0 && value.is_finite() { Ok(value) } else { Err(format!("must be above 0, got {value}")) }
}

/// Runs the subcommand. Measurements block their threads, so this must be called outside any async runtime.
pub fn run(args: BenchArgs) -> Result<()> {
    init_telemetry(LogFormat::Text);
    let mut report = Report::default();
    let json = match args.part {
        None => {
            let models = args.models.prepare()?;
            engine::measure(&models.list, &args.models.options(), &args.sizes, args.runs.runs, &mut report)?;
            runtime()?.block_on(nodes::measure(&models, &args.models, &args.overlap, args.runs.runs, &mut report))?;
            let handoff = handoff::HandoffArgs::default();
            runtime()?.block_on(handoff::measure(&args.handoff, &handoff, HANDOFF_ROUNDS, &mut report))?;
            runtime()?.block_on(router::measure(args.runs.runs, &mut report))?;
            args.output.json
        }
        Some(Part::Engine { models, sizes, runs, output }) => {
            let prepared = models.prepare()?;
            engine::measure(&prepared.list, &models.options(), &sizes, runs.runs, &mut report)?;
            output.json
        }
        Some(Part::Overlap { models, overlap, runs, output }) => {
            let prepared = models.prepare()?;
            runtime()?.block_on(nodes::measure(&prepared, &models, &overlap, runs.runs, &mut report))?;
            output.json
        }
        Some(Part::Handoff { size, handoff, rounds, output }) => {
            runtime()?.block_on(handoff::measure(&size, &handoff, rounds, &mut report))?;
            output.json
        }
        Some(Part::Train { models, size, runs, output }) => {
            train::measure(&models, &size, runs.runs, &mut report)?;
            output.json
        }
        Some(Part::Router { runs, output }) => {
            runtime()?.block_on(router::measure(runs.runs, &mut report))?;
            output.json
        }
        Some(Part::Kernels(args)) => return kernels::run(&args),
        Some(Part::Gpu(args)) => return gpu::run(&args),
        Some(Part::Formats(args)) => return formats::run(&args),
        Some(Part::Modes(args)) => return runtime()?.block_on(modes::run(&args)),
        Some(Part::Profile(args)) => return profile::run(&args),
        Some(Part::Serve(args)) => return runtime()?.block_on(serve::run(*args)),
    };
    if json {
        println!("{}", report.json())
    } else {
        print!("{}", report.table())
    }
    Ok(())
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the async runtime")
}
