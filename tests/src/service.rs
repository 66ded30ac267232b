//! A single service as a process, for tests that start, stop, freeze and kill services.

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

/// Output of a service when it is ready.
#[derive(Clone, Debug, Deserialize)]
struct Ready {
    grpc: String,
    http: Option<String>,
    kv: Option<String>,
    admin: String,
}

/// A running service. Dropping it kills it.
pub struct Service {
    /// Arguments of the process.
    args: Vec<String>,
    host: Option<Host>,
    child: Child,
    /// Kept open, since closing it ends the service.
    _stdin: ChildStdin,
    stderr: Option<JoinHandle<String>>,
    ready: Ready,
    http: String,
}

/// Arguments of a prefill node over a golden pair's full model.
pub fn prefill_args(pair: &str) -> Vec<String> {
    node_args("prefill", &folder(pair, "full"))
}

/// Arguments of a decode node over the same model. Every token is then the same on all nodes.
pub fn decode_args(pair: &str) -> Vec<String> {
    decode_args_of(pair, "full")
}

/// Arguments of a decode node over a golden pair's model: `full` or `decode`.
pub fn decode_args_of(pair: &str, which: &str) -> Vec<String> {
    node_args("decode", &folder(pair, which))
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
    /// Starts `overfill` with `args` and `more`, and waits until it is ready.
    pub fn start<S: AsRef<str>>(args: Vec<String>, more: &[S]) -> Result<Self> {
        Self::start_on(None, args.into_iter().chain(more.iter().map(|arg| arg.as_ref().to_owned())).collect())
    }

    /// Starts `overfill` with `args`, and waits until it is ready. With `host`, it runs and listens there.
    pub fn start_on(host: Option<Host>, args: Vec<String>) -> Result<Self> {
        Self::start_with(host, args, &[])
    }

    /// Starts `overfill` like [`Self::start_on`], with environment variables.
    pub fn start_with(host: Option<Host>, args: Vec<String>, variables: &[(&str, String)]) -> Result<Self> {
        let mut command = match &host {
            Some(host) => host.command(binary()?),
            None => Command::new(binary()?),
        };
        let mut child = command
            .args(&args)
            .arg("--exit-with-stdin")
            .envs(variables.iter().map(|(name, value)| (name, value)))
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

    /// Starts the service again at the same addresses. The old process must have ended.
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
        // The old address may be in use for a moment longer.
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

    /// URL of the gRPC API.
    pub fn url(&self) -> String {
        format!("http://{}", self.ready.grpc)
    }

    /// Address of the gRPC API, `host:port`.
    pub fn grpc(&self) -> &str {
        &self.ready.grpc
    }

    /// Host of the service. `None` if it runs directly on this machine.
    pub fn host(&self) -> Option<&Host> {
        self.host.as_ref()
    }

    /// KV address. Only decode nodes have one.
    pub fn kv(&self) -> Option<&str> {
        self.ready.kv.as_deref()
    }

    /// Address of metrics and health.
    pub fn admin(&self) -> &str {
        &self.ready.admin
    }

    /// Checks that the process still runs and reports that it is live.
    pub fn check_live(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{:?} has ended: {status}", self.args);
        }
        ureq::get(&format!("{}/live", self.http)).timeout(PATIENCE).call().context("asking whether it lives")?;
        Ok(())
    }

    /// Returns the resident memory in KiB on Linux, `None` elsewhere.
    pub fn resident_kib(&self) -> Result<Option<u64>> {
        let Ok(status) = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())) else { return Ok(None) };
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        Ok(Some(line.trim().trim_end_matches(" kB").parse()?))
    }

    /// Sends a signal: `STOP`, `CONT`, `TERM`.
    pub fn signal(&self, signal: &str) -> Result<()> {
        send_signal(&self.child, signal)
    }

    /// Kills the process and waits for its end.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits until the process ends by itself.
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

    /// Reads a metric, summed over the series whose labels contain `labels`.
    pub fn metric(&self, name: &str, labels: &str) -> Result<Option<f64>> {
        metrics::read(&self.http, name, labels)
    }

    /// Waits until a metric has the given value.
    pub fn wait_metric(&self, name: &str, labels: &str, value: f64) -> Result<()> {
        wait_for(name, || {
            let now = self.metric(name, labels)?.unwrap_or(0.0);
            Ok((now != value).then(|| format!("{name}{{{labels}}} is {now}, not {value}")))
        })
    }

    /// Waits until a router sees this many usable prefill and decode nodes.
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
        // The test harness shows this only if the test fails.
        eprintln!("--- {}:\n{text}", self.args.join(" "));
    }
}

/// Sends a signal to a child process.
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
