//! `overfill`: the whole project in one binary. A file per subcommand; this one only parses and forwards.

mod chat;
mod generate;
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
    Up(up::UpArgs),
    /// Ask a router for one completion.
    Generate(generate::GenerateArgs),
    /// Talk with a model through a router.
    Chat(chat::ChatArgs),
    /// Show a router's nodes and models.
    Status(status::StatusArgs),
}

fn main() -> ExitCode {
    let cli: Cli = match parse_args() {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failure(&error.into()),
    };
    let result = runtime.block_on(async {
        match cli.command {
            Command::Up(args) => up::run(args).await,
            Command::Generate(args) => generate::run(args).await,
            Command::Chat(args) => chat::run(args).await,
            Command::Status(args) => status::run(args).await,
        }
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure(&error),
    }
}

fn failure(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {}", overfill_cluster::process::one_line(error.as_ref()));
    ExitCode::from(overfill_cluster::EXIT_FAILURE)
}
