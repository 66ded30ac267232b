//! Memory check of the kernels, which read and write through raw pointers.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::process::{cargo, root, run};

/// Runs the kernel tests under valgrind's memcheck, which fails at accesses outside of allocated memory. valgrind
/// supports AVX2 and hides AVX-512 from programs. `features`: those of the tests that have been built.
pub fn run_kernels(features: &str) -> Result<()> {
    let tests = tests_of("overfill_model", features)?;
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--quiet", "--error-exitcode=9"]).arg(tests).args(["kernels::", "--test-threads=1"]);
    run(valgrind.current_dir(root().join("model")))
}

/// Returns the unit-test executable of a library. It must have been built.
fn tests_of(library: &str, features: &str) -> Result<PathBuf> {
    let args = ["test", "--locked", "--workspace", "--no-run", "--message-format=json", features];
    let output =
        cargo(&args).stderr(Stdio::inherit()).output().context("running cargo to find the test executables")?;
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
    bail!("cargo reported no test executable of {library}")
}
