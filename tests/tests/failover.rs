//! Nodes that die, freeze and drain under load: every answer is the one that an undisturbed cluster gives.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

use anyhow::{Context, Result, bail, ensure};
use overfill_tests::cluster::{IDLE_GAUGES, binary};
use overfill_tests::service::{decode_args, prefill_args, router_args};
use overfill_tests::{Completion, Request, Service, wait_for};

const PAIR: &str = "llama-tied";
const CLIENTS: usize = 6;
/// Different requests.
const REQUESTS: usize = 12;

/// Long enough to be caught in every phase: the prompt in chunks of a block, many tokens.
fn request(index: usize) -> Request {
    let prompt: Vec<u32> = (0..150 + index * 8).map(|i| (5 + (i * 7 + index * 31) % 300) as u32).collect();
    Request::tokens(&prompt, 120)
}

/// Two nodes of each role, whose decode model is the full one: so a token does not depend on where a request was when
/// a node failed.
struct Rig {
    prefill: [Service; 2],
    decode: [Service; 2],
    router: Service,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Role {
    Prefill,
    Decode,
}

impl Rig {
    fn start() -> Result<Self> {
        let prefill = || Service::start(prefill_args(PAIR), &["--max-batch-tokens", "16"]);
        let decode = || Service::start(decode_args(PAIR), &["--max-running", "4"]);
        let (prefill, decode) = ([prefill()?, prefill()?], [decode()?, decode()?]);
        let urls = |nodes: &[Service; 2]| format!("{},{}", nodes[0].url(), nodes[1].url());
        let args = ["--prefill-url", &urls(&prefill), "--decode-url", &urls(&decode), "--node-timeout-seconds", "3"];
        // The machine may be slow, and what is tested is not the patience.
        let router = Service::start(router_args(), &[&args[..], &["--max-attempts", "20"]].concat())?;
        router.wait_nodes(2, 2)?;
        Ok(Self { prefill, decode, router })
    }

    fn node(&mut self, role: Role) -> &mut Service {
        match role {
            Role::Prefill => &mut self.prefill[0],
            Role::Decode => &mut self.decode[0],
        }
    }

    /// What every request gives, one after the other.
    fn answers(&self) -> Result<Vec<Completion>> {
        (0..REQUESTS).map(|i| request(i).send(&self.router)).collect()
    }

    fn migrations(&self) -> Result<f64> {
        Ok(self.router.metric("overfill_migrations_total", "")?.unwrap_or_default())
    }

    /// Waits until no node holds anything for a request.
    fn wait_idle(&self) -> Result<()> {
        for node in self.prefill.iter().chain(&self.decode) {
            for gauge in IDLE_GAUGES {
                node.wait_metric(gauge, "", 0.0)?;
            }
        }
        Ok(())
    }

    fn wait_up(&self, role: Role, up: f64) -> Result<()> {
        let role = if role == Role::Prefill { "prefill" } else { "decode" };
        self.router.wait_metric("overfill_nodes", &format!("role=\"{role}\",state=\"up\""), up)
    }
}

/// Clients that ask without a pause until they are told to stop, and compare.
struct Load<'a> {
    http: &'a str,
    answers: &'a [Completion],
    stop: AtomicBool,
    done: AtomicUsize,
}

struct Address<'a>(&'a str);

impl overfill_tests::Router for Address<'_> {
    fn http(&self) -> &str {
        self.0
    }
}

impl Load<'_> {
    fn client(&self, client: usize) -> Result<()> {
        for i in (client..).step_by(5).take_while(|_| !self.stop.load(SeqCst)) {
            let i = i % REQUESTS;
            let router = Address(self.http);
            let answer = match client.is_multiple_of(2) {
                true => request(i).send(&router),
                false => request(i).stream(&router).and_then(|events| events.collect_completion()),
            };
            let answer = answer.with_context(|| format!("client {client}, request {i}"))?;
            let expected = &self.answers[i];
            ensure!(answer == *expected, "client {client}, request {i}: {answer:?} instead of {expected:?}");
            self.done.fetch_add(1, SeqCst);
        }
        Ok(())
    }

    /// Waits until every client has had its turn again, about.
    fn wait_progress(&self) -> Result<()> {
        let goal = self.done.load(SeqCst) + 2 * CLIENTS;
        wait_for("answers", || {
            let done = self.done.load(SeqCst);
            Ok((done < goal).then(|| format!("{done}, not {goal}")))
        })
    }
}

