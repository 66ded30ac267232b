//! A node that runs the full model over prompts.
//!
//! The way of a request: [`service`] checks it ([`request`]) and queues it with the [`engine`], whose thread owns the model.
//! There it waits for blocks, then runs in chunks beside others ([`scheduler`]). As soon as a layer of a chunk is
//! computed, its KV leaves for the decode node ([`job`]); the last chunk's logits give the first token.

pub mod args;
pub mod engine;
pub mod job;
pub mod node;
pub mod request;
pub mod scheduler;
pub mod service;

use std::process::ExitCode;

pub use args::{Args, Config};
pub use node::PrefillNode;
use overfill_cluster::{Shutdown, files, process};

/// Runs a node as a process: checks `args`, prints the ready line, serves until told to stop.
pub async fn main(args: Args) -> ExitCode {
    let process = args.node.process.clone();
    process::run(&process, args.validate(), async |config: Config, shutdown: Shutdown| {
        files::raise(overfill_node::connections());
        let node = PrefillNode::bind(config).await?;
        node.ready_line().print();
        node.run(shutdown).await
    })
    .await
}
