//! The decode node: it generates the output of a request over the full model's KV of the prompt.
//!
//! Path of a request: [`service`] checks it ([`request`]) and queues it in the [`engine`], whose thread owns the model, or several
//! models over the same KV ([`compute`]).
//! The engine reserves KV blocks, and the prefill node sends the prompt's KV into them. When the KV is complete and
//! verified, the request joins the running batch ([`scheduler`], [`sequence`]). When blocks run out, the youngest
//! request is preempted: its KV moves to host memory until there is room again.

pub mod args;
pub mod compute;
pub mod drafts;
pub mod engine;
pub mod extension;
pub mod flow;
pub mod handle;
pub mod node;
pub mod request;
pub mod scheduler;
pub mod sequence;
pub mod service;
pub mod trials;

use std::process::ExitCode;

pub use args::{Args, Config};
pub use node::DecodeNode;
use overfill_cluster::{Shutdown, files, process};
use overfill_transport::TransferConfig;

/// Runs a decode node as a process: checks `args`, prints the ready line, and serves until the process is stopped.
/// Returns the exit code.
pub async fn main(args: Args) -> ExitCode {
    let process = args.node.process.clone();
    process::run("overfill-decode", &process, args.validate(), async |config: Config, shutdown: Shutdown| {
        // A handoff has a connection and, over RDMA, a channel for its completions.
        files::raise(overfill_node::connections() + 2 * TransferConfig::default().max_connections);
        let node = DecodeNode::bind(config).await?;
        node.ready_line().print();
        node.run(shutdown).await
    })
    .await
}
