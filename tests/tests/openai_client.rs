//! The OpenAI Python client, unmodified, against a cluster.

use std::process::Command;

use anyhow::{Result, ensure};
use overfill_tests::python::python;
use overfill_tests::{Cluster, Golden, Router as _};

#[test]
fn the_openai_client_works_unmodified() -> Result<()> {
    let mut args = Golden::up_args("llama-untied");
    args.push("--router-arg=--tool-call-parser=hermes".into());
    let cluster = Cluster::start(&args)?;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/python/test_openai_client.py");
    let output = Command::new(python()?)
        .arg(script)
        .env("OVERFILL_URL", format!("{}/v1", cluster.http()))
        .env("OVERFILL_MODEL", "small")
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    cluster.check_undisturbed()?;
    cluster.wait_idle()
}
