//! A cluster of real processes, started by `overfill up`.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::metrics::{self, Router};
use crate::wait::wait_for;

/// Maximum time for a cluster to become ready.
const START_TIMEOUT: Duration = Duration::from_secs(180);

/// Maximum time for a cluster to end.
const END_TIMEOUT: Duration = Duration::from_secs(60);

/// Gauges that are 0 on an idle node.
pub const IDLE_GAUGES: [&str; 5] = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "overfill_open_handoffs",
    "overfill_stranded_bytes",
];

/// Output of `overfill up --print json`.
#[derive(Debug, Deserialize)]
struct Ready {
    grpc: String,
    http: String,
    processes: Vec<Process>,
}

/// A process of the cluster.
#[derive(Clone, Debug, Deserialize)]
pub struct Process {
    /// `prefill-0`, `decode-0`, `router`.
    pub name: String,
    /// Process id.
    pub pid: u32,
    /// URL of metrics and health. `None` for the router, which serves them on its HTTP port.
    pub admin: Option<String>,
}

/// A running cluster. Dropping it kills it.
pub struct Cluster {
    up: Child,
    stdin: Option<ChildStdin>,
    stderr: Option<JoinHandle<String>>,
    ready: Ready,
}

/// Result of a cluster that has ended.
#[derive(Debug)]
pub struct Refused {
    /// Exit status of `overfill up`.
    pub status: ExitStatus,
    /// Everything written to standard error.
    pub stderr: String,
}

impl Refused {
    /// Returns the lines that begin with `error: `.
    pub fn reasons(&self) -> Vec<&str> {
        self.stderr.lines().filter(|line| line.starts_with("error: ")).collect()
    }
}

/// Returns the path of the binary under test: the parent folder of the test executable's folder.
pub fn binary() -> Result<PathBuf> {
    let executable = std::env::current_exe().context("finding the test executable")?;
    let folder = executable.parent().and_then(|deps| deps.parent()).context("finding the target folder")?;
    let binary = folder.join("overfill");
    if !binary.is_file() {
        bail!("{} is missing: build it first with `cargo build --workspace --bins`", binary.display());
    }
    Ok(binary)
}

impl Cluster {
    /// Starts `overfill up` with `args` on free ports and waits until it serves.
    pub fn start<S: AsRef<str>>(args: &[S]) -> Result<Self> {
        Self::start_with(args, &[])
    }

    /// Starts `overfill up` like [`Self::start`], with environment variables for all processes.
    pub fn start_with<S: AsRef<str>>(args: &[S], variables: &[(&str, String)]) -> Result<Self> {
        let (mut up, stdin, stderr) = spawn(args, variables)?;
        let mut stdout = BufReader::new(up.stdout.take().context("no standard output")?);
        let (sender, receiver) = sync_channel(1);
        std::thread::spawn(move || {
            let mut line = String::new();
            let read = stdout.read_line(&mut line);
            let _ = sender.send(read.map(|_| line));
            // Drains further output, so that the pipe does not fill up.
            let _ = std::io::copy(&mut stdout, &mut std::io::sink());
        });
        let line = match receiver.recv_timeout(START_TIMEOUT) {
            Ok(line) => line.context("reading the cluster's addresses")?,
            Err(_) => String::new(),
        };
        let Ok(ready) = serde_json::from_str(&line) else {
            let _ = up.kill();
            let status = up.wait()?;
            bail!("the cluster did not start ({status}):\n{}", text(stderr));
        };
        Ok(Self { up, stdin: Some(stdin), stderr: Some(stderr), ready })
    }

    /// Starts `overfill up` with `args` and waits until it ends by itself.
    pub fn refused<S: AsRef<str>>(args: &[S]) -> Result<Refused> {
        Self::refused_with(args, &[])
    }

