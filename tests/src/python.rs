//! The Python interpreter of tests.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::cluster::binary;

/// The interpreter that `cargo xtask test` prepares, with the packages of tests/python/requirements.txt.
pub fn python() -> Result<PathBuf> {
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
