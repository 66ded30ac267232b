//! `overfill up`: starts a whole cluster on this machine, with one process per service.
//!
//! The nodes start together. Once they have reported their addresses, their models are checked against each other, and the
//! router starts with those addresses. When one process ends, the others are ended too.

mod child;
pub mod demo;
mod models;
mod ready;

use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use overfill_cluster::{LogFormat, Shutdown, init_telemetry};

use child::{Family, Launch, ROUTER, Started};
use models::Named;

/// Longest time a node may take to load its model.
const START_TIMEOUT: Duration = Duration::from_secs(1800);

const AFTER_HELP: &str = "\
Without --full, the cluster serves the demo pair, which is part of this program.

Examples, from the root of the repository:
  overfill up
  overfill up --full demo/full --decode demo/decode --decode-nodes 2
  overfill up --full big=demo/full --weights int8 --prefill-arg=--max-batch-tokens=256";

/// A cluster of processes on this machine.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct UpArgs {
    /// Full model: a folder, a .gguf file or a hub id. NAME=MODEL serves it as NAME [default: the demo pair]
    #[arg(long, env = "OVERFILL_FULL", value_name = "MODEL", help_heading = "Models")]
    full: Option<Named>,
    /// Pruned model that decodes over the full model's KV. Repeat the flag for several variants [default: the full model]
    #[arg(long, env = "OVERFILL_DECODE", requires = "full", value_name = "MODEL", help_heading = "Models")]
    decode: Vec<Named>,
    /// Device of all nodes: cpu or cuda:N.
    #[arg(long, default_value = "cpu", help_heading = "Models")]
    device: String,
    /// Device of the prefill nodes, in place of --device.
    #[arg(long, value_name = "DEVICE", help_heading = "Models")]
    prefill_device: Option<String>,
    /// Device of the decode nodes, in place of --device.
    #[arg(long, value_name = "DEVICE", help_heading = "Models")]
    decode_device: Option<String>,
    /// Weight format in memory: f32, bf16, f16, int8, int8-channel, int4 or fp8. GPUs lack f32 and int8-channel, CPUs lack
    /// fp8 [default: bf16; f32 for the demo pair]
    #[arg(long, visible_alias = "dtype", value_name = "FORMAT", help_heading = "Models")]
    weights: Option<String>,
    /// Weight format of the prefill nodes, in place of --weights.
    #[arg(long, value_name = "FORMAT", help_heading = "Models")]
    prefill_weights: Option<String>,
    /// Weight format of the decode nodes, in place of --weights.
    #[arg(long, value_name = "FORMAT", help_heading = "Models")]
    decode_weights: Option<String>,
    /// Type of the KV cache: f32, bf16, f16 or fp8. GPUs lack f32, CPUs lack fp8 [default: bf16; f32 for the demo pair]
    #[arg(long, value_name = "TYPE", help_heading = "Models")]
    kv_dtype: Option<String>,
    /// Capacity of each node's KV cache, in tokens.
    #[arg(long, default_value_t = 65536, value_name = "TOKENS", help_heading = "Models")]
    kv_pool_tokens: u32,
    /// Number of prefill nodes.
    #[arg(
        long,
        default_value_t = 1,
        value_name = "COUNT",
        value_parser = clap::value_parser!(u32).range(1..=64),
        help_heading = "Cluster"
    )]
    prefill_nodes: u32,
    /// Number of decode nodes for each --decode model.
    #[arg(
        long,
        default_value_t = 1,
        value_name = "COUNT",
        value_parser = clap::value_parser!(u32).range(1..=64),
        help_heading = "Cluster"
    )]
    decode_nodes: u32,
    /// Serve all --decode models on the same decode nodes, which hold the KV of a prompt once for all of them.
    #[arg(long, help_heading = "Cluster")]
    shared_decode_nodes: bool,
    /// Extra argument for every prefill node, for example --prefill-arg=--max-batch-tokens=256. May be repeated.
    #[arg(long, allow_hyphen_values = true, value_name = "ARG", help_heading = "Cluster")]
    prefill_arg: Vec<String>,
    /// Extra argument for every decode node. May be repeated.
    #[arg(long, allow_hyphen_values = true, value_name = "ARG", help_heading = "Cluster")]
    decode_arg: Vec<String>,
    /// Extra argument for the router. May be repeated.
    #[arg(long, allow_hyphen_values = true, value_name = "ARG", help_heading = "Cluster")]
    router_arg: Vec<String>,
    /// Listen address of the OpenAI API. Port 0 picks a free port.
    #[arg(
        long,
        env = "OVERFILL_HTTP",
        default_value = "127.0.0.1:8080",
        value_name = "ADDRESS",
        help_heading = "Network"
    )]
    http: String,
    /// Listen address of the gRPC API. Port 0 picks a free port.
    #[arg(
        long,
        env = "OVERFILL_GRPC",
        default_value = "127.0.0.1:50051",
        value_name = "ADDRESS",
        help_heading = "Network"
    )]
    grpc: String,
    /// Format of the addresses printed when the cluster is ready.
    #[arg(long, value_enum, default_value_t = Print::Text, value_name = "FORMAT", help_heading = "Output")]
    print: Print,
    /// Format of log lines on standard error: text or json.
    #[arg(long, env = "OVERFILL_LOG_FORMAT", default_value_t, value_name = "FORMAT", help_heading = "Process")]
    log_format: LogFormat,
    /// Shut down when standard input closes.
    #[arg(long, help_heading = "Process")]
    exit_with_stdin: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Print {
    /// Text lines.
    Text,
    /// One line of JSON with the addresses and id of every process.
    Json,
}

