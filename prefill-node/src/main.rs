//! The program `overfill-prefill`: a prefill node.

use std::process::ExitCode;

use clap::Parser;

#[derive(Parser)]
#[command(name = "overfill-prefill", version)]
struct Cli {
    #[command(flatten)]
    args: overfill_prefill_node::Args,
}

#[tokio::main]
async fn main() -> ExitCode {
    match overfill_cluster::process::parse_args::<Cli>() {
        Ok(cli) => overfill_prefill_node::main(cli.args).await,
        Err(code) => code,
    }
}
