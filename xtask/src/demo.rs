//! `cargo xtask demo`: builds, starts a cluster on the demo pair, asks a question and shuts down.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::process::{cargo, run as sh, target};

/// Three records and a question about all of them, in the format of the demo's task. The countries are not in the
/// prompt: the full model learned them, and the pruned model kept them.
const PROMPT: &str = "kim : molde , nurse , mice , 16 . ana : turin , pilot , cat , 9 . ben : kyoto , cook , goat , 12 . \
                      what country is everyone from ?";

/// Maximum time for the cluster's processes to end, in seconds.
const END_SECONDS: u64 = 20;

/// Builds the binary, starts a cluster, sends the prompt, and shuts down.
pub fn run(prompt: Option<&str>) -> Result<()> {
    // Builds only the binary, without the subcommands that make and evaluate models and their dependencies.
    sh(&mut cargo(&["build", "--locked", "--package", "overfill-cli", "--no-default-features"]))?;
    let binary = target().join("debug/overfill");

    eprintln!("\nStarting a router, a prefill node and a decode node on the demo pair.");
    let mut up = Command::new(&binary)
        .args(["up", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--print", "json", "--exit-with-stdin"])
        .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| "warn".into()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {} up", binary.display()))?;
    let answered = ask(&binary, &mut up, prompt.unwrap_or(PROMPT));
    let ended = end(up);
    answered.and(ended)
}

fn ask(binary: &std::path::Path, up: &mut Child, prompt: &str) -> Result<()> {
    let stdout = up.stdout.take().context("the cluster's output was not captured")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line).context("reading the cluster's addresses")?;
    if line.is_empty() {
        bail!("the cluster ended before it was ready; see its error message above");
    }
    let ready: serde_json::Value = serde_json::from_str(&line).with_context(|| format!("understanding {line:?}"))?;
    let address = |key: &str| {
        ready[key].as_str().map(str::to_owned).with_context(|| format!("the cluster did not report its {key} address"))
    };
    let (grpc, http) = (address("grpc")?, address("http")?);
    eprintln!("Router: gRPC {grpc}, OpenAI API {http}/v1\n\n> {prompt}\n");
    sh(Command::new(binary).args(["generate", "--router", &grpc, "--temperature", "0", "--max-tokens", "64", prompt]))
}

/// Closes the cluster's standard input, which ends it, and waits for it.
fn end(mut up: Child) -> Result<()> {
    drop(up.stdin.take());
    let deadline = Instant::now() + Duration::from_secs(END_SECONDS);
    loop {
        if let Some(status) = up.try_wait().context("waiting for the cluster to end")? {
            if !status.success() {
                bail!("the cluster ended with {status}");
            }
            eprintln!("\nThe cluster has ended. `target/debug/overfill up` keeps one running.");
            return Ok(());
        }
        if Instant::now() >= deadline {
            up.kill().context("killing the cluster")?;
            bail!("the cluster did not end within {END_SECONDS} s and was killed");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
