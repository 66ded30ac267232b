//! A long churn test: nodes are killed, frozen and drained, clients disconnect, and memory must not grow.
//!
//! Run it with `cargo test --workspace --test soak -- --ignored --nocapture`. `OVERFILL_SOAK_SECONDS` sets the duration
//! (1,200; memory growth is measured after the third minute), `OVERFILL_SOAK_SEED` the random events. In the
//! background, start it with `setsid`, in its own process group: when a shell exits, Linux continues the stopped
//! processes of the orphaned group, which would unfreeze nodes.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use overfill_tests::metrics::At;
use overfill_tests::rig::{Load, REQUESTS, Role, request};
use overfill_tests::{Rig, Router};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Time between two checks of memory and gauges.
const ROUND: Duration = Duration::from_secs(60);
/// Warm-up rounds that fill prefix caches, thread pools and allocator arenas.
const FIRST_ROUNDS: usize = 3;
/// Number of clients that disconnect before their answer ends.
const LEAVING: usize = 2;
/// Allowed memory growth of a process after the warm-up rounds. It is small enough to detect a leak of 100 bytes per
/// request.
const GROWTH_KIB: u64 = 4 << 10;

fn setting(name: &str, default: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(value) => value.parse().with_context(|| format!("{name}: {value:?} is not a number")),
        Err(_) => Ok(default),
    }
}

/// Sends requests and disconnects before they end, until `until`. Returns the number of requests.
fn leave(http: &str, until: Instant, mut random: StdRng) -> Result<usize> {
    let mut left = 0;
    while Instant::now() < until {
        let events = request(random.random_range(0..REQUESTS)).stream(&At(http))?;
        for event in events.take(random.random_range(0..60)) {
            event?;
        }
        left += 1;
    }
    Ok(left)
}

/// Disturbs the first node of each role until `until`. The second nodes keep running.
fn churn(rig: &mut Rig, load: &Load<'_>, until: Instant, random: &mut StdRng) -> Result<usize> {
    let mut happened = 0;
    while Instant::now() < until {
        let role = if random.random() { Role::Prefill } else { Role::Decode };
        match random.random_range(0..3) {
            0 => {
                rig.node(role).kill()?;
                rig.wait_up(role, 1)?;
                rig.start_again(role)?;
            }
            1 => {
                rig.node(role).signal("STOP")?;
                rig.wait_up(role, 1)?;
                rig.node(role).signal("CONT")?;
                rig.wait_up(role, 2)?;
            }
            _ => {
                rig.node(role).signal("TERM")?;
                let status = rig.node(role).wait_end()?;
                ensure!(status.success(), "{role:?} was told to end, and ended with {status}");
                rig.start_again(role)?;
            }
        }
        load.wait_progress()?;
        happened += 1;
    }
    Ok(happened)
}

#[test]
#[ignore = "takes 20 minutes"]
fn nothing_grows() -> Result<()> {
    let seconds = setting("OVERFILL_SOAK_SECONDS", 1200)?;
    let seed = setting("OVERFILL_SOAK_SEED", rand::random::<u32>().into())?;
    eprintln!("OVERFILL_SOAK_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut rig = Rig::start(None)?;
    let answers = rig.answers()?;
    let memory = |rig: &Rig| -> Result<Vec<(&'static str, u64)>> {
        // The disturbed nodes (`-0`) restart, so their memory is not compared.
        let lasting = rig.services().into_iter().filter(|(name, _)| !name.ends_with("-0"));
        lasting
            .map(|(name, service)| Ok((name, service.resident_kib()?.context("memory is read from /proc")?)))
            .collect()
    };
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut first = None;
    for round in 1.. {
        let until = (Instant::now() + ROUND).min(end);
        let http = rig.router.http().to_owned();
        let (mut happened, mut left) = (0, 0);
        // `under_load` returns when every gauge is 0.
        let pauses = rig.under_load(&answers, |rig, load| {
            std::thread::scope(|scope| {
                let leaving: Vec<_> = (0..LEAVING)
                    .map(|_| (&http, StdRng::from_rng(&mut random)))
                    .map(|(http, random)| scope.spawn(move || leave(http, until, random)))
                    .collect();
                happened = churn(rig, load, until, &mut random)?;
                for client in leaving {
                    left += client.join().unwrap_or_else(|_| bail!("a client panicked"))?;
                }
                Ok(())
            })
        })?;
        let now = memory(&rig)?;
        eprintln!("round {round}: {happened} faults, {left} left, resident KiB {now:?}, {pauses}");
        if round <= FIRST_ROUNDS {
            first = Some(now.clone());
        }
        if Instant::now() >= end {
            for ((name, before), (_, after)) in first.unwrap_or_default().into_iter().zip(now) {
                ensure!(after <= before + GROWTH_KIB, "{name} has grown from {before} to {after} KiB");
            }
            return Ok(());
        }
    }
    Ok(())
}