    /// Like [`Self::refused`], with environment variables for all processes.
    pub fn refused_with<S: AsRef<str>>(args: &[S], variables: &[(&str, String)]) -> Result<Refused> {
        let (mut up, stdin, stderr) = spawn(args, variables)?;
        let status = wait_end(&mut up, START_TIMEOUT);
        drop(stdin);
        Ok(Refused { status: status?, stderr: text(stderr) })
    }

    /// URL of the router's gRPC API.
    pub fn grpc(&self) -> &str {
        &self.ready.grpc
    }

    /// All processes except `up` itself.
    pub fn processes(&self) -> &[Process] {
        &self.ready.processes
    }

    /// Sends a signal (`KILL`, `TERM`) to a process.
    pub fn signal(&self, name: &str, signal: &str) -> Result<()> {
        let process = self.processes().iter().find(|p| p.name == name).with_context(|| format!("no {name}"))?;
        let status = Command::new("kill").args(["-s", signal, &process.pid.to_string()]).status()?;
        if !status.success() {
            bail!("kill -s {signal} {name}: {status}");
        }
        Ok(())
    }

    /// Reads a gauge of one node, summed over its labels.
    pub fn gauge(&self, process: &Process, name: &str) -> Result<f64> {
        let admin = process.admin.as_ref().with_context(|| format!("{} has no admin port", process.name))?;
        metrics::read(admin, name, "")?.with_context(|| format!("{} shows no {name}", process.name))
    }

    /// Checks that no request was migrated, as in a cluster without failures.
    pub fn check_undisturbed(&self) -> Result<()> {
        match metrics::read(&self.ready.http, "overfill_migrations_total", "")? {
            Some(0.0) => Ok(()),
            other => bail!("{other:?} migrations in an undisturbed cluster"),
        }
    }

    /// Waits until no node holds resources for a request.
    pub fn wait_idle(&self) -> Result<()> {
        wait_for("idle nodes", || {
            for process in self.processes().iter().filter(|p| p.admin.is_some() && p.name != "router") {
                for name in IDLE_GAUGES {
                    let value = self.gauge(process, name)?;
                    if value != 0.0 {
                        return Ok(Some(format!("{name} is {value} on {}", process.name)));
                    }
                }
            }
            Ok(None)
        })
    }

    /// Ends the cluster by closing its standard input, as the death of its parent would. Returns status and output.
    pub fn end(mut self) -> Result<Refused> {
        drop(self.stdin.take());
        self.wait()
    }

    /// Waits until the cluster has ended by itself.
    pub fn wait(mut self) -> Result<Refused> {
        let status = wait_end(&mut self.up, END_TIMEOUT)?;
        Ok(Refused { status, stderr: self.stderr.take().map(text).unwrap_or_default() })
    }

    /// Process id of `overfill up` itself.
    pub fn pid(&self) -> u32 {
        self.up.id()
    }
}

impl Router for Cluster {
    fn http(&self) -> &str {
        &self.ready.http
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // The cluster's processes end when their standard input closes, which happens when `up` dies.
        let _ = self.up.kill();
        let _ = self.up.wait();
        let Some(stderr) = self.stderr.take() else { return };
        if std::thread::panicking() {
            eprintln!("{}", text(stderr));
        }
    }
}

fn spawn<S: AsRef<str>>(args: &[S], variables: &[(&str, String)]) -> Result<(Child, ChildStdin, JoinHandle<String>)> {
    let mut up = Command::new(binary()?)
        .args(["up", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--print", "json", "--exit-with-stdin"])
        .args(args.iter().map(AsRef::as_ref))
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting the cluster")?;
    let stdin = up.stdin.take().context("no standard input")?;
    let stderr = up.stderr.take().context("no standard error")?;
    Ok((up, stdin, std::thread::spawn(move || read_all(stderr))))
}

fn read_all(mut stderr: ChildStderr) -> String {
    let mut bytes = Vec::new();
    let _ = stderr.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

fn text(reader: JoinHandle<String>) -> String {
    reader.join().unwrap_or_default()
}

fn wait_end(child: &mut Child, limit: Duration) -> Result<ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            bail!("the cluster did not end within {} s", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
