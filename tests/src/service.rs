//! One service as a process of its own: for tests in which services come, go, freeze and die.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStderr, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::cluster::binary;
use crate::golden::folder;
use crate::metrics::{self, Router};
use crate::network::Host;
use crate::wait::{PATIENCE, wait_for};

/// What a service prints when it serves.
#[derive(Clone, Debug, Deserialize)]
struct Ready {
    grpc: String,
    http: Option<String>,
    kv: Option<String>,
    admin: String,
}

/// A running service. Dropped, it is killed.
pub struct Service {
    /// As it was started.
    args: Vec<String>,
    host: Option<Host>,
    child: Child,
    /// Closed, it would end the service.
    _stdin: ChildStdin,
    stderr: Option<JoinHandle<String>>,
    ready: Ready,
    http: String,
}

/// Arguments of a prefill node over a golden pair's full model.
pub fn prefill_args(pair: &str) -> Vec<String> {
    node_args("prefill", &folder(pair, "full"))
}

/// Arguments of a decode node over the same model: then every token is the full model's, whoever computes it.
pub fn decode_args(pair: &str) -> Vec<String> {
    node_args("decode", &folder(pair, "full"))
}

fn node_args(role: &str, model: &str) -> Vec<String> {
    let args = [role, "--model", model, "--served-model-name", "m", "--dtype", "f32", "--kv-dtype", "f32"];
    args.iter().chain(&["--kv-pool-tokens", "8192"]).map(|&arg| arg.to_owned()).collect()
}

