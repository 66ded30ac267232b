//! `cargo xtask test`: what CI runs, in the order in which faults are cheapest to find.

use anyhow::{Result, bail};

use crate::process::{cargo, phase, run as sh};
use crate::{apt, memory, python, tidy};

/// What if etcd is not installed, and can't be?
#[derive(Clone, Copy, PartialEq)]
pub enum Etcd {
    /// The tests that need it are left out, and say so.
    IfThere,
    /// That is a fault.
    Required,
}

/// Runs everything; the first fault ends it.
pub fn run(etcd: Etcd) -> Result<()> {
    phase("format", || sh(&mut cargo(&["fmt", "--all", "--check"])))?;
    phase("tidy", tidy::run)?;
    let found = apt::etcd();
    match (&found, etcd) {
        (Err(error), Etcd::IfThere) => eprintln!("\n== etcd: {error:#}. THE TESTS OF DISCOVERY ARE SKIPPED"),
        (Err(error), Etcd::Required) => bail!("etcd: {error:#}"),
        (Ok(()), _) => {}
    }
    if let Err(error) = apt::network() {
        eprintln!("\n== network: {error:#}. THE TESTS OF BAD LINKS ARE SKIPPED");
    }
    let mut interpreter = None;
    phase("python environment", || {
        interpreter = Some(python::prepare()?);
        Ok(())
    })?;
    phase("lints", || sh(&mut cargo(&["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"])))?;
    // The whole-cluster tests start the real binary, which `cargo test` alone would not build. With the tests in the same
    // call, both are built with the same features of all dependencies, which are then compiled once.
    phase("binaries", || sh(&mut cargo(&["build", "--locked", "--workspace", "--bins", "--tests"])))?;
    phase("tests", || {
        let mut command = cargo(&["test", "--locked", "--workspace", "--no-fail-fast"]);
        if let Some(python) = &interpreter {
            command.env("OVERFILL_PYTHON", python);
        }
        if found.is_ok() {
            command.env("OVERFILL_ETCD_REQUIRED", "1");
        }
        sh(&mut command)
    })?;
    match apt::valgrind() {
        Ok(()) => phase("kernels' accesses to memory", memory::run_kernels),
        Err(error) => {
            eprintln!("\n== valgrind: {error:#}. THE KERNELS' ACCESSES TO MEMORY ARE NOT CHECKED");
            Ok(())
        }
    }
}
