//! Hostile clients on every port of a cluster. No process ends, leaks memory or resources, or changes its answers.

mod inputs;
mod tickets;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use anyhow::{Context, Result, bail, ensure};
use overfill_cluster::http::SPARE;
use overfill_fuzz::mutate::{Random, mutated};
use overfill_tests::cluster::IDLE_GAUGES;
use overfill_tests::service::{decode_args, prefill_args, router_args};
use overfill_tests::wait::PATIENCE;
use overfill_tests::{Completion, Request, Service};
use serde_json::json;

const PAIR: &str = "llama-tied";

/// Number of malformed inputs per port, after warm-up inputs that fill thread pools and allocator arenas.
const INPUTS: usize = 10_000;
const FIRST_INPUTS: usize = 1_000;
const CLIENTS: usize = 6;

/// Allowed memory growth of a process. It detects a leak of 2.5 KiB per input of a single port. The allocator alone
/// varies by a few MiB.
const GROWTH_KIB: u64 = 24 << 10;

/// Numbers of silent connections: more than a decode node accepts on its KV port, and more than the router accepts on
/// each of its ports. On other ports, the number is limited by the process limit of about a thousand open files.
const SILENT_KV: usize = 320;
const SILENT_ROUTER: usize = 120;
const SILENT: usize = 60;
/// Connection limit of the router, in addition to [`SPARE`] for health checks and metrics.
const MAX_CONNECTIONS: usize = 16;
const _: () = assert!(MAX_CONNECTIONS + SPARE < SILENT_ROUTER);

/// A port under attack, with the seeds of its inputs.
struct Port<'a> {
    name: &'static str,
    address: &'a str,
    seeds: Vec<Vec<u8>>,
}

struct Rig {
    prefill: Service,
    decode: Service,
    router: Service,
}

impl Rig {
    fn start() -> Result<Self> {
        let prefill = Service::start::<&str>(prefill_args(PAIR), &[])?;
        let decode = Service::start::<&str>(decode_args(PAIR), &[])?;
        let args = ["--prefill-url", &prefill.url(), "--decode-url", &decode.url()];
        let limit = MAX_CONNECTIONS.to_string();
        let router = Service::start(router_args(), &[&args[..], &["--max-connections", &limit]].concat())?;
        router.wait_nodes(1, 1)?;
        Ok(Self { prefill, decode, router })
    }

    fn services(&self) -> [(&'static str, &Service); 3] {
        [("prefill", &self.prefill), ("decode", &self.decode), ("router", &self.router)]
    }

    fn ports(&self) -> Result<Vec<Port<'_>>> {
        let port = |name, address, seeds| Port { name, address, seeds };
        Ok(vec![
            port("kv", self.decode.kv().context("no KV port")?, inputs::kv()),
            port("decode grpc", self.decode.grpc(), inputs::grpc()),
            port("prefill grpc", self.prefill.grpc(), inputs::grpc()),
            port("router grpc", self.router.grpc(), inputs::grpc()),
            // The router serves its admin routes on the HTTP port, too.
            port("router http", self.router.admin(), inputs::http()),
            port("decode admin", self.decode.admin(), inputs::http()),
            port("prefill admin", self.prefill.admin(), inputs::http()),
        ])
    }

    fn answer(&self) -> Result<Completion> {
        let prompt: Vec<u32> = (0..70).map(|i| 5 + i * 7 % 300).collect();
        Request::tokens(&prompt, 24)
            .with("logprobs", json!(3))
            .with("return_tokens_as_token_ids", json!(true))
            .send(&self.router)
    }

    fn check(&mut self, answer: &Completion) -> Result<()> {
        for service in [&mut self.prefill, &mut self.decode, &mut self.router] {
            service.check_live()?;
        }
        self.router.wait_nodes(1, 1)?;
        for (service, gauge) in [&self.prefill, &self.decode].iter().flat_map(|s| IDLE_GAUGES.map(|gauge| (s, gauge))) {
            service.wait_metric(gauge, "", 0.0)?;
        }
        answer.check_same(&self.answer()?)
    }

