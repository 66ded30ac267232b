//! A cluster with two nodes of each role under load. Every answer is compared with the undisturbed answer.

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use crate::cluster::IDLE_GAUGES;
use crate::metrics::At;
use crate::service::{decode_args_of, prefill_args, router_args};
use crate::{Completion, Network, Request, Router, Service, wait_for};

const PAIR: &str = "llama-tied";
/// Number of concurrent clients.
pub const CLIENTS: usize = 8;
/// Minimum number of requests per client.
pub const REQUESTS_EACH: usize = 25;
/// Number of different requests.
pub const REQUESTS: usize = 12;

/// Returns a request long enough to be interrupted in every phase: many prompt chunks and tokens. Most are greedy, some
/// sampled, some must match a grammar.
pub fn request(index: usize) -> Request {
    let prompt: Vec<u32> = (0..150 + index * 8).map(|i| (5 + (i * 7 + index * 31) % 300) as u32).collect();
    let request = Request::tokens(&prompt, 120);
    match index % 4 {
        1 => request.with("guided_regex", json!("([a-z]{2,4}[0-9]{1,2},){300}")),
        3 => request.with("temperature", json!(0.9)).with("top_p", json!(0.95)).with("seed", json!(index)),
        _ => request,
    }
}

/// Gauge that is positive while a node computes or decodes.
pub const RUNNING: &str = "vllm:num_requests_running";
/// Gauge that is positive during a handoff.
pub const HANDING_OVER: &str = "overfill_open_handoffs";

/// Waits until a gauge of a node is not 0.
pub fn wait_phase(node: &Service, gauge: &str) -> Result<()> {
    wait_for(gauge, || Ok((node.metric(gauge, "")? == Some(0.0)).then(|| "0".into())))
}

/// Role of a node.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Role {
    /// Prefill node.
    Prefill,
    /// Decode node.
    Decode,
}

/// Router and two nodes of each role. The decode nodes run the full model, so tokens don't depend on where a request
/// was when a node failed.
pub struct Rig {
    prefill: [Service; 2],
    decode: [Service; 2],
    /// The router.
    pub router: Service,
}

impl Rig {
    /// Starts the cluster. With `network`, each node runs on its own host.
    pub fn start(network: Option<&Network>) -> Result<Self> {
        Self::start_with(network, "full", "draft")
    }

    /// Starts the cluster with the pair's decode model (`decode`) or its full model (`full`) on the decode nodes, and with a
    /// default mode. In mode exact, tokens don't depend on the decode model either.
    pub fn start_with(network: Option<&Network>, decoder: &str, mode: &str) -> Result<Self> {
        let node = |mut args: Vec<String>, more: &[&str], ports: &[&str]| {
            args.extend(more.iter().map(|&arg| arg.to_owned()));
            let host = network.map(Network::host).transpose()?;
            if let Some(host) = &host {
                args.push("--allow-insecure".into());
                for &port in ports {
                    args.extend([port.to_owned(), format!("{}:0", host.address())]);
                }
            }
            Service::start_on(host, args)
        };
        let prefill = || node(prefill_args(PAIR), &["--max-batch-tokens", "16"], &["--listen", "--admin"]);
        let decode =
            || node(decode_args_of(PAIR, decoder), &["--max-running", "4"], &["--listen", "--admin", "--kv-listen"]);
        let (prefill, decode) = ([prefill()?, prefill()?], [decode()?, decode()?]);
        let urls = |nodes: &[Service; 2]| format!("{},{}", nodes[0].url(), nodes[1].url());
        let args = [
            "--prefill-url",
            &urls(&prefill),
            "--decode-url",
            &urls(&decode),
            "--node-timeout-seconds",
            "3",
            "--mode",
            mode,
        ];
        let router = Service::start(router_args(), &args)?;
        router.wait_nodes(2, 2)?;
        Ok(Self { prefill, decode, router })
    }

    /// Returns the node of a role that tests disturb.
    pub fn node(&mut self, role: Role) -> &mut Service {
        match role {
            Role::Prefill => &mut self.prefill[0],
            Role::Decode => &mut self.decode[0],
        }
    }

    /// Returns the KV ports of the decode nodes.
    pub fn kv_ports(&self) -> Vec<String> {
        self.decode.iter().filter_map(|node| Some(node.kv()?.rsplit(':').next()?.to_owned())).collect()
    }

