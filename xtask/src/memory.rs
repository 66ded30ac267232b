//! Kernels read and write through pointers: their tests again, where every access is checked.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::process::{cargo, root, run};

/// Runs the kernels' tests under valgrind's memcheck, which ends them at the first access beyond what was allocated. It
/// knows AVX2, and shows programs a machine without AVX-512.
pub fn run_kernels() -> Result<()> {
    let tests = tests_of("overfill_model")?;
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--quiet", "--error-exitcode=9"]).arg(tests).args(["kernels::", "--test-threads=1"]);
    run(valgrind.current_dir(root().join("model")))
}

/// The executable with the unit tests of a library, which has been built.
fn tests_of(library: &str) -> Result<PathBuf> {
    let args = ["test", "--locked", "--workspace", "--no-run", "--message-format=json"];
    let output = cargo(&args).stderr(Stdio::inherit()).output().context("asking cargo for the tests")?;
    if !output.status.success() {
        bail!("cargo {}: {}", args.join(" "), output.status);
    }
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let message: serde_json::Value = serde_json::from_str(line).context("cargo's output")?;
        let target = &message["target"];
        let is_library = target["kind"].as_array().is_some_and(|kinds| kinds.iter().any(|kind| kind == "lib"));
        match message["executable"].as_str() {
            Some(executable) if is_library && target["name"] == library => return Ok(executable.into()),
            _ => {}
        }
    }
    bail!("no tests of {library}")
}
