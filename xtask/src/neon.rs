//! Tests the ARM kernels on any machine, with a cross compiler and an emulator.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use crate::apt;
use crate::process::{cargo, run as sh, succeeds, target};

const TARGET: &str = "aarch64-unknown-linux-gnu";
const LINKER: &str = "aarch64-linux-gnu-gcc";
const EMULATOR: &str = "qemu-aarch64";

/// Cross compiler for ARM. The linker and the emulator are found by name.
struct Tools {
    rustc: PathBuf,
}

/// Runs the kernel tests for ARM in an emulator.
pub fn run() -> Result<()> {
    tools()?.run_kernels()
}

/// Finds the tools, or installs Debian's.
fn tools() -> Result<Tools> {
    const NEEDS: &str =
        "testing the ARM kernels needs rustc with the target aarch64-unknown-linux-gnu, a linker and an emulator";
    if let Some(tools) = found() {
        return Ok(tools);
    }
    apt::install(
        &["rustc-web", "gcc-aarch64-linux-gnu", "g++-aarch64-linux-gnu", "libc6-dev-arm64-cross", "qemu-user"],
        NEEDS,
    )?;
    // The ARM standard library is a package of the arm64 architecture. Only here is it certain that the user is root on
    // Debian.
    sh(Command::new("dpkg").args(["--add-architecture", "arm64"]))?;
    apt::install(&["libstd-rust-web-dev:arm64"], NEEDS)?;
    match found() {
        Some(tools) => Ok(tools),
        None => bail!("{NEEDS}; they are still missing after installing the packages"),
    }
}

fn found() -> Option<Tools> {
    let starts = |program: &str| succeeds(Command::new(program).arg("--version"));
    let has_target = |rustc: &Path| {
        let libraries = Command::new(rustc).args(["--print", "target-libdir", "--target", TARGET]).output();
        libraries.is_ok_and(|output| Path::new(String::from_utf8_lossy(&output.stdout).trim()).is_dir())
    };
    let rustc = ["rustc", "/usr/bin/rustc"].map(PathBuf::from).into_iter().find(|rustc| has_target(rustc))?;
    (starts(LINKER) && starts(EMULATOR)).then_some(Tools { rustc })
}

impl Tools {
    fn run_kernels(&self) -> Result<()> {
        let mut tests = cargo(&["test", "--locked", "--target", TARGET]);
        tests.args(["-p", "overfill-model", "--lib", "--", "kernels::"]);
        let target_variable = |name: &str| format!("CARGO_TARGET_{}_{name}", TARGET.to_uppercase().replace('-', "_"));
        tests
            .env("RUSTC", &self.rustc)
            .env("CARGO_TARGET_DIR", target().join("neon"))
            .env(target_variable("LINKER"), LINKER)
            .env(target_variable("RUNNER"), EMULATOR)
            // Threads of dynamically linked programs hang in some versions of the emulator.
            .env(target_variable("RUSTFLAGS"), "-C target-feature=+crt-static");
        sh(&mut tests)
    }
}
