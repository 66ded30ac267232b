//! lm-evaluation-harness, AIPerf and LangChain, unmodified, against clusters. `tests/clients/` has their scripts.

use anyhow::Result;
use overfill_tests::golden::folder;
use overfill_tests::python::run_script;
use overfill_tests::{Cluster, Golden, Router as _};

/// Runs a script against a cluster. `tokenizer` is the folder of the full model.
fn run(script: &str, cluster: &Cluster, model: &str, tokenizer: &str) -> Result<()> {
    let url = format!("{}/v1", cluster.http());
    run_script(script, &[("OVERFILL_URL", &url), ("OVERFILL_MODEL", model), ("OVERFILL_TOKENIZER", tokenizer)])?;
    cluster.check_undisturbed()?;
    cluster.wait_idle()
}

const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../demo/full");

#[test]
fn lm_evaluation_harness_scores_the_demo_pair() -> Result<()> {
    let cluster = Cluster::start::<&str>(&[])?;
    run("clients/test_lm_eval.py", &cluster, "demo", DEMO)
}

#[test]
fn aiperf_finishes_without_failed_requests() -> Result<()> {
    let cluster = Cluster::start::<&str>(&[])?;
    run("clients/test_aiperf.py", &cluster, "demo", DEMO)
}

#[test]
fn langchain_gets_calls_and_structured_output() -> Result<()> {
    let mut args = Golden::up_args("llama-untied");
    args.push("--router-arg=--tool-call-parser=hermes".into());
    let cluster = Cluster::start(&args)?;
    run("clients/test_langchain.py", &cluster, "small", &folder("llama-untied", "full"))
}