/// Runs `disturb` while clients ask.
fn under_load(rig: &mut Rig, disturb: impl FnOnce(&mut Rig, &Load) -> Result<()>) -> Result<()> {
    let answers = rig.answers()?;
    ensure!(rig.migrations()? == 0.0, "migrations before anything happened");
    let http = overfill_tests::Router::http(&rig.router).to_owned();
    let load = Load { http: &http, answers: &answers, stop: AtomicBool::new(false), done: AtomicUsize::new(0) };
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let load = &load;
                scope.spawn(move || load.client(client).inspect_err(|_| load.stop.store(true, SeqCst)))
            })
            .collect();
        let disturbed = load.wait_progress().and_then(|()| disturb(rig, &load));
        load.stop.store(true, SeqCst);
        for client in clients {
            client.join().unwrap_or_else(|_| bail!("a client panicked"))?;
        }
        disturbed
    })?;
    rig.wait_idle()
}

/// Phases at which a node is caught, as a gauge of its own says: computing or decoding, and in the midst of a handoff.
const PHASES: [&str; 2] = ["vllm:num_requests_running", "overfill_open_handoffs"];

fn wait_phase(node: &Service, gauge: &str) -> Result<()> {
    wait_for(gauge, || Ok((node.metric(gauge, "")? == Some(0.0)).then(|| "0".into())))
}

#[test]
fn killed_nodes_cost_no_answer() -> Result<()> {
    let mut rig = Rig::start()?;
    under_load(&mut rig, |rig, load| {
        for (role, phase) in [Role::Decode, Role::Prefill].iter().flat_map(|role| PHASES.map(|phase| (*role, phase))) {
            let before = rig.migrations()?;
            wait_phase(rig.node(role), phase).with_context(|| format!("{role:?}"))?;
            rig.node(role).kill()?;
            rig.wait_up(role, 1.0)?;
            load.wait_progress().with_context(|| format!("{role:?} killed at {phase}"))?;
            if role == Role::Decode && phase == PHASES[0] {
                ensure!(rig.migrations()? > before, "a node that decoded was killed, and nothing has migrated");
            }
            let again = rig.node(role).start_again()?;
            *rig.node(role) = again;
            rig.wait_up(role, 2.0)?;
        }
        Ok(())
    })
}

#[test]
fn frozen_nodes_cost_no_answer() -> Result<()> {
    let mut rig = Rig::start()?;
    under_load(&mut rig, |rig, load| {
        for (role, phase) in [Role::Decode, Role::Prefill].iter().flat_map(|role| PHASES.map(|phase| (*role, phase))) {
            let before = rig.migrations()?;
            wait_phase(rig.node(role), phase).with_context(|| format!("{role:?}"))?;
            rig.node(role).signal("STOP")?;
            rig.wait_up(role, 1.0)?;
            load.wait_progress().with_context(|| format!("{role:?} frozen at {phase}"))?;
            if role == Role::Decode && phase == PHASES[0] {
                ensure!(rig.migrations()? > before, "a node that decoded was frozen, and nothing has migrated");
            }
            // What it was doing is of no use to anybody now.
            rig.node(role).signal("CONT")?;
            rig.wait_up(role, 2.0)?;
        }
        Ok(())
    })
}

fn drain(rig: &Rig, node: &str, seconds: &str) -> Result<()> {
    let router = rig.router.url();
    let output = Command::new(binary()?)
        .args(["drain", "--router", &router, "--drain-timeout", seconds, node])
        .output()
        .context("overfill drain")?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "overfill drain: {}\n{stderr}", output.status);
    ensure!(stderr.contains("running"), "no progress: {stderr}");
    Ok(())
}