/// Arguments of a router on free ports.
pub fn router_args() -> Vec<String> {
    ["router", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"].map(str::to_owned).to_vec()
}

impl Service {
    /// Starts `overfill` with `args` and more of them, and waits until it serves.
    pub fn start<S: AsRef<str>>(args: Vec<String>, more: &[S]) -> Result<Self> {
        Self::start_on(None, args.into_iter().chain(more.iter().map(|arg| arg.as_ref().to_owned())).collect())
    }

    /// The same with all arguments; on a host of a network, which it listens to, instead of on this machine.
    pub fn start_on(host: Option<Host>, args: Vec<String>) -> Result<Self> {
        let mut command = match &host {
            Some(host) => host.command(binary()?),
            None => Command::new(binary()?),
        };
        let mut child = command
            .args(&args)
            .arg("--exit-with-stdin")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting a service")?;
        let stdin = child.stdin.take().context("no standard input")?;
        let stderr = child.stderr.take().context("no standard error")?;
        let stderr = std::thread::spawn(move || read_all(stderr));
        let mut stdout = BufReader::new(child.stdout.take().context("no standard output")?);
        let (sender, receiver) = sync_channel(1);
        std::thread::spawn(move || {
            let mut line = String::new();
            let read = stdout.read_line(&mut line);
            let _ = sender.send(read.map(|_| line));
        });
        let line = receiver.recv_timeout(PATIENCE).map_or(Ok(String::new()), |line| line)?;
        let Ok(ready) = serde_json::from_str::<Ready>(&line) else {
            let _ = child.kill();
            let status = child.wait()?;
            bail!("{args:?} did not start ({status}):\n{}", stderr.join().unwrap_or_default());
        };
        let http = format!("http://{}", ready.http.as_ref().unwrap_or(&ready.admin));
        Ok(Self { args, host, child, _stdin: stdin, stderr: Some(stderr), ready, http })
    }

    /// Starts the same again, at the same addresses. The old one must have ended.
    pub fn start_again(&self) -> Result<Self> {
        let mut more = vec!["--admin", &self.ready.admin];
        match &self.ready.http {
            Some(http) => more = vec!["--http", http, "--grpc", &self.ready.grpc],
            None => more.extend(["--listen", &self.ready.grpc]),
        }
        if let Some(kv) = &self.ready.kv {
            more.extend(["--kv-listen", kv]);
        }
        let args = self.args.clone();
        let mut started = Err(anyhow::anyhow!("not tried"));
        // The old one's address may be taken for a moment longer.
        wait_for("the address", || {
            let old: Vec<usize> =
                more.iter().step_by(2).filter_map(|flag| args.iter().position(|a| a == flag)).collect();
            let kept = args.iter().enumerate().filter(|(i, _)| !old.iter().any(|at| *i == *at || *i == at + 1));
            let again = kept.map(|(_, arg)| arg.clone()).chain(more.iter().map(|&arg| arg.to_owned()));
            started = Self::start_on(self.host.clone(), again.collect());
            Ok(started.as_ref().err().filter(|e| e.to_string().contains("in use")).map(ToString::to_string))
        })?;
        started
    }

    /// Its gRPC address as a URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.ready.grpc)
    }

    /// Its gRPC address, `host:port`.
    pub fn grpc(&self) -> &str {
        &self.ready.grpc
    }

    /// The host it runs on, unless that is this machine.
    pub fn host(&self) -> Option<&Host> {
        self.host.as_ref()
    }

    /// Where it takes KV; decode nodes only.
    pub fn kv(&self) -> Option<&str> {
        self.ready.kv.as_deref()
    }

    /// Where its metrics and health are.
    pub fn admin(&self) -> &str {
        &self.ready.admin
    }

    /// It must still be the process that was started, and say so.
    pub fn check_live(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{:?} has ended: {status}", self.args);
        }
        ureq::get(&format!("{}/live", self.http)).timeout(PATIENCE).call().context("asking whether it lives")?;
        Ok(())
    }

    /// Memory that it has, in KiB, as Linux counts it; `None` elsewhere.
    pub fn resident_kib(&self) -> Result<Option<u64>> {
        let Ok(status) = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())) else { return Ok(None) };
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        Ok(Some(line.trim().trim_end_matches(" kB").parse()?))
    }

    /// Sends a signal: `STOP`, `CONT`, `TERM`.
    pub fn signal(&self, signal: &str) -> Result<()> {
        send_signal(&self.child, signal)
    }

    /// Kills it, and waits until it is gone.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits until it has ended by itself.
    pub fn wait_end(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!("{:?} did not end within {} s", self.args, PATIENCE.as_secs());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// A metric's value, summed over its series that contain `labels`.
    pub fn metric(&self, name: &str, labels: &str) -> Result<Option<f64>> {
        metrics::read(&self.http, name, labels)
    }

    /// Waits until a metric is `value`.
    pub fn wait_metric(&self, name: &str, labels: &str, value: f64) -> Result<()> {
        wait_for(name, || {
            let now = self.metric(name, labels)?.unwrap_or(0.0);
            Ok((now != value).then(|| format!("{name}{{{labels}}} is {now}, not {value}")))
        })
    }

    /// Waits until a router sees so many prefill and decode nodes as usable.
    pub fn wait_nodes(&self, prefill: u32, decode: u32) -> Result<()> {
        for (role, count) in [("prefill", prefill), ("decode", decode)] {
            let labels = format!("role=\"{role}\",state=\"up\"");
            self.wait_metric("overfill_nodes", &labels, count.into())?;
        }
        Ok(())
    }
}

impl Router for Service {
    fn http(&self) -> &str {
        &self.http
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.kill();
        let text = self.stderr.take().map(|stderr| stderr.join().unwrap_or_default()).unwrap_or_default();
        // Shown only if the test fails.
        eprintln!("--- {}:\n{text}", self.args.join(" "));
    }
}

/// Sends a signal to a process that this one has started.
pub(crate) fn send_signal(child: &Child, signal: &str) -> Result<()> {
    let status = Command::new("kill").args(["-s", signal, &child.id().to_string()]).status()?;
    if !status.success() {
        bail!("kill -s {signal}: {status}");
    }
    Ok(())
}

fn read_all(mut stderr: ChildStderr) -> String {
    let mut bytes = Vec::new();
    let _ = stderr.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}
