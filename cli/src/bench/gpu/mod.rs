//! `overfill bench gpu`: decode, prefill and handoffs on an NVIDIA GPU, each against what the GPU can do in the same run.

mod steps;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use overfill_kv::KvDtype;
use overfill_model::bench::gpu::{Gpu, Probe, measure};
use overfill_model::{DeviceSpec, WeightFormat};
use overfill_transport::{TransportChoice, rdma::DeviceChoice};
use serde_json::json;

use super::geometry::Geometry;
use super::handoff::{self, HandoffArgs, HandoffSize};
use super::models::ModelArgs;
use super::report::Report;
use crate::text;

const AFTER_HELP: &str = "\
Needs a build with the feature cuda. `cargo xtask gpu` runs this and the tests of the kernels.

Examples:
  overfill bench gpu --out gpu.json
  overfill bench gpu --geometry llama-3.2-1b --batch 1,64 --models-dir ~/random-models
  overfill bench gpu --to-device cuda:1 --kv-transport tcp,nccl
  overfill bench gpu --limits-only --json";

/// What to measure.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct GpuArgs {
    /// GPU to measure: cuda:N.
    #[arg(long, default_value = "cuda:0", value_parser = gpu, help_heading = "Device")]
    device: DeviceSpec,
    /// GPU that KV is handed over to: cuda:N [default: as --device]
    #[arg(long, value_parser = gpu, value_name = "DEVICE", help_heading = "Device")]
    to_device: Option<DeviceSpec>,
    /// Shapes of models with random weights, comma-separated.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        value_name = "NAME",
        default_values = ["llama-3.2-3b", "llama-3.2-3b-overfill"],
        help_heading = "Models"
    )]
    geometry: Vec<Geometry>,
    /// Folder in which models with random weights are kept for later runs [default: a temporary folder]
    #[arg(long, value_name = "DIR", help_heading = "Models")]
    models_dir: Option<PathBuf>,
    /// Model, in place of random weights: a folder, a .gguf file or a hub id.
    #[arg(long, conflicts_with = "geometry", value_name = "MODEL", help_heading = "Models")]
    model: Option<String>,
    /// Weight format in memory: bf16, f16, int8, int4 or fp8.
    #[arg(long, default_value = "bf16", value_name = "FORMAT", help_heading = "Models")]
    weights: WeightFormat,
    /// Type of the KV cache: bf16, f16 or fp8.
    #[arg(long, default_value = "bf16", value_name = "TYPE", help_heading = "Models")]
    kv_dtype: KvDtype,
    #[command(flatten)]
    sizes: steps::Sizes,
    /// Bytes of a copy that measures the bandwidth of the GPU's memory, in MiB.
    #[arg(long, default_value_t = 1024, value_parser = super::count, value_name = "MIB", help_heading = "Sizes")]
    copy_mebibytes: usize,
    /// Width of the matrices whose product measures the GPU's arithmetic.
    #[arg(long, default_value_t = 8192, value_parser = super::count, value_name = "ELEMENTS", help_heading = "Sizes")]
    product_width: usize,
    #[command(flatten)]
    handoff: HandoffSize,
    /// Transports of the handoffs, comma-separated: tcp, rdma, nccl or auto. One that can't be used is listed with the reason.
    #[arg(long, value_delimiter = ',', default_value = "tcp,rdma,nccl", value_name = "NAME", help_heading = "Handoff")]
    kv_transport: Vec<TransportChoice>,
    /// RDMA device, and optionally its port and the index of a GID [default: the first one with an active port]
    #[arg(long, value_name = "NAME[:PORT[:GID_INDEX]]", help_heading = "Handoff")]
    kv_rdma_device: Option<DeviceChoice>,
    /// Only measure what the GPU can do.
    #[arg(long, help_heading = "Measurement")]
    limits_only: bool,
    /// Runs of each measurement. The median is reported.
    #[arg(long, default_value_t = 5, value_parser = super::count, value_name = "COUNT", help_heading = "Measurement")]
    runs: usize,
    /// JSON file to write as well.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    out: Option<PathBuf>,
    /// Print JSON.
    #[arg(long, help_heading = "Output")]
    json: bool,
}

