//! `overfill bench`: what the machine at hand does, each figure beside the one it should be compared with.

mod engine;
mod nodes;
mod random_model;
mod report;
mod router;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use overfill_cluster::{LogFormat, init_telemetry};
use overfill_kv::KvDtype;
use overfill_model::{DeviceSpec, LoadOptions, Model, WeightFormat, resolve};

use report::Report;

/// Measures the engine, the KV handoff and the router.
#[derive(Args)]
pub struct BenchArgs {
    /// Full model; one of random weights if left out.
    #[arg(long)]
    full: Option<String>,
    /// Pruned model; if both are left out, the random model's widths cut by 45 %.
    #[arg(long, requires = "full")]
    decode: Option<String>,
    /// Where the models run: cpu or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: DeviceSpec,
    /// Weights: f32, bf16 or f16.
    #[arg(long, default_value = "bf16")]
    dtype: WeightFormat,
    /// KV cache: f32, bf16 or f16.
    #[arg(long, default_value = "bf16")]
    kv_dtype: KvDtype,
    /// Tokens of the prompt that is prefilled and handed over.
    #[arg(long, default_value_t = 2048)]
    prompt_tokens: usize,
    /// KV that is moved to measure the handoff alone.
    #[arg(long, default_value_t = 256)]
    handoff_mebibytes: usize,
    /// Runs of each measurement; the median counts.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Only these parts: engine, handoff, overlap, router.
    #[arg(long, value_delimiter = ',', value_enum)]
    only: Vec<Part>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Part {
    /// Prefill and decode tokens per second.
    Engine,
    /// KV over TCP, a bare TCP copy, and a memory copy.
    Handoff,
    /// What a handoff adds to a prefill.
    Overlap,
    /// What the router costs.
    Router,
}

/// Folders of the two models. A random pair is removed with it.
struct Pair {
    full: PathBuf,
    decode: PathBuf,
    _temporary: Option<tempfile::TempDir>,
}

/// Runs the subcommand. Measurements block threads of their own, so this is called outside any runtime.
pub fn run(args: &BenchArgs) -> Result<()> {
    init_telemetry(LogFormat::Text);
    let wants = |part| args.only.is_empty() || args.only.contains(&part);
    let options =
        LoadOptions { device: args.device, weights: args.dtype, kv_dtype: args.kv_dtype, ..LoadOptions::default() };
    let mut report = Report::default();
    if wants(Part::Engine) || wants(Part::Overlap) {
        let pair = args.pair()?;
        if wants(Part::Engine) {
            for (name, folder) in [("full", &pair.full), ("pruned", &pair.decode)] {
                let model = Model::load(folder, &options)?;
                engine::measure(name, &model, args.prompt_tokens, args.runs, &mut report)?;
            }
        }
        if wants(Part::Overlap) {
            runtime()?.block_on(nodes::measure(&pair.full, &pair.decode, args, &mut report))?;
        }
    }
    if wants(Part::Handoff) {
        runtime()?.block_on(nodes::measure_handoff(args.handoff_mebibytes, &mut report))?;
    }
    if wants(Part::Router) {
        runtime()?.block_on(router::measure(args.runs, &mut report))?;
    }
    if args.json {
        println!("{}", report.json())
    } else {
        print!("{}", report.table())
    }
    Ok(())
}

impl BenchArgs {
    fn pair(&self) -> Result<Pair> {
        let Some(full) = &self.full else {
            let folder = tempfile::tempdir().context("making a folder for random models")?;
            let (full, decode) = (folder.path().join("full"), folder.path().join("pruned"));
            random_model::write(&full, 0.0)?;
            random_model::write(&decode, 0.45)?;
            return Ok(Pair { full, decode, _temporary: Some(folder) });
        };
        let full = resolve(full)?;
        let decode = self.decode.as_deref().map(resolve).transpose()?.unwrap_or_else(|| full.clone());
        Ok(Pair { full, decode, _temporary: None })
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the async runtime")
}
