//! The speed and the cost of a KV handoff without a prefill.

use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Args;
use overfill_kv::{KvStore, KvTransport};
use overfill_model::DeviceSpec;
use overfill_transport::bench::{Cost, HandoffOptions, HandoffReport, Shape, handoffs};
use overfill_transport::rdma::DeviceChoice;
use overfill_transport::{TransportChoice, TransportOptions};

use super::report::Report;

/// Size of a handoff without a prefill.
#[derive(Args)]
#[command(next_help_heading = "Sizes")]
pub struct HandoffSize {
    /// Size of the KV for the handoff measurement, in MiB.
    #[arg(long, default_value_t = 256, value_parser = super::count, value_name = "MIB")]
    pub handoff_mebibytes: usize,
}

/// How KV moves, and where it lies.
#[derive(Args)]
#[command(next_help_heading = "Handoff")]
pub struct HandoffArgs {
    /// How KV moves: auto, tcp, rdma or nccl. auto uses RDMA if there is a device, else TCP.
    #[arg(long, default_value = "tcp", value_name = "NAME")]
    pub kv_transport: TransportChoice,
    /// RDMA device, and optionally its port and the index of a GID [default: the first one with an active port]
    #[arg(long, value_name = "NAME[:PORT[:GID_INDEX]]")]
    pub kv_rdma_device: Option<DeviceChoice>,
    /// Where the sender's KV lies: cpu or cuda:N.
    #[arg(long, default_value = "cpu")]
    pub device: DeviceSpec,
    /// Where the receiver's KV lies: cpu or cuda:N [default: as --device]
    #[arg(long, value_name = "DEVICE")]
    pub to_device: Option<DeviceSpec>,
}

impl Default for HandoffArgs {
    fn default() -> Self {
        let kv_transport = TransportChoice::Only(KvTransport::Tcp);
        Self { kv_transport, kv_rdma_device: None, device: DeviceSpec::Cpu, to_device: None }
    }
}

/// Handoffs within this process, each in turns with plain copies.
pub async fn measure(size: &HandoffSize, args: &HandoffArgs, rounds: usize, report: &mut Report) -> Result<()> {
    let to = args.to_device.unwrap_or(args.device);
    let measured = run(size, args, rounds).await?;
    let HandoffReport { transport, ref reason, bytes, memcpy, bare, handoff, handoff_to_bare, .. } = measured;
    let note = format!("{} MiB each, in alternating rounds; medians", bytes >> 20);
    add(report, "memory copy", memcpy, note);
    if let Some(bare) = bare {
        let note = match transport {
            KvTransport::Rdma => "plain RDMA writes: no frames, no checksums",
            KvTransport::Nccl => "plain sends: no messages, no checksums",
            KvTransport::Tcp => "in host memory: no frames, no checksums",
        };
        add(report, &format!("plain {transport} copy"), bare, note.to_owned());
    }
    let note = format!("{} to {to}, with ticket, frames, checksums and commit; {reason}", args.device);
    add(report, &format!("KV handoff, {transport}"), handoff, note);
    if let Some(share) = handoff_to_bare {
        let note = "median of the rounds' ratios".to_owned();
        report.add(format!("KV handoff, share of plain {transport}"), 100.0 * share, "%", note);
    }
    let note = format!("after a prefill of {:.0} ms that announces its layers", 1e3 * measured.prefill_seconds);
    report.add(format!("KV handoff, not hidden, {transport}"), 1e3 * measured.exposed_seconds, "ms", note);
    Ok(())
}

fn add(report: &mut Report, name: &str, cost: Cost, note: String) {
    report.add(name, cost.bytes_per_second / 1e9, "GB/s", note);
    let note = "processor time of both sides per 10^9 bytes";
    report.add(format!("{name}, CPU"), cost.cpu_seconds_per_gigabyte, "s/GB", note.to_owned());
}

async fn run(size: &HandoffSize, args: &HandoffArgs, rounds: usize) -> Result<HandoffReport> {
    let bytes = size.handoff_mebibytes.checked_mul(1 << 20).context("--handoff-mebibytes is too large")?;
    let shape = Shape::of(bytes);
    let transports = TransportOptions { rdma_device: args.kv_rdma_device.clone(), ..TransportOptions::default() };
    let options = HandoffOptions { choice: args.kv_transport, transports, rounds };
    let (source, target) = (store(args.device, shape)?, store(args.to_device.unwrap_or(args.device), shape)?);
    Ok(handoffs(shape, source, target, &options).await?)
}

fn store(device: DeviceSpec, shape: Shape) -> Result<Arc<dyn KvStore>> {
    match device {
        DeviceSpec::Cpu => Ok(shape.host_store()),
        DeviceSpec::Cuda(index) => {
            let (layers, block_bytes) = (shape.layers(), shape.block_bytes());
            Ok(overfill_model::bench::gpu::kv_store(index, layers, shape.blocks, block_bytes)?)
        }
    }
}
