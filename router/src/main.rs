//! The router's stand-alone program.

use std::process::ExitCode;

use clap::Parser;
use overfill_cluster::process::parse_args;
use overfill_router::Args;

const EXAMPLES: &str = "\
Examples:
  overfill-router --prefill-url http://127.0.0.1:50061 --decode-url http://127.0.0.1:50071
  overfill-router --etcd-url http://127.0.0.1:2379";

#[derive(Parser)]
#[command(name = "overfill-router", version, after_help = EXAMPLES, about = "Routes requests through prefill and decode nodes")]
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
