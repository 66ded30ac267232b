//! The processes of the cluster. They are started and ended together, and their output is read.

use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use overfill_cluster::{LogFormat, ReadyLine};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Longest time that a process may take to shut down before it is killed.
const END_TIMEOUT: Duration = Duration::from_secs(15);

/// Longest wait for the last output of a process that has ended.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_secs(2);

/// Name and role of the one router.
pub const ROUTER: &str = "router";

/// A process to start: this binary with its own arguments.
pub struct Launch {
    name: String,
    args: Vec<String>,
    model: String,
}

/// A process that is ready to serve.
pub struct Started {
    /// `prefill-0`, `decode-1`, `router`.
    pub name: String,
    /// Process id.
    pub pid: u32,
    /// Its listen addresses.
    pub ready: ReadyLine,
    /// The --model argument. Empty for the router.
    pub model: String,
}

/// All processes. Dropping it kills the running ones.
#[derive(Default)]
pub struct Family {
    running: JoinSet<Ended>,
    router_runs: bool,
    router_stop: CancellationToken,
    node_stop: CancellationToken,
}

struct Ended {
    name: String,
    status: std::io::Result<ExitStatus>,
    reason: String,
}

impl Launch {
    /// A service that ends with this process.
    pub fn new(name: String, args: &[&str], log_format: LogFormat, model: String) -> Self {
        let mut args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
        args.extend(["--exit-with-stdin".to_owned(), "--log-format".to_owned(), log_format.to_string()]);
        Self { name, args, model }
    }
}

impl Started {
    /// Its gRPC address.
    pub fn grpc_url(&self) -> String {
        format!("http://{}", self.ready.grpc)
    }
}

impl Family {
    /// Starts all processes at once and waits until they are ready. Returns an error as soon as one ends.
    pub async fn start_all(&mut self, launches: Vec<Launch>) -> Result<Vec<Started>> {
        let mut waiting = Vec::new();
        for launch in launches {
            waiting.push(self.start(launch)?);
        }
        let mut started = Vec::new();
        for (name, pid, model, ready) in waiting {
            tokio::select! {
                biased;
                Ok(ready) = ready => started.push(Started { name, pid, model, ready }),
                // This branch also handles a process that closed its output without a ready line and is about to end.
                error = self.first_end() => return Err(error),
            }
        }
        Ok(started)
    }

    fn start(&mut self, launch: Launch) -> Result<(String, u32, String, oneshot::Receiver<ReadyLine>)> {
        let Launch { name, args, model } = launch;
        let program = std::env::current_exe().context("finding the path of this program")?;
        let mut child = Command::new(&program)
            .args(&args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C must reach only this process, which ends the others in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {name} ({})", program.display()))?;
        let pid = child.id().context("a process ended before it was started")?;
        let stdout = child.stdout.take().context("no standard output")?;
        let stderr = child.stderr.take().context("no standard error")?;
        let (ready_sender, ready) = oneshot::channel();
        self.router_runs |= name == ROUTER;
        let stop = if name == ROUTER { &self.router_stop } else { &self.node_stop }.clone();
        let process_name = name.clone();
        self.running.spawn(async move {
            let mut readers = JoinSet::new();
            readers.spawn(read_stdout(stdout, ready_sender));
            let reason = Arc::new(Mutex::new(String::new()));
            readers.spawn(forward_stderr(process_name.clone(), stderr, reason.clone()));
            let status = wait(&mut child, &stop).await;
            let _ =
                tokio::time::timeout(LAST_WORDS_TIMEOUT, async { while readers.join_next().await.is_some() {} }).await;
            let reason = std::mem::take(&mut *reason.lock().unwrap_or_else(PoisonError::into_inner));
            Ended { name: process_name, status, reason }
        });
        Ok((name, pid, model, ready))
    }

    /// Waits until a process ends, and returns its name and the reason as an error.
    pub async fn first_end(&mut self) -> anyhow::Error {
        match self.running.join_next().await {
            Some(Ok(ended)) => {
                self.router_runs &= ended.name != ROUTER;
                ended.into_error()
            }
            Some(Err(error)) => anyhow!("watching a process: {error}"),
            None => std::future::pending().await,
        }
    }

    /// Ends the router first, so that no new requests reach the nodes, and then the nodes. Waits for all of them.
    pub async fn end(mut self) {
        self.router_stop.cancel();
        if !self.router_runs {
            self.node_stop.cancel();
        }
        while let Some(result) = self.running.join_next().await {
            match result {
                Ok(ended) => {
                    if ended.name == ROUTER {
                        self.node_stop.cancel();
                    }
                    ended.log();
                }
                Err(error) => {
                    tracing::warn!(%error, "failed to watch a process");
                    self.node_stop.cancel();
                }
            }
        }
    }
}

impl Ended {
    fn log(self) {
        let Self { name, status, reason } = self;
        match status {
            Ok(status) if status.success() => tracing::debug!(name, "ended"),
            Ok(status) => tracing::warn!(name, %status, reason, "ended"),
            Err(error) => tracing::warn!(name, %error, "waiting for its end"),
        }
    }

    fn into_error(self) -> anyhow::Error {
        let Self { name, status, reason } = self;
        let how = match status {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        if reason.is_empty() { anyhow!("{name} ended by itself ({how})") } else { anyhow!("{name}: {reason} ({how})") }
    }
}

/// Waits until the process ends. On `stop`, closes its standard input, and kills it if it does not end in time.
async fn wait(child: &mut Child, stop: &CancellationToken) -> std::io::Result<ExitStatus> {
    // `Child::wait` would close the standard input at once.
    let stdin = child.stdin.take();
    tokio::select! {
        status = child.wait() => return status,
        () = stop.cancelled() => drop(stdin),
    }
    match tokio::time::timeout(END_TIMEOUT, child.wait()).await {
        Ok(status) => status,
        Err(_) => {
            child.start_kill()?;
            child.wait().await
        }
    }
}

async fn read_stdout(stdout: impl AsyncRead + Unpin, ready: oneshot::Sender<ReadyLine>) {
    let mut ready = Some(ready);
    let mut lines = BufReader::new(stdout).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        match (ReadyLine::parse(&line), ready.take()) {
            (Some(line), Some(sender)) => drop(sender.send(line)),
            (_, sender) => ready = sender,
        }
    }
}

/// Forwards log lines with the name of the process. Lines that begin with `error: ` are collected in `reason` instead.
async fn forward_stderr(name: String, stderr: impl AsyncRead + Unpin, reason: Arc<Mutex<String>>) {
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        match line.strip_prefix("error: ") {
            Some(error) => {
                let mut reason = reason.lock().unwrap_or_else(PoisonError::into_inner);
                if !reason.is_empty() {
                    reason.push_str("; ");
                }
                reason.push_str(error);
            }
            None => eprintln!("{name:<10} {line}"),
        }
    }
}
