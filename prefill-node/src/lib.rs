//! The prefill node: it runs the full model over prompts.
//!
//! Path of a request: [`service`] checks it ([`request`]) and queues it in the [`engine`], whose thread owns the model.
//! The request waits for KV blocks. Then its prompt is computed in chunks, batched with those of other prompts
//! ([`scheduler`]). As soon as a layer of a chunk is computed, its KV is sent to the decode node ([`job`]). The logits
//! of the last chunk give the first token. A request whose prefill stays open then waits for extensions ([`extension`]).
//! While there is nothing else to compute, the model scores outputs of decode models ([`score`]).

pub mod args;
pub mod compute;
pub mod engine;
pub mod extension;
pub mod gather;
pub mod handoff;
pub mod job;
pub mod node;
pub mod request;
pub mod scheduler;
pub mod score;
pub mod service;

use std::process::ExitCode;

pub use args::{Args, Config};
pub use node::PrefillNode;
use overfill_cluster::{Shutdown, files, process};

/// Runs a prefill node as a process: checks `args`, prints the ready line, and serves until the process is stopped.
/// Returns the exit code.
pub async fn main(args: Args) -> ExitCode {
    let process = args.node.process.clone();
    process::run("overfill-prefill", &process, args.validate(), async |config: Config, shutdown: Shutdown| {
        files::raise(overfill_node::connections());
        let node = PrefillNode::bind(config).await?;
        node.ready_line().print();
        node.run(shutdown).await
    })
    .await
}
