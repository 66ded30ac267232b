//! The program `overfill-decode`: a decode node.

use std::process::ExitCode;

use clap::Parser;

const EXAMPLES: &str = "\
Examples, from the root of the repository:
  overfill-decode --model demo/decode --listen 127.0.0.1:50071
  overfill-decode --model demo/decode --etcd-url http://127.0.0.1:2379";

#[derive(Parser)]
#[command(name = "overfill-decode", version, after_help = EXAMPLES)]
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
