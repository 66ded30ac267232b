//! `cargo xtask monitoring`: the tests of the chart's dashboards and alert rules.

use std::process::Command;

use anyhow::{Result, bail};

use crate::apt;
use crate::process::{root, run as sh, target};
use crate::python::venv;

/// Where the tests are.
const TESTS: &str = "tests/monitoring";

/// Installs Prometheus unless it is present, and runs the tests with the binaries in target/debug.
pub fn run() -> Result<()> {
    apt::promtool()?;
    test()
}

/// Runs the tests. Prometheus must be present.
pub fn test() -> Result<()> {
    let binaries = target().join("debug");
    if !binaries.join("overfill").exists() {
        bail!("{} has no overfill; build it: cargo build --workspace --bins", binaries.display());
    }
    let python = venv("monitoring-venv", "tests/monitoring/requirements.txt")?;
    sh(Command::new(python).args(["-m", "pytest"]).current_dir(root().join(TESTS)).env("OVERFILL_BINARIES", binaries))
}
