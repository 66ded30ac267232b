//! Start and end of a cluster. Configuration errors end it with one line, and the end of any process ends the cluster.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use overfill_tests::cluster::Refused;
use overfill_tests::golden::folder;
use overfill_tests::{Cluster, Golden};
use serde_json::{Value, json};

/// Checks that the cluster ended with exactly one reason, and that it contains all of `needles`.
fn check_refused(refused: &Refused, needles: &[&str]) -> Result<()> {
    ensure!(!refused.status.success(), "the cluster ended well:\n{}", refused.stderr);
    let reasons = refused.reasons();
    ensure!(reasons.len() == 1, "{} reasons instead of one:\n{}", reasons.len(), refused.stderr);
    for needle in needles {
        ensure!(reasons[0].contains(needle), "{:?} does not name {needle:?}", reasons[0]);
    }
    Ok(())
}

/// Copies a golden model and changes its config.json.
fn changed_copy(pair: &str, change: impl FnOnce(&mut Value)) -> Result<tempfile::TempDir> {
    let copy = tempfile::tempdir()?;
    for entry in fs::read_dir(folder(pair, "full"))? {
        let entry = entry?;
        fs::copy(entry.path(), copy.path().join(entry.file_name()))?;
    }
    let path = copy.path().join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
    change(&mut config);
    fs::write(&path, config.to_string())?;
    Ok(copy)
}

fn refused_full(path: &Path) -> Result<Refused> {
    Cluster::refused(&["--full", path.to_str().context("not UTF-8")?])
}

#[test]
fn a_mismatched_pair_is_refused() -> Result<()> {
    let refused = Cluster::refused(&["--full", &folder("qwen3", "full"), "--decode", &folder("llama-tied", "decode")])?;
    check_refused(&refused, &["mismatch", "prefill side", "decode side"])
}

#[test]
fn a_model_that_can_not_be_served_is_refused() -> Result<()> {
    check_refused(&refused_full(Path::new("/nowhere/at/all"))?, &["/nowhere/at/all"])?;

    let unknown = changed_copy("llama-tied", |config| config["architectures"] = json!(["MambaForCausalLM"]))?;
    check_refused(&refused_full(unknown.path())?, &["config.json", "MambaForCausalLM"])?;

    let wrong_shape = changed_copy("llama-tied", |config| config["intermediate_size"] = json!(161))?;
    check_refused(&refused_full(wrong_shape.path())?, &["mlp", "161"])?;

    let missing = changed_copy("llama-tied", |config| {
        let layers = config["num_hidden_layers"].as_u64().unwrap_or_default();
        config["num_hidden_layers"] = json!(layers + 1);
    })?;
    check_refused(&refused_full(missing.path())?, &["layers."])
}

#[test]
fn a_node_that_dies_ends_the_cluster_and_is_named() -> Result<()> {
    let cluster = Cluster::start(&Golden::up_args("llama-tied"))?;
    cluster.signal("decode-1", "KILL")?;
    check_refused(&cluster.wait()?, &["decode-1"])
}

#[test]
fn an_interrupt_ends_all_processes_well() -> Result<()> {
    let cluster = Cluster::start(&Golden::up_args("llama-tied"))?;
    let pids: Vec<u32> = cluster.processes().iter().map(|p| p.pid).collect();
    let status = Command::new("kill").args(["-s", "INT", &cluster.pid().to_string()]).status()?;
    ensure!(status.success(), "kill: {status}");
    let end = cluster.wait()?;
    ensure!(end.status.success(), "{}\n{}", end.status, end.stderr);
    for pid in pids {
        ensure!(!Path::new(&format!("/proc/{pid}")).exists(), "process {pid} still runs");
    }
    Ok(())
}
