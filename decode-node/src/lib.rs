//! A node that continues requests over the full model's KV.
//!
//! The way of a request: [`service`] checks it ([`request`]) and queues it with the [`engine`], whose thread owns the model
//! and sets blocks aside. The prefill node writes the prompt's KV into them; once that is whole and verified, the request
//! joins the running batch ([`scheduler`], [`sequence`]). When blocks run out, the youngest leaves it for a while.

pub mod args;
pub mod engine;
pub mod node;
pub mod request;
pub mod scheduler;
pub mod sequence;
pub mod service;

use std::process::ExitCode;

pub use args::{Args, Config};
pub use node::DecodeNode;
use overfill_cluster::{Shutdown, files, process};
use overfill_transport::TransferConfig;

/// Runs a node as a process: checks `args`, prints the ready line, serves until told to stop.
pub async fn main(args: Args) -> ExitCode {
    let process = args.node.process.clone();
    process::run(&process, args.validate(), async |config: Config, shutdown: Shutdown| {
        files::raise(overfill_node::connections() + TransferConfig::default().max_connections);
        let node = DecodeNode::bind(config).await?;
        node.ready_line().print();
        node.run(shutdown).await
    })
    .await
}
