//! The OpenAI Python client, unmodified, against a cluster.

use anyhow::Result;
use overfill_tests::python::run_script;
use overfill_tests::{Cluster, Golden, Router as _};

#[test]
fn the_openai_client_works_unmodified() -> Result<()> {
    let mut args = Golden::up_args("llama-untied");
    args.push("--router-arg=--tool-call-parser=hermes".into());
    let cluster = Cluster::start(&args)?;
    let url = format!("{}/v1", cluster.http());
    run_script("python/test_openai_client.py", &[("OVERFILL_URL", &url), ("OVERFILL_MODEL", "small")])?;
    cluster.check_undisturbed()?;
    cluster.wait_idle()
}
