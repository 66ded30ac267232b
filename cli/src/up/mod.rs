//! `overfill up`: a whole cluster on this machine, each service a process of its own.
//!
//! The nodes start together; once they have said where they listen, their models are checked against each other, then
//! the router starts with their addresses. Whatever ends first ends all of it.

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

/// A cluster of processes on this machine.
#[derive(Args)]
pub struct UpArgs {
    /// The full model: a folder, a .gguf file, or a hub id; NAME=DIR serves it under that name. The demo pair if left out.
    #[arg(long, env = "OVERFILL_FULL")]
    full: Option<Named>,
    /// A pruned model cut from it (repeat for several variants); the full model itself if left out.
    #[arg(long, env = "OVERFILL_DECODE", requires = "full")]
    decode: Vec<Named>,
    /// Prefill nodes.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    prefill_nodes: u32,
    /// Decode nodes for each decode model.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    decode_nodes: u32,
    /// Where the models run: cpu or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// How weights lie in memory: f32, bf16, f16, int8, int8-channel or int4 (integers on the CPU alone); bf16 if left out, but
    /// f32 for the demo pair, which is small.
    #[arg(long, visible_alias = "dtype")]
    weights: Option<String>,
    /// The same for prefill nodes alone.
    #[arg(long)]
    prefill_weights: Option<String>,
    /// The same for decode nodes alone.
    #[arg(long)]
    decode_weights: Option<String>,
    /// KV cache: f32, bf16 or f16; if left out, as for weights.
    #[arg(long)]
    kv_dtype: Option<String>,
    /// Tokens that each node's KV pool holds.
    #[arg(long, default_value_t = 65536)]
    kv_pool_tokens: u32,
    /// Where the OpenAI API is served; port 0 picks a free one.
    #[arg(long, env = "OVERFILL_HTTP", default_value = "127.0.0.1:8080")]
    http: String,
    /// Where gRPC is served; port 0 picks a free one.
    #[arg(long, env = "OVERFILL_GRPC", default_value = "127.0.0.1:50051")]
    grpc: String,
    /// One more argument for every prefill node, as in --prefill-arg=--max-batch-tokens=256; may be repeated.
    #[arg(long, allow_hyphen_values = true)]
    prefill_arg: Vec<String>,
    /// One more argument for every decode node.
    #[arg(long, allow_hyphen_values = true)]
    decode_arg: Vec<String>,
    /// One more argument for the router.
    #[arg(long, allow_hyphen_values = true)]
    router_arg: Vec<String>,
    /// How the addresses are printed.
    #[arg(long, value_enum, default_value_t = Print::Text)]
    print: Print,
    /// Form of log lines on standard error: text or json.
    #[arg(long, env = "OVERFILL_LOG_FORMAT", default_value_t)]
    log_format: LogFormat,
    /// End when standard input closes.
    #[arg(long)]
    exit_with_stdin: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Print {
    /// For people.
    Text,
    /// One line of JSON with every process's addresses and id, for programs that start a cluster.
    Json,
}

/// Runs the subcommand until it is told to end; an error if a process ended by itself.
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

/// Starts everything; returns only when something ended that should not have.
async fn serve(args: &UpArgs, family: &mut Family) -> Result<()> {
    let pair = models::resolve(args.full.as_ref(), &args.decode)?;
    let mut launches = Vec::new();
    for i in 0..args.prefill_nodes {
        launches.push(args.node("prefill", i, &pair.full));
    }
    for (variant, model) in pair.decode.iter().enumerate() {
        for i in 0..args.decode_nodes {
            launches.push(args.node("decode", variant as u32 * args.decode_nodes + i, model));
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
    fn node(&self, role: &'static str, index: u32, model: &Named) -> Launch {
        let pool = self.kv_pool_tokens.to_string();
        let own = if role == "prefill" { &self.prefill_weights } else { &self.decode_weights };
        let default = if self.full.is_some() { "bf16" } else { "f32" };
        let weights = own.as_ref().or(self.weights.as_ref()).map_or(default, String::as_str);
        let kv_dtype = self.kv_dtype.as_deref().unwrap_or(default);
        let mut args = vec![role, "--model", &model.model, "--device", &self.device, "--weights", weights];
        args.extend(["--kv-dtype", kv_dtype, "--kv-pool-tokens", &pool]);
        args.extend(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]);
        if let Some(name) = &model.name {
            args.extend(["--served-model-name", name]);
        }
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
