//! The software GPU for the processes of a cluster.

use anyhow::{Result, bail};
use overfill_software_gpu::{Error, SoftwareGpu};

use crate::cluster::Cluster;

/// Environment variables that give processes the software GPU. `None` if the binary or this machine lacks what it needs,
/// unless `OVERFILL_GPU_REQUIRED` is set.
pub fn software_gpu() -> Result<Option<(&'static str, String)>> {
    let missing = |what: String| match std::env::var_os("OVERFILL_GPU_REQUIRED") {
        Some(_) => bail!(what),
        None => {
            eprintln!("SKIPPED: tests of GPU nodes: {what}");
            Ok(None)
        }
    };
    // A device that no machine has: the error says whether the binary knows GPUs.
    let refused = Cluster::refused(&["--device", "cuda:4000"])?;
    if refused.stderr.contains("without GPU support") {
        return missing("the binary was built without the feature cuda".into());
    }
    match SoftwareGpu::build(false, &[]) {
        Ok(gpu) => Ok(Some(gpu.environment())),
        Err(e @ Error::NoCompiler(_)) => missing(e.to_string()),
        Err(e) => bail!(e),
    }
}
