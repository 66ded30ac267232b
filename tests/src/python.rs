//! Python scripts of tests, and their interpreters.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::cluster::binary;

/// The interpreter that `cargo xtask test` prepares, with the packages of tests/python/requirements.txt.
pub fn python() -> Result<PathBuf> {
    interpreter("OVERFILL_PYTHON", "venv")
}

/// The interpreter that a variable names, else that of an environment in Cargo's target folder.
fn interpreter(variable: &str, environment: &str) -> Result<PathBuf> {
    if let Some(python) = std::env::var_os(variable) {
        return Ok(python.into());
    }
    let binary = binary()?;
    let target = binary.parent().and_then(|profile| profile.parent()).context("finding the target folder")?;
    let python = target.join(environment).join("bin/python");
    if !python.is_file() {
        bail!("{} is missing: `cargo xtask test` prepares it", python.display());
    }
    Ok(python)
}

/// Runs a script of `tests/python` or `tests/clients`, with the packages of requirements.txt there. Fails, with its output,
/// unless it succeeds.
pub fn run_script(script: &str, variables: &[(&str, &str)]) -> Result<()> {
    let python = match script.starts_with("clients/") {
        true => interpreter("OVERFILL_CLIENTS_PYTHON", "clients-venv")?,
        false => python()?,
    };
    let mut command = Command::new(python);
    command.arg(format!("{}/{script}", env!("CARGO_MANIFEST_DIR"))).envs(variables.iter().copied());
    // Hugging Face's libraries must not look for anything on the hub.
    command.env("HF_HUB_OFFLINE", "1");
    let output = command.output().with_context(|| format!("starting {script}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    ensure!(output.status.success(), "{script}:\n{}{}", text(&output.stdout), text(&output.stderr));
    Ok(())
}
