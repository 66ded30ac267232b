//! A long time of churn: nodes are killed, frozen and told to end, clients leave in the middle, and nothing grows.
//!
//! It is not for every day: `cargo test --workspace --test soak -- --ignored --nocapture`. `OVERFILL_SOAK_SECONDS` says
//! how long (1,200; memory is judged by what comes after the third minute), `OVERFILL_SOAK_SEED` what happens. Where it runs
//! in the background, `setsid` must give it a process group of its own: when a shell ends, Linux continues the stopped
//! processes of the group that it leaves, and a node that was frozen is so no more.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use overfill_tests::metrics::At;
use overfill_tests::rig::{Load, REQUESTS, Role, request};
use overfill_tests::{Rig, Router};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Between two looks at memory and gauges.
const ROUND: Duration = Duration::from_secs(60);
/// Rounds until what is only ever filled once is full: prefix caches, pools of threads, the allocator's arenas.
const FIRST_ROUNDS: usize = 3;
/// Clients that leave before their answer has ended.
const LEAVING: usize = 2;
/// How much more memory a process may have at the end than after those. What is lost with every request is found by it if it
/// is a hundred bytes or more.
const GROWTH_KIB: u64 = 4 << 10;

fn setting(name: &str, default: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(value) => value.parse().with_context(|| format!("{name}: {value:?} is not a number")),
        Err(_) => Ok(default),
    }
}

/// Asks and leaves, again and again.
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

/// Things happen to the first node of each role; the second one goes on.
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
        // The others are started again and again.
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
        // It ends with every gauge at 0.
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
