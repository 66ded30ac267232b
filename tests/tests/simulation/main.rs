//! Simulates whole clusters: a router, nodes and clients on one thread, in simulated time. The network drops, delays
//! and cuts connections, and hosts crash and restart. The seed determines all events.
//!
//! The router's core, the nodes' services, queues and schedulers, and the KV transport are the real code. Models,
//! sockets and clocks are simulated. The invariants KV-1 to KV-6 of ARCHITECTURE.md are checked throughout.
//!
//! A failing seed is printed. To repeat it exactly, run `OVERFILL_SIM_SEED=123 cargo test --workspace --test simulation
//! -- --nocapture`, with `RUST_LOG=debug` for more output. `OVERFILL_SIM_SEEDS` sets the number of seeds.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod client;
mod content;
mod decode;
mod entropy;
mod ghost;
mod guard;
mod net;
mod node;
mod pace;
mod plan;
mod prefill;
mod run;

use std::{
    env, panic,
    process::{Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Capacity of the channels to a simulation's tasks.
const MAX_ASKED: usize = 4096;

/// Environment variable with a single seed to run.
const SEED: &str = "OVERFILL_SIM_SEED";
/// Environment variable with the number of seeds to run.
const SEEDS: &str = "OVERFILL_SIM_SEEDS";
/// Default number of seeds.
const DEFAULT_SEEDS: u64 = 2000;
/// Maximum real time of one simulation.
const PATIENCE: Duration = Duration::from_secs(120);
/// Name of the test.
const NAME: &str = "clusters_keep_their_promises";

static PANIC: Mutex<Option<String>> = Mutex::new(None);

/// Returns the first panic of this process. Panics of tasks are reported nowhere else.
fn panicked() -> Option<String> {
    PANIC.lock().unwrap().clone()
}

fn note_panics() {
    panic::set_hook(Box::new(|info| {
        eprintln!("{info}");
        PANIC.lock().unwrap().get_or_insert(info.to_string());
    }));
}

#[test]
fn clusters_keep_their_promises() {
    match env::var(SEED) {
        Ok(seed) => one(seed.parse().expect("the seed is a number")),
        Err(_) => many(),
    }
}

fn one(seed: u64) {
    note_panics();
    if env::var_os("RUST_LOG").is_some() {
        overfill_cluster::init_telemetry(overfill_cluster::LogFormat::Text);
    }
    let outcome = run::simulate(seed);
    println!("seed {seed}: digest {:016x}, {}", outcome.digest, outcome.summary);
    if let Err(violation) = outcome.verdict {
        println!("seed {seed}: {violation}");
        // Runtime threads may still be running, so the process exits directly.
        std::process::exit(1);
    }
}

fn many() {
    let count: u64 = env::var(SEEDS).map_or(DEFAULT_SEEDS, |n| n.parse().expect("the number of seeds is a number"));
    let fresh = count / 10;
    let first = rand::random::<u32>();
    let seeds: Vec<u64> = (0..count - fresh).chain((0..fresh).map(|i| u64::from(first) + i)).collect();
    println!("{count} seeds, {fresh} of them random: {first}..{}", u64::from(first) + fresh);
    let (next, failures, start) = (AtomicUsize::new(0), Mutex::new(Vec::new()), Instant::now());
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(failure) = in_a_process(*seed) {
                        failures.lock().unwrap().push((*seed, failure));
                    }
                    if failures.lock().unwrap().len() >= 10 {
                        return;
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    println!("{:.1} seeds per second", count as f64 / start.elapsed().as_secs_f64());
    for (seed, failure) in &failures {
        println!("{failure}\nagain: {SEED}={seed} cargo test --workspace --test simulation -- --nocapture\n");
    }
    assert!(failures.is_empty(), "seeds that failed: {:?}", failures.iter().map(|(seed, _)| seed).collect::<Vec<_>>());
}

/// Runs each seed in a new process, since the runtime's random choices depend on what the process did before.
fn in_a_process(seed: u64) -> Result<String, String> {
    let mut child = Command::new(env::current_exe().map_err(|e| e.to_string())?)
        .args(["--exact", NAME, "--nocapture", "--test-threads=1"])
        .env(SEED, seed.to_string())
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| e.to_string())?;
    let began = Instant::now();
    while child.try_wait().map_err(|e| e.to_string())?.is_none() {
        if began.elapsed() > PATIENCE {
            child.kill().map_err(|e| e.to_string())?;
            return Err(format!("seed {seed}: still running after {} s", PATIENCE.as_secs()));
        }
        thread::sleep(Duration::from_millis(2));
    }
    let output = child.wait_with_output().map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let (first, heard) =
        (said.lines().filter(|line| line.starts_with("seed ")), String::from_utf8_lossy(&output.stderr));
    let lines: Vec<&str> = first.collect();
    match output.status.success() {
        true => Ok(lines.join("\n")),
        false => Err(format!("{}\n{heard}", lines.join("\n"))),
    }
}

#[test]
fn a_seed_replays_step_for_step() {
    if env::var_os(SEED).is_some() {
        return;
    }
    for seed in [3, 14, 15] {
        assert_eq!(in_a_process(seed), in_a_process(seed));
    }
}