/// Runs the cluster until a signal or the end of standard input. Returns an error if a process ended by itself.
pub async fn run(args: UpArgs) -> Result<()> {
    init_telemetry(args.log_format);
    let shutdown = Shutdown::new();
    shutdown.follow_signals().context("listening for signals")?;
    if args.exit_with_stdin {
        shutdown.follow_stdin().context("watching standard input")?;
    }
    let mut family = Family::default();
    let outcome = tokio::select! {
        outcome = serve(&args, &mut family) => outcome,
        () = shutdown.cancelled() => Ok(()),
    };
    family.end().await;
    outcome
}

/// Starts all processes. Returns only when a process ended unexpectedly.
async fn serve(args: &UpArgs, family: &mut Family) -> Result<()> {
    let pair = models::resolve(args.full.as_ref(), &args.decode)?;
    let mut launches = Vec::new();
    for i in 0..args.prefill_nodes {
        launches.push(args.node("prefill", i, &pair.full, &[]));
    }
    let with_variants = if args.shared_decode_nodes { pair.decode.len() } else { 1 };
    for (group, models) in pair.decode.chunks(with_variants).enumerate() {
        for i in 0..args.decode_nodes {
            launches.push(args.node("decode", group as u32 * args.decode_nodes + i, &models[0], &models[1..]));
        }
    }
    let mut nodes = within_start(family.start_all(launches)).await?;
    models::check_pairing(&nodes).await?;
    let router = within_start(family.start_all(vec![args.router(&nodes)])).await?;
    nodes.extend(router);
    tokio::select! {
        joined = ready::wait_for_nodes(&nodes) => joined?,
        error = family.first_end() => return Err(error),
    }
    match args.print {
        Print::Text => print!("{}", ready::text(&nodes)?),
        Print::Json => println!("{}", ready::json(&nodes)?),
    }
    Err(family.first_end().await)
}

async fn within_start(start: impl Future<Output = Result<Vec<Started>>>) -> Result<Vec<Started>> {
    match tokio::time::timeout(START_TIMEOUT, start).await {
        Ok(started) => started,
        Err(_) => bail!("the cluster was not ready within {} s", START_TIMEOUT.as_secs()),
    }
}

impl UpArgs {
    /// `variants`: further models of a decode node.
    fn node(&self, role: &'static str, index: u32, model: &Named, variants: &[Named]) -> Launch {
        let pool = self.kv_pool_tokens.to_string();
        let own = if role == "prefill" { &self.prefill_weights } else { &self.decode_weights };
        let default = if self.full.is_some() { "bf16" } else { "f32" };
        let weights = own.as_ref().or(self.weights.as_ref()).map_or(default, String::as_str);
        let kv_dtype = self.kv_dtype.as_deref().unwrap_or(default);
        let own = if role == "prefill" { &self.prefill_device } else { &self.decode_device };
        let device = own.as_ref().unwrap_or(&self.device);
        let mut args = vec![role, "--model", &model.model, "--device", device, "--weights", weights];
        args.extend(["--kv-dtype", kv_dtype, "--kv-pool-tokens", &pool]);
        args.extend(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]);
        if let Some(name) = &model.name {
            args.extend(["--served-model-name", name]);
        }
        let variants: Vec<String> =
            variants.iter().map(|variant| format!("--variant={}={}", variant.served_name(), variant.model)).collect();
        args.extend(variants.iter().map(String::as_str));
        args.extend(if role == "prefill" { &self.prefill_arg } else { &self.decode_arg }.iter().map(String::as_str));
        Launch::new(format!("{role}-{index}"), &args, self.log_format, model.model.clone())
    }

    fn router(&self, nodes: &[Started]) -> Launch {
        let urls = |role: &str| -> String {
            let urls: Vec<_> = nodes.iter().filter(|n| n.ready.role == role).map(Started::grpc_url).collect();
            urls.join(",")
        };
        let (prefill, decode) = (urls("prefill"), urls("decode"));
        let mut args = vec![ROUTER, "--prefill-url", &prefill, "--decode-url", &decode];
        args.extend(["--http", &self.http, "--grpc", &self.grpc]);
        args.extend(self.router_arg.iter().map(String::as_str));
        Launch::new(ROUTER.into(), &args, self.log_format, String::new())
    }
}
