//! Runs the images as containers.

use std::process::Command;

use anyhow::Result;

use super::VERSION;
use super::store::Store;
use crate::process::{root, run};

/// Runs `tests/images/containers.py` on a network and with processes of its own. When it ends for whatever reason, the
/// kernel ends its containers and removes its networks, firewall rules and mounts.
pub fn run_test(store: &Store) -> Result<()> {
    let mut test = Command::new("unshare");
    test.args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "python3"])
        .arg(root().join("tests/images/containers.py"))
        .envs(store.variables())
        .env("OVERFILL_STATE", store.state())
        .env("OVERFILL_VERSION", VERSION);
    run(&mut test)
}
