//! Every fault in every phase, on a node of each role, under load. Every answer equals the undisturbed answer.

use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use overfill_tests::rig::{HANDING_OVER, Load, RUNNING, Role, wait_phase};
use overfill_tests::{Completion, Network, Rig, wait_for};

/// Fault of a node.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// The process is killed and restarted.
    Killed,
    /// The process is stopped with open connections, then continued.
    Frozen,
    /// All packets from and to the node are dropped.
    Unreachable,
    /// All packets of KV connections are dropped. Other packets arrive.
    KvLost,
    /// One of ten packets is dropped.
    Lossy,
    /// The node's link is slow.
    Slow,
}

/// Link speed of a slow node. For comparison, a request has 115 to 180 kB of KV.
const SLOW_BYTES_PER_SECOND: u32 = 150_000;

impl Fault {
    fn begin(self, rig: &mut Rig, role: Role) -> Result<()> {
        let kv_ports = rig.kv_ports();
        let node = rig.node(role);
        let host = || node.host().context("it runs on no host of its own");
        match self {
            Self::Killed => node.kill(),
            Self::Frozen => node.signal("STOP"),
            Self::Unreachable => host()?.drop_packets(100, &[]),
            Self::KvLost => host()?.drop_packets(100, &kv_ports),
            Self::Lossy => host()?.drop_packets(10, &[]),
            Self::Slow => host()?.slow_down(SLOW_BYTES_PER_SECOND),
        }
    }

    fn end(self, rig: &mut Rig, role: Role) -> Result<()> {
        match self {
            Self::Killed => return rig.start_again(role),
            Self::Frozen => rig.node(role).signal("CONT")?,
            _ => rig.node(role).host().context("it runs on no host of its own")?.heal(),
        }
        rig.wait_up(role, 2)
    }

    /// Returns whether the router must detect that the node is unusable.
    fn takes_out(self) -> bool {
        matches!(self, Self::Killed | Self::Frozen | Self::Unreachable)
    }

    fn needs_network(self) -> bool {
        !matches!(self, Self::Killed | Self::Frozen)
    }
}

const FAULTS: [Fault; 6] = [Fault::Killed, Fault::Frozen, Fault::Unreachable, Fault::KvLost, Fault::Lossy, Fault::Slow];

/// Number of times that a fault is tried until it meets a request in its phase.
const TRIES: usize = 10;

fn cell(rig: &mut Rig, answers: &[Completion], fault: Fault, role: Role, phase: &str) -> Result<()> {
    let started = Instant::now();
    let before = rig.migrations()?;
    let moves = fault.takes_out() && role == Role::Decode && phase == RUNNING;
    let pauses = rig.under_load(answers, |rig, load: &Load| {
        for _ in 0..TRIES {
            wait_phase(rig.node(role), phase)?;
            fault.begin(rig, role)?;
            if fault.takes_out() {
                rig.wait_up(role, 1)?;
            }
            if fault == Fault::KvLost {
                wait_for("migrations", || Ok((rig.migrations()? == before).then(|| "none".into())))?;
            }
            for _ in 0..5 {
                load.wait_progress().context("while it lasted")?;
            }
            fault.end(rig, role)?;
            // A request may end between the look at the gauge and the fault.
            if !moves || rig.migrations()? > before {
                return Ok(());
            }
        }
        bail!("the node decoded no request when the fault began, {TRIES} times")
    })?;
    let (moved, seconds) = (rig.migrations()? - before, started.elapsed().as_secs_f64());
    eprintln!("{fault:?} {role:?} at {phase}: {seconds:.1} s, {moved} moved, {pauses}");
    Ok(())
}

#[test]
fn no_fault_at_any_phase_costs_an_answer() -> Result<()> {
    let network = Network::start()?;
    let mut rig = Rig::start(network.as_ref())?;
    let answers = rig.answers()?;
    ensure!(rig.migrations()? == 0.0, "migrations before anything happened");
    for fault in FAULTS.into_iter().filter(|fault| network.is_some() || !fault.needs_network()) {
        for (role, phase) in
            [Role::Decode, Role::Prefill].iter().flat_map(|role| [RUNNING, HANDING_OVER].map(|phase| (*role, phase)))
        {
            cell(&mut rig, &answers, fault, role, phase)
                .with_context(|| format!("{fault:?}, {role:?} at {phase}"))
                // Before the logs of the processes, which are long.
                .inspect_err(|error| eprintln!("{error:#}"))?;
        }
    }
    Ok(())
}
