//! `cargo xtask demo`: builds, starts a cluster on the demo pair, asks a question and shuts down.

use std::process::Command;

use anyhow::Result;

use crate::cluster::Cluster;
use crate::process::{cargo, run as sh, target};

/// Three records and a question about all of them, in the format of the demo's task. The countries are not in the
/// prompt: the full model learned them, and the pruned model kept them.
const PROMPT: &str = "kim : molde , nurse , mice , 16 . ana : turin , pilot , cat , 9 . ben : kyoto , cook , goat , 12 . \
                      what country is everyone from ?";

/// Builds the binary, starts a cluster, sends the prompt, and shuts down.
pub fn run(prompt: Option<&str>) -> Result<()> {
    // Builds only the binary, without the subcommands that make and evaluate models and their dependencies.
    sh(&mut cargo(&["build", "--locked", "--package", "overfill-cli", "--no-default-features"]))?;
    let binary = target().join("debug/overfill");

    eprintln!("\nStarting a router, a prefill node and a decode node on the demo pair.");
    let cluster = Cluster::start(&binary)?;
    let (grpc, http, prompt) = (&cluster.grpc, &cluster.http, prompt.unwrap_or(PROMPT));
    eprintln!("Router: gRPC {grpc}, OpenAI API {http}/v1\n\n> {prompt}\n");
    let arguments = ["generate", "--router", grpc, "--temperature", "0", "--max-tokens", "64", prompt];
    let answered = sh(Command::new(&binary).args(arguments));
    let ended = cluster.end();
    answered.and(ended)?;
    eprintln!("\nThe cluster has ended. `target/debug/overfill up` keeps one running.");
    Ok(())
}
