//! The program `overfill-decode`: a decode node.

use std::process::ExitCode;

use clap::Parser;

#[derive(Parser)]
#[command(name = "overfill-decode", version)]
struct Cli {
    #[command(flatten)]
    args: overfill_decode_node::Args,
}

#[tokio::main]
async fn main() -> ExitCode {
    match overfill_cluster::process::parse_args::<Cli>() {
        Ok(cli) => overfill_decode_node::main(cli.args).await,
        Err(code) => code,
    }
}