/// Parses the name of a GPU.
fn gpu(text: &str) -> Result<DeviceSpec, String> {
    match text.parse::<DeviceSpec>()? {
        DeviceSpec::Cpu => Err("device must be cuda:N, got cpu".into()),
        gpu @ DeviceSpec::Cuda(_) => Ok(gpu),
    }
}

/// Runs the subcommand.
pub fn run(args: &GpuArgs) -> Result<()> {
    let DeviceSpec::Cuda(index) = args.device else { return Ok(()) };
    let copy_bytes = args.copy_mebibytes.checked_mul(1 << 20).context("--copy-mebibytes is too large")?;
    let probe = Probe { copy_bytes, product_width: args.product_width, runs: args.runs };
    let gpu = measure(index, &probe)?;
    let mut report = Report::default();
    add_limits(&gpu, args, &mut report);
    let mut left_out = Vec::new();
    if !args.limits_only {
        let models = args.models();
        for (name, folder) in &models.prepare()?.list {
            steps::measure(name, folder, &models.options(), &args.sizes, args.runs, &gpu, &mut report)?;
        }
        left_out = hand_over(args, &mut report)?;
    }
    let json = json(&gpu, args, &report, &left_out);
    if let Some(file) = &args.out {
        let text = serde_json::to_string_pretty(&json)?;
        std::fs::write(file, text + "\n").with_context(|| format!("writing {}", file.display()))?;
    }
    if args.json {
        println!("{json}");
        return Ok(());
    }
    let (major, minor) = gpu.compute_capability;
    println!("{}, compute capability {major}.{minor}, {}\n", gpu.name, text::bytes(gpu.memory_bytes as u64));
    print!("{}", report.table());
    for (what, reason) in left_out {
        println!("left out: {what}: {reason}");
    }
    Ok(())
}

impl GpuArgs {
    fn models(&self) -> ModelArgs {
        ModelArgs {
            geometry: self.geometry.clone(),
            models_dir: self.models_dir.clone(),
            full: self.model.clone(),
            decode: None,
            device: self.device,
            weights: self.weights,
            kv_dtype: self.kv_dtype,
        }
    }
}

fn add_limits(gpu: &Gpu, args: &GpuArgs, report: &mut Report) {
    let note = format!("copies of {} MiB, bytes read and written", args.copy_mebibytes);
    report.add("GPU memory bandwidth", gpu.copy_bytes_per_second / 1e9, "GB/s", note);
    let note = format!("bf16, square matrices of {} elements, cuBLASLt", args.product_width);
    report.add("GPU dense products", gpu.product_operations_per_second / 1e12, "TFLOP/s", note);
}

/// Measures handoffs over each transport. Returns the transports that can't be used, with the reason. It is an error if none can.
fn hand_over(args: &GpuArgs, report: &mut Report) -> Result<Vec<(String, String)>> {
    let runtime = super::runtime()?;
    let mut left_out = Vec::new();
    for &kv_transport in &args.kv_transport {
        let (device, to_device) = (args.device, args.to_device);
        let handoff = HandoffArgs { kv_transport, kv_rdma_device: args.kv_rdma_device.clone(), device, to_device };
        match runtime.block_on(handoff::measure(&args.handoff, &handoff, args.runs, report)) {
            Ok(()) => {}
            Err(error) => left_out.push((format!("handoff over {kv_transport}"), format!("{error:#}"))),
        }
    }
    let all = left_out.len() == args.kv_transport.len();
    ensure!(!all, "no transport works: {left_out:?}");
    Ok(left_out)
}

fn json(gpu: &Gpu, args: &GpuArgs, report: &Report, left_out: &[(String, String)]) -> serde_json::Value {
    let (major, minor) = gpu.compute_capability;
    let left_out: Vec<_> = left_out.iter().map(|(what, reason)| json!({"what": what, "reason": reason})).collect();
    json!({
        "gpu": {"name": gpu.name, "compute_capability": format!("{major}.{minor}"), "memory_bytes": gpu.memory_bytes},
        "software": format!("overfill {}", env!("CARGO_PKG_VERSION")),
        "weights": args.weights.to_string(),
        "kv_dtype": args.kv_dtype.to_string(),
        "measurements": report.json(),
        "left_out": left_out,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_gpus_are_measured() {
        assert_eq!(gpu("cuda:1"), Ok(DeviceSpec::Cuda(1)));
        assert_eq!(gpu("cpu").unwrap_err(), "device must be cuda:N, got cpu");
    }
}
