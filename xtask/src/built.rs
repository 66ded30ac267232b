//! What cargo has built, by its messages.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::process::cargo;

/// A program that cargo has built.
pub struct Built {
    /// Folder of its package.
    folder: String,
    path: PathBuf,
}

/// Runs a cargo command, and returns the programs that it has built.
pub fn built(arguments: &[&str]) -> Result<Vec<Built>> {
    eprintln!("$ cargo {}", arguments.join(" "));
    let mut command = cargo(arguments);
    // The whole workspace, binary and tests in one call: so dependencies have the same features as in the other phases, and
    // are not built again.
    command.args(["--locked", "--workspace"]);
    let output = command.arg("--message-format=json-render-diagnostics").stderr(Stdio::inherit()).output();
    let output = output.context("starting cargo")?;
    if !output.status.success() {
        bail!("cargo {}: {}", arguments.join(" "), output.status);
    }
    Ok(String::from_utf8(output.stdout)?.lines().filter_map(program).collect())
}

/// The program that a message of cargo announces, if any.
fn program(message: &str) -> Option<Built> {
    let message: Value = serde_json::from_str(message).ok()?;
    let folder = Path::new(message["manifest_path"].as_str()?).parent()?.file_name()?.to_string_lossy().into_owned();
    Some(Built { folder, path: PathBuf::from(message["executable"].as_str()?) })
}

/// The program of the package in `folder`.
pub fn of<'a>(programs: &'a [Built], folder: &str) -> Result<&'a Path> {
    let found = programs.iter().find(|program| program.folder == folder);
    found.map(|program| program.path.as_path()).with_context(|| format!("cargo has built no program in {folder}"))
}
