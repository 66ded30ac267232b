//! Python environment for the tests that use the OpenAI client, NumPy and safetensors.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::apt;
use crate::process::{root, run, succeeds, target};

/// Prepares the environment of the tests. Returns the interpreter.
pub fn prepare() -> Result<PathBuf> {
    venv("venv", "tests/python/requirements.txt")
}

/// Installs a file of requirements into the environment `target/NAME` unless it is up to date. Returns the interpreter.
pub fn venv(name: &str, requirements: &str) -> Result<PathBuf> {
    let venv = target().join(name);
    let python = venv.join("bin/python");
    let requirements = root().join(requirements);
    let wanted =
        std::fs::read_to_string(&requirements).with_context(|| format!("reading {}", requirements.display()))?;
    let stamp = venv.join("requirements.txt");
    if std::fs::read_to_string(&stamp).is_ok_and(|have| have == wanted) && succeeds(Command::new(&python).arg("-V")) {
        return Ok(python);
    }
    create(&venv)?;
    run(Command::new(&python)
        .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"])
        .arg(&requirements))?;
    std::fs::write(&stamp, wanted).with_context(|| format!("writing {}", stamp.display()))?;
    Ok(python)
}

fn create(venv: &Path) -> Result<()> {
    if !usable() {
        install()?;
    }
    run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(venv))
}

/// Debian ships Python without `ensurepip`, which `venv` needs.
fn usable() -> bool {
    succeeds(Command::new("python3").args(["-c", "import venv, ensurepip"]))
}

fn install() -> Result<()> {
    apt::install(&["python3", "python3-venv"], "the tests need python3 with its venv module")?;
    if !usable() {
        bail!("python3 still has no venv module after installing python3-venv");
    }
    Ok(())
}
