//! `overfill bench`: what the machine at hand does, each figure beside the one it should be compared with.

mod engine;
mod formats;
mod geometry;
mod kernels;
mod models;
mod nodes;
mod report;
mod router;
mod serve;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use overfill_cluster::{LogFormat, init_telemetry};

use models::ModelArgs;
use report::Report;

/// Measures the engine, the KV handoff and the router; or loads a running cluster.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct BenchArgs {
    /// Only this; engine, handoff, overlap and router if left out.
    #[command(subcommand)]
    part: Option<Part>,
    #[command(flatten)]
    models: ModelArgs,
    #[command(flatten)]
    sizes: engine::Sizes,
    #[command(flatten)]
    handoff: nodes::HandoffSize,
    #[command(flatten)]
    overlap: nodes::OverlapSize,
    #[command(flatten)]
    runs: Runs,
    #[command(flatten)]
    output: Output,
}

#[derive(Subcommand)]
enum Part {
    /// Prefill and decode tokens per second, memory, and two stages against one.
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
    /// KV over TCP, a bare TCP copy, and a memory copy.
    Handoff {
        #[command(flatten)]
        handoff: nodes::HandoffSize,
        #[command(flatten)]
        output: Output,
    },
    /// What a handoff adds to a prefill.
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
    /// What the router costs.
    Router {
        #[command(flatten)]
        runs: Runs,
        #[command(flatten)]
        output: Output,
    },
    /// Each product of a model by each kernel, against this machine's memory and arithmetic.
    Kernels(kernels::KernelsArgs),
    /// Exact match and cross-entropy by weight format, of both stages as they are served.
    Formats(formats::FormatsArgs),
    /// Load a running router over its OpenAI API, and report what its clients see.
    Serve(Box<serve::ServeArgs>),
}

#[derive(Args)]
struct Runs {
    /// Runs of each measurement; the median counts.
    #[arg(long, default_value_t = 3, value_parser = count)]
    runs: usize,
}

#[derive(Args)]
struct Output {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Most of anything that is counted on the command line.
const MOST_COUNT: usize = 10_000_000;
/// Longest time on the command line: a week.
const MOST_SECONDS: f64 = 604_800.0;

fn count(text: &str) -> Result<usize, String> {
    let value: usize = text.parse().map_err(|e| format!("{e}"))?;
    let ok = (1..=MOST_COUNT).contains(&value);
    if ok { Ok(value) } else { Err(format!("must be in [1, {MOST_COUNT}], got {value}")) }
}

fn seconds(text: &str) -> Result<f64, String> {
    let value = positive(text)?;
    if value <= MOST_SECONDS { Ok(value) } else { Err(format!("must be at most {MOST_SECONDS}, got {value}")) }
}

fn positive(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|e| format!("{e}"))?;
    if value > 0.0 && value.is_finite() { Ok(value) } else { Err(format!("must be above 0, got {value}")) }
}

/// Runs the subcommand. Measurements block threads of their own, so this is called outside any runtime.
pub fn run(args: BenchArgs) -> Result<()> {
    init_telemetry(LogFormat::Text);
    let mut report = Report::default();
    let json = match args.part {
        None => {
            let models = args.models.prepare()?;
            engine::measure(&models.list, &args.models.options(), &args.sizes, args.runs.runs, &mut report)?;
            runtime()?.block_on(nodes::measure(&models, &args.models, &args.overlap, args.runs.runs, &mut report))?;
            runtime()?.block_on(nodes::measure_handoff(&args.handoff, &mut report))?;
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
        Some(Part::Handoff { handoff, output }) => {
            runtime()?.block_on(nodes::measure_handoff(&handoff, &mut report))?;
            output.json
        }
        Some(Part::Router { runs, output }) => {
            runtime()?.block_on(router::measure(runs.runs, &mut report))?;
            output.json
        }
        Some(Part::Kernels(args)) => return kernels::run(&args),
        Some(Part::Formats(args)) => return formats::run(&args),
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
