//! `cargo xtask rdma`: the tests of KV over RDMA, in a virtual machine whose kernel makes an RDMA device of a network
//! interface (soft-RoCE). Kernel, libraries and tools are Debian's.

mod machine;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use machine::Machine;

use crate::apt;
use crate::built::{built, of};
use crate::process::{root, target};

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
