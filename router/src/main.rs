//! The router's stand-alone program.

use std::process::ExitCode;

use clap::Parser;
use overfill_cluster::process::parse_args;
use overfill_router::Args;

#[derive(Parser)]
#[command(name = "overfill-router", version, about = "Routes requests through prefill and decode nodes")]
struct Cli {
    #[command(flatten)]
    args: Args,
}

#[tokio::main]
async fn main() -> ExitCode {
    match parse_args::<Cli>() {
        Ok(cli) => overfill_router::main(cli.args).await,
        Err(code) => code,
    }
}
