//! `overfill bench profile` and `overfill plan` with the demo pair, from the measurement to the values of the chart.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use overfill_tests::Cluster;
use overfill_tests::Router;
use overfill_tests::cluster::binary;
use serde_json::Value;

fn overfill(args: &[&str]) -> Result<(bool, String, String)> {
    let output = Command::new(binary()?).args(args).output().context("running overfill")?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((output.status.success(), text(&output.stdout), text(&output.stderr)))
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not UTF-8")
}

#[test]
fn a_measured_profile_makes_a_plan() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo");
    let (full, decode) = (demo.join("full"), demo.join("decode"));
    let (profile, values) = (folder.path().join("profile.json"), folder.path().join("values.yaml"));
    let (profile, values) = (text(&profile)?, text(&values)?);
    let sizes = "--weights f32 --kv-dtype f32 --step-tokens 16,64 --context-tokens 64 --batch 1,4 --out";
    let mut args = vec!["bench", "profile", "--full", text(&full)?, "--decode", text(&decode)?];
    args.extend(sizes.split_whitespace().chain([profile]));
    let (ok, _, errors) = overfill(&args)?;
    ensure!(ok, "{errors}");
    let measured: Value = serde_json::from_str(&std::fs::read_to_string(profile)?)?;
    // Three layers with keys and values of two heads with 16 numbers of four bytes.
    ensure!(measured["kv_bytes_per_token"] == 768.0, "{measured}");
    for list in [&measured["full"]["prefill"], &measured["pruned"]["decode"], &measured["overhead"]["request_seconds"]]
    {
        ensure!(list.as_array().is_some_and(|list| !list.is_empty()), "{measured}");
    }

    // The limits are so generous that a slow machine meets them too.
    let load = "--rate 0.1 --prompt-tokens 64 --output-tokens 16 --requests 50 --json --ttft-p95-seconds 600 \
                --itl-p95-seconds 600 --values";
    let mut args = vec!["plan", "--profile", profile];
    args.extend(load.split_whitespace().chain([values]));
    let (ok, plan, errors) = overfill(&args)?;
    ensure!(ok, "{errors}");
    let plan: Value = serde_json::from_str(&plan)?;
    ensure!(plan["feasible"] == true && plan["pools"][0]["nodes"] == 1 && plan["pools"][1]["nodes"] == 1, "{plan}");
    ensure!(std::fs::read_to_string(values)?.contains("maxReplicas: "), "no autoscaling in the values");

    // No machine computes a prompt in a nanosecond.
    let strict = "--rate 0.1 --prompt-tokens 64 --requests 50 --ttft-p95-seconds 0.000000001 --itl-p95-seconds 600";
    let mut args = vec!["plan", "--profile", profile];
    args.extend(strict.split_whitespace());
    let (ok, _, errors) = overfill(&args)?;
    ensure!(!ok && errors.contains("error: infeasible: of requests that are alone, TTFT p95 is"), "{errors}");
    Ok(())
}

#[test]
fn recorded_requests_are_a_trace() -> Result<()> {
    let cluster = Cluster::start::<&str>(&[])?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("run.jsonl");
    let load = "--requests 6 --concurrency 2 --prompt-tokens uniform:8,40 --output-tokens 5 --record";
    let mut args = vec!["bench", "serve", "--http-url", cluster.http()];
    args.extend(load.split_whitespace().chain([text(&file)?]));
    let (ok, _, errors) = overfill(&args)?;
    ensure!(ok, "{errors}");
    let recorded = std::fs::read_to_string(&file)?;
    let lines: Vec<Value> = recorded.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    ensure!(lines.len() == 6 && lines.iter().all(|line| line["output_length"] == 5), "{recorded}");
    cluster.wait_idle()
}
