//! The program `overfill-prefill`: a prefill node.

use std::process::ExitCode;

use clap::Parser;

const EXAMPLES: &str = "\
Examples, from the root of the repository:
  overfill-prefill --model demo/full --listen 127.0.0.1:50061
  overfill-prefill --model demo/full --etcd-url http://127.0.0.1:2379";

#[derive(Parser)]
#[command(name = "overfill-prefill", version, after_help = EXAMPLES)]
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
