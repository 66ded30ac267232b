//! `overfill`: the whole project in one binary. A file per subcommand; this one only parses and forwards.

#[cfg(feature = "tools")]
mod bench;
mod chat;
mod drain;
mod generate;
#[cfg(feature = "tools")]
mod models;
mod router_client;
mod status;
mod text;
mod up;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use overfill_cluster::process::parse_args;

/// Two models serve one request: the full one prefills, a pruned one decodes over the full one's KV cache.
#[derive(Parser)]
#[command(name = "overfill", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a whole cluster on this machine: a router, prefill nodes and decode nodes.
    Up(Box<up::UpArgs>),
    /// Run a prefill node: the full model over prompts.
    Prefill(Box<overfill_prefill_node::Args>),
    /// Run a decode node: a pruned model over the full model's KV.
    Decode(Box<overfill_decode_node::Args>),
    /// Run a router: gRPC and the OpenAI API for clients.
    Router(Box<overfill_router::Args>),
    /// Ask a router for one completion.
    Generate(Box<generate::GenerateArgs>),
    /// Talk with a model through a router.
    Chat(Box<chat::ChatArgs>),
    /// Show a router's nodes and models.
    Status(status::StatusArgs),
    /// Empty a node: it takes nothing new, ends what runs, then ends itself.
    Drain(drain::DrainArgs),
    #[cfg(feature = "tools")]
    /// Measure the engine, the KV handoff and the router on this machine.
    Bench(Box<bench::BenchArgs>),
    #[cfg(feature = "tools")]
    #[command(flatten)]
    Models(models::ModelCommand),
}

fn main() -> ExitCode {
    let cli: Cli = match parse_args() {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return exit_code(Err(error.into())),
    };
    match cli.command {
        Command::Up(args) => exit_code(runtime.block_on(up::run(*args))),
        Command::Prefill(args) => runtime.block_on(overfill_prefill_node::main(*args)),
        Command::Decode(args) => runtime.block_on(overfill_decode_node::main(*args)),
        Command::Router(args) => runtime.block_on(overfill_router::main(*args)),
        Command::Generate(args) => exit_code(runtime.block_on(generate::run(*args))),
        Command::Chat(args) => exit_code(runtime.block_on(chat::run(*args))),
        Command::Status(args) => exit_code(runtime.block_on(status::run(args))),
        Command::Drain(args) => exit_code(runtime.block_on(drain::run(args))),
        #[cfg(feature = "tools")]
        Command::Bench(args) => exit_code(bench::run(*args)),
        #[cfg(feature = "tools")]
        Command::Models(command) => command.run(),
    }
}

fn exit_code(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", overfill_cluster::process::one_line(error.as_ref()));
            ExitCode::from(overfill_cluster::EXIT_FAILURE)
        }
    }
}
