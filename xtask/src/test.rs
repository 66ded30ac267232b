//! `cargo xtask test`: what CI runs, in the order in which faults are cheapest to find.

use anyhow::Result;

use crate::process::{cargo, phase, run as sh};
use crate::{python, tidy};

/// Runs everything; the first fault ends it.
pub fn run() -> Result<()> {
    phase("format", || sh(&mut cargo(&["fmt", "--all", "--check"])))?;
    phase("tidy", tidy::run)?;
    let mut interpreter = None;
    phase("python environment", || {
        interpreter = Some(python::prepare()?);
        Ok(())
    })?;
    phase("lints", || sh(&mut cargo(&["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"])))?;
    // The whole-cluster tests start the real binary, which `cargo test` alone would not build.
    phase("binaries", || sh(&mut cargo(&["build", "--locked", "--workspace", "--bins"])))?;
    phase("tests", || {
        let mut command = cargo(&["test", "--locked", "--workspace", "--no-fail-fast"]);
        if let Some(python) = &interpreter {
            command.env("OVERFILL_PYTHON", python);
        }
        sh(&mut command)
    })
}
