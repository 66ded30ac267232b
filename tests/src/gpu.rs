//! The GPU for the processes of a cluster: the software GPU, or with `OVERFILL_REAL_GPU` the machine's.

use anyhow::{Result, bail};
use overfill_software_gpu::{Error, SoftwareGpu};

use crate::cluster::Cluster;

/// Whether the tests run on the machine's GPU.
pub fn is_real() -> bool {
    std::env::var_os("OVERFILL_REAL_GPU").is_some()
}

/// Environment variables that give processes a GPU. `None` if the binary or this machine lacks what it needs, unless
/// `OVERFILL_GPU_REQUIRED` or `OVERFILL_REAL_GPU` is set.
pub fn environment() -> Result<Option<Vec<(&'static str, String)>>> {
    let required = is_real() || std::env::var_os("OVERFILL_GPU_REQUIRED").is_some();
    let missing = |what: String| match required {
        true => bail!(what),
        false => {
            eprintln!("SKIPPED: tests of GPU nodes: {what}");
            Ok(None)
        }
    };
    // A device that no machine has: the error says whether the binary knows GPUs.
    let refused = Cluster::refused(&["--device", "cuda:4000"])?;
    if refused.stderr.contains("without GPU support") {
        return missing("the binary was built without the feature cuda".into());
    }
    if is_real() {
        // Both nodes of a cluster use one GPU.
        return Ok(Some(vec![("NCCL_MULTI_RANK_GPU_ENABLE", "1".to_owned())]));
    }
    match SoftwareGpu::build(false, &[]) {
        Ok(gpu) => Ok(Some(vec![gpu.environment()])),
        Err(e @ Error::NoCompiler(_)) => missing(e.to_string()),
        Err(e) => bail!(e),
    }
}