    fn memory(&self) -> Result<Vec<Option<u64>>> {
        self.services().iter().map(|(_, service)| service.resident_kib()).collect()
    }
}

/// Sends one input. The server may close the connection at any time, and must close it after the end of the input.
fn give(address: &str, input: &[u8], waits: bool) -> Result<()> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    let sent = stream.write_all(input).and_then(|()| if waits { stream.shutdown(Shutdown::Write) } else { Ok(()) });
    if !waits || sent.is_err() {
        return Ok(());
    }
    let mut answer = [0; 4096];
    loop {
        match stream.read(&mut answer) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                bail!("the server keeps the connection open")
            }
            Err(_) => return Ok(()),
        }
    }
}

/// Sends `count` inputs to every port, from several concurrent clients.
fn storm(ports: &[Port<'_>], count: usize, seed: u64) -> Result<()> {
    let next = AtomicUsize::new(0);
    let client = || -> Result<()> {
        loop {
            let index = next.fetch_add(1, Relaxed);
            let Some(port) = ports.get(index % ports.len()).filter(|_| index < count * ports.len()) else {
                return Ok(());
            };
            let mut random = Random::new(seed.wrapping_mul(1 << 32) + index as u64);
            let input = match random.below(8) {
                0 => (0..random.below(300)).map(|_| random.bits() as u8).collect(),
                1 => random.of(&port.seeds).clone(),
                _ => mutated(&port.seeds, &mut random),
            };
            give(port.address, &input, random.below(4) > 0).with_context(|| {
                let shown = String::from_utf8_lossy(&input[..input.len().min(300)]).into_owned();
                format!("input {index} on the {} port: {shown:?}", port.name)
            })?;
        }
    };
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
        clients.into_iter().try_for_each(|client| client.join().unwrap_or_else(|_| bail!("a client panicked")))
    })
}

#[test]
fn strangers_on_every_port_cost_nothing() -> Result<()> {
    let mut rig = Rig::start()?;
    let answer = rig.answer()?;
    storm(&rig.ports()?, FIRST_INPUTS, 1)?;
    rig.check(&answer)?;
    let before = rig.memory()?;

    storm(&rig.ports()?, INPUTS, 2)?;
    tickets::misuse(&rig.decode)?;
    rig.check(&answer)?;
    let after = rig.memory()?;
    for (((name, _), before), after) in rig.services().iter().zip(&before).zip(&after) {
        let (Some(before), Some(after)) = (before, after) else { continue };
        eprintln!("{name}: {before} KiB, then {after} KiB");
        ensure!(*after <= before + GROWTH_KIB, "{name} had {before} KiB, and now has {after} KiB");
    }
    Ok(())
}

#[test]
fn silent_connections_keep_nobody_out() -> Result<()> {
    let mut rig = Rig::start()?;
    let answer = rig.answer()?;
    let mut silent = Vec::new();
    for port in rig.ports()? {
        let count = match port.name {
            "kv" => SILENT_KV,
            "router grpc" | "router http" => SILENT_ROUTER,
            _ => SILENT,
        };
        for i in 0..count {
            let mut stream = TcpStream::connect(port.address)?;
            // Some connections send the beginning of a valid input first.
            if i % 3 == 0 {
                stream.write_all(&port.seeds[0][..i % 20])?;
            }
            silent.push(stream);
        }
    }
    // The cluster serves as if there were no silent connections: no attempt failed.
    answer.check_same(&rig.answer()?)?;
    let failed = rig.router.metric("overfill_migrations_total", "")?;
    ensure!(failed.unwrap_or(0.0) == 0.0, "{failed:?} attempts failed");
    drop(silent);
    rig.check(&answer)
}
