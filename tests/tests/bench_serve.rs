//! `overfill bench serve` against the demo pair: checks the load that it sends and the results that it reports.

use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use overfill_tests::cluster::binary;
use overfill_tests::{Cluster, Router};
use serde_json::{Value, json};

fn bench(cluster: &Cluster, args: &[&str]) -> Result<Output> {
    let mut command = Command::new(binary()?);
    command.args(["bench", "serve", "--http-url", cluster.http(), "--json"]).args(args);
    command.output().context("running the bench")
}

fn summary(cluster: &Cluster, args: &[&str]) -> Result<Value> {
    let output = bench(cluster, args)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).context("the summary is not JSON")
}

/// Sums a counter over the nodes of a role.
fn counter(cluster: &Cluster, role: &str, name: &str) -> Result<f64> {
    let nodes = cluster.processes().iter().filter(|process| process.name.starts_with(role));
    nodes.map(|node| cluster.gauge(node, name)).sum()
}

#[test]
fn a_closed_loop_counts_every_request_and_token() -> Result<()> {
    let cluster = Cluster::start::<&str>(&[])?;
    let folder = tempfile::tempdir()?;
    let plot = folder.path().join("run.svg");
    let plot = plot.to_str().context("a path that is not UTF-8")?;
    let args = "--requests 12 --concurrency 3 --warm-up-requests 2 --prompt-tokens uniform:8,40 --output-tokens 5 \
                --ttft-limit-seconds 600 --itl-limit-seconds 600 --plot";
    let args: Vec<&str> = args.split_whitespace().chain([plot]).collect();
    let run = summary(&cluster, &args)?;
    ensure!((&run["requests"], &run["succeeded"]) == (&json!(12), &json!(12)), "{run}");
    ensure!(run["errors"] == json!({}) && run["output_tokens"] == json!(60), "{run}");
    let counts = ["ttft_seconds", "itl_seconds", "e2e_seconds"].map(|latency| run[latency]["count"].clone());
    ensure!(counts == [json!(12), json!(48), json!(12)], "{run}");
    ensure!(run["goodput"]["requests"] == json!(12) && run["goodput"]["share"] == json!(1.0), "{run}");

    // The nodes also count the warm-up. Of its five tokens, the prefill node generates one.
    let prompts = counter(&cluster, "prefill", "vllm:prompt_tokens_total")?;
    let measured = run["prompt_tokens"].as_f64().context("no prompt tokens")?;
    ensure!((16.0..=80.0).contains(&(prompts - measured)), "{prompts} prompt tokens on the nodes, {run}");
    let generated = ["prefill", "decode"].map(|role| counter(&cluster, role, "vllm:generation_tokens_total"));
    let [prefill, decode] = generated;
    ensure!((prefill?, decode?) == (14.0, 56.0), "other tokens on the nodes than 14 times 1 and 4");

    let drawn = std::fs::read_to_string(plot)?;
    for title in ["Time to first token", "Time between tokens", "Output tokens per second"] {
        ensure!(drawn.contains(title), "no {title:?} in the picture");
    }
    // The same seed gives the same prompts.
    let again = summary(&cluster, &args)?;
    ensure!(again["prompt_tokens"] == run["prompt_tokens"], "{again}\n{run}");
    cluster.wait_idle()
}

#[test]
fn an_open_loop_is_bounded_and_counts_what_it_does_not_send() -> Result<()> {
    let cluster = Cluster::start::<&str>(&[])?;
    // The arrival rate is so high that most requests find the only place taken.
    let args =
        "--rate 5000 --requests 200 --max-in-flight 1 --prompt-tokens 16 --output-tokens 100 --ttft-limit-seconds 600";
    let run = summary(&cluster, &args.split_whitespace().collect::<Vec<_>>())?;
    let [succeeded, not_sent, good] = [&run["succeeded"], &run["errors"]["not sent"], &run["goodput"]["requests"]]
        .map(|count| count.as_u64().unwrap_or_default());
    ensure!(succeeded >= 1 && not_sent >= 1 && succeeded + not_sent == 200, "{run}");
    ensure!(run["requests"] == json!(200) && good == succeeded, "{run}");
    ensure!(run["output_tokens"] == json!(100 * succeeded), "{run}");
    cluster.wait_idle()
}

#[test]
fn failures_are_counted_by_kind_and_nothing_else_is_claimed() -> Result<()> {
    let cluster = Cluster::start::<&str>(&[])?;
    // The prompt exceeds the demo pair's context.
    let output = bench(&cluster, &["--requests", "3", "--warm-up-requests", "0", "--prompt-tokens", "4000"])?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && text.contains("error: none of 3 requests succeeded"), "{text}");
    let run: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(run["errors"] == json!({"HTTP 400": 3}) && run["ttft_seconds"].is_null(), "{run}");
    ensure!(text.contains("4000"), "no example of the failure in {text}");
    cluster.wait_idle()
}