    /// Returns all processes with their names.
    pub fn services(&self) -> [(&'static str, &Service); 5] {
        let ([p0, p1], [d0, d1]) = (&self.prefill, &self.decode);
        [("prefill-0", p0), ("prefill-1", p1), ("decode-0", d0), ("decode-1", d1), ("router", &self.router)]
    }

    /// Restarts an ended node at its old address and waits until the router uses it.
    pub fn start_again(&mut self, role: Role) -> Result<()> {
        let again = self.node(role).start_again()?;
        *self.node(role) = again;
        self.wait_up(role, 2)
    }

    /// Sends every request once, one after another, and returns the answers.
    pub fn answers(&self) -> Result<Vec<Completion>> {
        (0..REQUESTS).map(|i| request(i).send(&self.router)).collect()
    }

    /// Returns the number of migrated requests.
    pub fn migrations(&self) -> Result<f64> {
        Ok(self.router.metric("overfill_migrations_total", "")?.unwrap_or_default())
    }

    /// Waits until no node holds resources for a request.
    pub fn wait_idle(&self) -> Result<()> {
        for node in self.prefill.iter().chain(&self.decode) {
            for gauge in IDLE_GAUGES {
                node.wait_metric(gauge, "", 0.0)?;
            }
        }
        Ok(())
    }

    /// Waits until the router sees `up` usable nodes of a role.
    pub fn wait_up(&self, role: Role, up: u32) -> Result<()> {
        let role = if role == Role::Prefill { "prefill" } else { "decode" };
        self.router.wait_metric("overfill_nodes", &format!("role=\"{role}\",state=\"up\""), up.into())
    }

    /// Runs `disturb` while clients send requests, at least [`REQUESTS_EACH`] each. Compares all answers with
    /// `answers`.
    pub fn under_load(
        &mut self,
        answers: &[Completion],
        disturb: impl FnOnce(&mut Self, &Load) -> Result<()>,
    ) -> Result<Pauses> {
        let http = self.router.http().to_owned();
        let load =
            Load { http: &http, answers, stop: AtomicBool::new(false), done: 0.into(), pauses: Mutex::default() };
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..CLIENTS)
                .map(|client| {
                    let load = &load;
                    scope.spawn(move || load.client(client).inspect_err(|_| load.stop.store(true, SeqCst)))
                })
                .collect();
            let disturbed = load.wait_progress().and_then(|()| disturb(self, &load));
            load.stop.store(true, SeqCst);
            for client in clients {
                client.join().unwrap_or_else(|_| bail!("a client panicked"))?;
            }
            disturbed
        })?;
        self.wait_idle()?;
        let mut pauses = load.pauses.into_inner().unwrap_or_default();
        pauses.sort_unstable();
        Ok(Pauses(pauses))
    }
}

/// Clients that send requests without pause until they are stopped, and compare the answers.
pub struct Load<'a> {
    http: &'a str,
    answers: &'a [Completion],
    stop: AtomicBool,
    done: AtomicUsize,
    pauses: Mutex<Vec<Duration>>,
}

impl Load<'_> {
    fn client(&self, client: usize) -> Result<()> {
        for (sent, i) in (client..).step_by(5).enumerate() {
            if sent >= REQUESTS_EACH && self.stop.load(SeqCst) {
                break;
            }
            let i = i % REQUESTS;
            let router = At(self.http);
            let answer = match client.is_multiple_of(2) {
                true => request(i).send(&router),
                false => self.stream(&router, i),
            };
            let answer = answer.with_context(|| format!("client {client}, request {i}"))?;
            let expected = &self.answers[i];
            ensure!(answer == *expected, "client {client}, request {i}: {answer:?} instead of {expected:?}");
            self.done.fetch_add(1, SeqCst);
        }
        Ok(())
    }

    /// Streams an answer and records the longest time between two events.
    fn stream(&self, router: &At<'_>, i: usize) -> Result<Completion> {
        let mut last: Option<Instant> = None;
        let mut longest = Duration::ZERO;
        let answer = request(i).stream(router)?.collect_completion(|| {
            let now = Instant::now();
            longest = longest.max(last.map_or(Duration::ZERO, |last| now - last));
            last = Some(now);
        })?;
        self.pauses.lock().map_err(|_| anyhow::anyhow!("a client panicked"))?.push(longest);
        Ok(answer)
    }

    /// Waits until each client has completed two more requests on average.
    pub fn wait_progress(&self) -> Result<()> {
        let goal = self.done.load(SeqCst) + 2 * CLIENTS;
        wait_for("answers", || {
            // The client itself reports the error.
            ensure!(!self.stop.load(SeqCst), "a client has failed");
            let done = self.done.load(SeqCst);
            Ok((done < goal).then(|| format!("{done}, not {goal}")))
        })
    }
}

/// The longest pause of each streamed answer, shortest first.
pub struct Pauses(Vec<Duration>);

impl fmt::Display for Pauses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = |percent: usize| {
            self.0.get((self.0.len() * percent).div_ceil(100).saturating_sub(1)).copied().unwrap_or_default()
        };
        let seconds = [50, 90, 99, 100].map(|percent| at(percent).as_secs_f64());
        write!(f, "longest pause of {} streams: p50 {:.2} s, p90 {:.2} s, ", self.0.len(), seconds[0], seconds[1])?;
        write!(f, "p99 {:.2} s, most {:.2} s", seconds[2], seconds[3])
    }
}
