//! The compiler of GPU kernels, from PyPI. Tests build with it and run on the software GPU.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};

use crate::process::{succeeds, target};
use crate::{apt, python};

const REQUIREMENTS: &str = "xtask/src/cuda/requirements.txt";
const ENVIRONMENT: &str = "nvcc-venv";

/// Features of a build with GPU nodes and KV over NCCL.
pub const FEATURES: &str = "overfill-cli/nccl,overfill-transport/nccl";

/// Installs nvcc, unless it is present, and the C++ compiler of the software GPU.
pub fn prepare() -> Result<()> {
    if cfg!(not(target_arch = "x86_64")) {
        bail!("the software GPU is made for x86-64 only");
    }
    apt::compiler()?;
    nvcc()
}

/// Installs nvcc, unless it is present.
pub fn nvcc() -> Result<()> {
    if std::env::var_os("CUDA_HOME").is_none() {
        python::venv(ENVIRONMENT, REQUIREMENTS)?;
    }
    match home() {
        Some(home) if succeeds(Command::new(home.join("bin/nvcc")).arg("--version")) => Ok(()),
        _ => bail!("nvcc does not start after its installation"),
    }
}

/// The folder of CUDA that builds use: `CUDA_HOME`, or the one that [`prepare`] has installed. `None`: there is none.
pub fn home() -> Option<PathBuf> {
    if let Some(home) = std::env::var_os("CUDA_HOME") {
        return Some(home.into());
    }
    let libraries = std::fs::read_dir(target().join(ENVIRONMENT).join("lib")).ok()?;
    let homes = libraries.flatten().map(|python| python.path().join("site-packages/nvidia/cu13"));
    homes.into_iter().find(|home| home.join("bin/nvcc").is_file())
}