#[test]
fn drained_nodes_cost_no_answer() -> Result<()> {
    let mut rig = Rig::start()?;
    under_load(&mut rig, |rig, load| {
        for role in [Role::Decode, Role::Prefill] {
            // With time enough, everything ends where it runs.
            wait_phase(rig.node(role), PHASES[0])?;
            let url = rig.node(role).url();
            drain(rig, &url, "600")?;
            ensure!(rig.migrations()? == 0.0, "a node that had time enough gave requests away");
            let status = rig.node(role).wait_end()?;
            ensure!(status.success(), "the drained node ended with {status}");
            load.wait_progress()?;
            let again = rig.node(role).start_again()?;
            *rig.node(role) = again;
            rig.wait_up(role, 2.0)?;
        }
        // Without any, what runs moves.
        wait_phase(rig.node(Role::Decode), PHASES[0])?;
        let url = rig.node(Role::Decode).url();
        drain(rig, url.trim_start_matches("http://"), "0")?;
        ensure!(rig.migrations()? > 0.0, "nothing has moved");
        ensure!(rig.node(Role::Decode).wait_end()?.success(), "the drained node did not end well");
        load.wait_progress()?;
        let again = rig.node(Role::Decode).start_again()?;
        *rig.node(Role::Decode) = again;
        rig.wait_up(Role::Decode, 2.0)
    })
}

/// No request to one of the decode nodes can succeed: nobody listens where it says that it takes KV.
#[test]
fn a_decode_node_that_no_kv_reaches_costs_no_answer() -> Result<()> {
    let prefill = Service::start(prefill_args(PAIR), &["--max-batch-tokens", "16"])?;
    let nowhere = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let (cut_off, good) = (
        Service::start(decode_args(PAIR), &["--advertise-kv", &nowhere])?,
        Service::start::<&str>(decode_args(PAIR), &[])?,
    );
    let start = |decode: &str, up| -> Result<Service> {
        let router = Service::start(router_args(), &["--prefill-url", &prefill.url(), "--decode-url", decode])?;
        router.wait_nodes(1, up)?;
        Ok(router)
    };
    let alone = start(&good.url(), 1)?;
    let both = start(&format!("{},{}", cut_off.url(), good.url()), 2)?;
    for i in 0..REQUESTS {
        let (expected, answer) = (request(i).send(&alone)?, request(i).send(&both)?);
        ensure!(answer == expected, "request {i}: {answer:?} instead of {expected:?}");
    }
    let migrations = both.metric("overfill_migrations_total", "")?;
    ensure!(migrations > Some(0.0), "the node that can't work was never tried");
    ensure!(alone.metric("overfill_migrations_total", "")? == Some(0.0), "a router without it has moved requests");
    Ok(())
}

#[test]
fn status_is_shown_again_and_again() -> Result<()> {
    let prefill = Service::start::<&str>(prefill_args(PAIR), &[])?;
    let decode = Service::start::<&str>(decode_args(PAIR), &[])?;
    let router = Service::start(router_args(), &["--prefill-url", &prefill.url(), "--decode-url", &decode.url()])?;
    router.wait_nodes(1, 1)?;
    let mut status = Command::new(binary()?)
        .args(["status", "--watch", "--json", "--router", &router.url()])
        .stdout(Stdio::piped())
        .spawn()?;
    let lines = BufReader::new(status.stdout.take().context("no output")?).lines();
    for line in lines.take(2) {
        let shown: serde_json::Value = serde_json::from_str(&line?)?;
        let nodes = shown["nodes"].as_array().context("no nodes")?;
        ensure!(nodes.len() == 2, "{shown}");
        for (node, field) in nodes.iter().flat_map(|n| ["role", "open_handoffs", "stranded_bytes"].map(|f| (n, f))) {
            ensure!(!node[field].is_null(), "no {field} in {node}");
        }
    }
    status.kill()?;
    status.wait()?;
    Ok(())
}
