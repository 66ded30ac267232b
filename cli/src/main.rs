//! `overfill`: all commands in one binary. Each subcommand has its own file; this file parses and dispatches.

#[cfg(feature = "tools")]
mod bench;
mod chat;
mod drain;
mod generate;
#[cfg(feature = "tools")]
mod models;
#[cfg(feature = "tools")]
mod plan;
#[cfg(feature = "tools")]
mod pull;
mod router_client;
mod shell;
#[cfg(feature = "tools")]
mod simulate;
mod status;
mod text;
mod up;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use overfill_cluster::process::parse_args;

const AFTER_HELP: &str = "\
Examples:
  overfill up                               # start a cluster with the demo pair
  overfill chat                             # talk to it
  overfill status --watch                   # watch its nodes
  overfill up --help                        # flags and examples of one command";

const PREFILL_HELP: &str = "\
Examples, from the root of the repository:
  overfill prefill --model demo/full --listen 127.0.0.1:50061
  overfill prefill --model demo/full --etcd-url http://127.0.0.1:2379";

const DECODE_HELP: &str = "\
Examples, from the root of the repository:
  overfill decode --model demo/decode --listen 127.0.0.1:50071
  overfill decode --model demo/decode --etcd-url http://127.0.0.1:2379";

const ROUTER_HELP: &str = "\
Examples:
  overfill router --prefill-url http://127.0.0.1:50061 --decode-url http://127.0.0.1:50071
  overfill router --etcd-url http://127.0.0.1:2379";

/// Serves two-stage language models: a full model prefills, and a pruned model decodes over its KV cache.
#[derive(Parser)]
#[command(name = "overfill", version, after_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start a cluster on this machine: a router, prefill nodes and decode nodes.
    Up(Box<up::UpArgs>),
    /// Run a prefill node. It computes prompts with the full model.
    #[command(after_help = PREFILL_HELP)]
    Prefill(Box<overfill_prefill_node::Args>),
    /// Run a decode node. It decodes with a pruned model over the full model's KV.
    #[command(after_help = DECODE_HELP)]
    Decode(Box<overfill_decode_node::Args>),
    /// Run a router. It serves the OpenAI API and gRPC to clients.
    #[command(after_help = ROUTER_HELP)]
    Router(Box<overfill_router::Args>),
    /// Generate one completion through a router.
    Generate(Box<generate::GenerateArgs>),
    /// Chat with a model through a router.
    Chat(Box<chat::ChatArgs>),
    /// Show the nodes and models of a router.
    Status(status::StatusArgs),
    /// Drain a node: it refuses new requests, finishes its running ones and exits.
    Drain(drain::DrainArgs),
    #[cfg(feature = "tools")]
    /// Download a model from the Hugging Face hub into a folder.
    Pull(pull::PullArgs),
    #[cfg(feature = "tools")]
    /// Measure the engine, the KV handoff and the router, or put load on a running cluster.
    Bench(Box<bench::BenchArgs>),
    #[cfg(feature = "tools")]
    /// Find out how many nodes a load needs, from the measurements of a machine.
    Plan(Box<plan::PlanArgs>),
    #[cfg(feature = "tools")]
    /// Simulate a cluster over time: load that changes, autoscaling, rollouts and failures.
    Simulate(Box<simulate::SimulateArgs>),
    #[cfg(feature = "tools")]
    #[command(flatten)]
    Models(models::ModelCommand),
    /// Print shell completions.
    Completions(shell::CompletionsArgs),
    /// Print or write manual pages.
    Man(shell::ManArgs),
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
        Command::Pull(args) => exit_code(pull::run(&args)),
        #[cfg(feature = "tools")]
        Command::Bench(args) => exit_code(bench::run(*args)),
        #[cfg(feature = "tools")]
        Command::Plan(args) => exit_code(plan::run(*args)),
        #[cfg(feature = "tools")]
        Command::Simulate(args) => exit_code(simulate::run(*args)),
        #[cfg(feature = "tools")]
        Command::Models(command) => command.run(),
        Command::Completions(args) => exit_code(shell::completions(&args)),
        Command::Man(args) => exit_code(shell::man(&args)),
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
