//! A cluster on the demo pair, as `overfill up` starts it.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Maximum time for the cluster's processes to end, in seconds.
const END_SECONDS: u64 = 20;

/// A running cluster.
pub struct Cluster {
    up: Child,
    /// URL of the gRPC API.
    pub grpc: String,
    /// URL of HTTP.
    pub http: String,
}

impl Cluster {
    /// Starts a cluster with `binary` and waits until it is ready.
    pub fn start(binary: &Path) -> Result<Self> {
        let mut up = Command::new(binary)
            .args(["up", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--print", "json", "--exit-with-stdin"])
            .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| "warn".into()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {} up", binary.display()))?;
        // On an error, closing the standard input ends the cluster.
        let stdout = up.stdout.take().context("the cluster's output was not captured")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).context("reading the cluster's addresses")?;
        if line.is_empty() {
            bail!("the cluster ended before it was ready; see its error message above");
        }
        let ready: serde_json::Value =
            serde_json::from_str(&line).with_context(|| format!("understanding {line:?}"))?;
        let address = |key: &str| {
            let text = ready[key].as_str().map(str::to_owned);
            text.with_context(|| format!("the cluster did not report its {key} address"))
        };
        Ok(Self { grpc: address("grpc")?, http: address("http")?, up })
    }

    /// Closes the cluster's standard input, which ends it, and waits for it.
    pub fn end(mut self) -> Result<()> {
        drop(self.up.stdin.take());
        let deadline = Instant::now() + Duration::from_secs(END_SECONDS);
        loop {
            if let Some(status) = self.up.try_wait().context("waiting for the cluster to end")? {
                if !status.success() {
                    bail!("the cluster ended with {status}");
                }
                return Ok(());
            }
            if Instant::now() >= deadline {
                self.up.kill().context("killing the cluster")?;
                bail!("the cluster did not end within {END_SECONDS} s and was killed");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
