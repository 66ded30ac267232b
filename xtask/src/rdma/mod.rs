//! `cargo xtask rdma`: the tests of KV over RDMA, in a virtual machine whose kernel makes an RDMA device of a network
//! interface (soft-RoCE). Kernel, libraries and tools are Debian's.

mod machine;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use machine::Machine;
use serde_json::Value;

use crate::apt;
use crate::process::{cargo, root, target};

/// Features of a build with KV over RDMA.
pub const FEATURES: &str = "overfill-cli/rdma,overfill-transport/rdma";

/// Folder of the golden pair that the whole-cluster test uses.
const PAIR: &str = "tests/golden/llama-tied";

/// Installs what is missing, builds the tests with RDMA, and runs them.
pub fn run() -> Result<()> {
    apt::rdma_build()?;
    apt::rdma_machine()?;
    test(&format!("--features={FEATURES}"))
}

/// Builds the tests and runs them. The programs of [`apt::rdma_machine`] must be present. `features`: at least
/// [`FEATURES`].
pub fn test(features: &str) -> Result<()> {
    let programs = built(&["build", "--bin", "overfill", "--test", "rdma", features])?;
    let mut machine = Machine::new(&target().join("rdma"))?;
    machine.add_program(of(&programs, "cli")?, "/t/debug/overfill")?;
    // Tests run in the order of their names.
    machine.add_program(of(&programs, "transport")?, "/t/debug/deps/1-transport")?;
    machine.add_program(of(&programs, "tests")?, "/t/debug/deps/2-cluster")?;
    // The test finds the pair where it was built.
    machine.add_folder(&root().join(PAIR))?;
    machine.run()
}

/// A program that cargo has built.
struct Built {
    /// Folder of its package.
    folder: String,
    path: PathBuf,
}

/// Runs a cargo command with RDMA, and returns the programs that it has built.
fn built(arguments: &[&str]) -> Result<Vec<Built>> {
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
fn of<'a>(programs: &'a [Built], folder: &str) -> Result<&'a Path> {
    let found = programs.iter().find(|program| program.folder == folder);
    found.map(|program| program.path.as_path()).with_context(|| format!("cargo has built no program in {folder}"))
}

/// Standard output of a program that must succeed.
fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// The first file of `folder` whose name begins with `prefix`.
fn find(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)) {
            return Ok(path);
        }
    }
    bail!("{} has no {prefix}*", folder.display())
}
