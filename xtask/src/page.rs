//! `cargo xtask page`: tests of the router's page in headless Chromium.

use std::process::Command;

use anyhow::Result;

use crate::cluster::Cluster;
use crate::process::{root, run as sh, target};
use crate::python::venv;

/// Tests the page with invented data, then the page of a real router, if there is a binary in target/debug.
pub fn run() -> Result<()> {
    let python = venv("page-venv", "tests/page/requirements.txt")?;
    let tests = || {
        let mut command = Command::new(&python);
        command.args(["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/page"]).current_dir(root());
        command
    };
    sh(&mut tests())?;
    let binary = target().join("debug/overfill");
    if !binary.exists() {
        return Ok(());
    }
    let cluster = Cluster::start(&binary)?;
    let tested = sh(tests().env("OVERFILL_PAGE_URL", &cluster.http));
    let ended = cluster.end();
    tested.and(ended)
}
