//! The OpenAI Python client, unmodified, against a cluster.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use overfill_tests::cluster::binary;
use overfill_tests::{Cluster, Golden, Router as _};

/// Returns the interpreter that `cargo xtask test` prepares, with the packages of tests/python/requirements.txt.
fn python() -> Result<PathBuf> {
    if let Some(python) = std::env::var_os("OVERFILL_PYTHON") {
        return Ok(python.into());
    }
    let binary = binary()?;
    let target = binary.parent().and_then(|profile| profile.parent()).context("finding the target folder")?;
    let python = target.join("venv/bin/python");
    if !python.is_file() {
        bail!("{} is missing: `cargo xtask test` prepares it", python.display());
    }
    Ok(python)
}

#[test]
fn the_openai_client_works_unmodified() -> Result<()> {
    let cluster = Cluster::start(&Golden::up_args("llama-untied"))?;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/python/test_openai_client.py");
    let output = Command::new(python()?)
        .arg(script)
        .env("OVERFILL_URL", format!("{}/v1", cluster.http()))
        .env("OVERFILL_MODEL", "small")
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    cluster.check_undisturbed()?;
    cluster.wait_idle()
}
