//! Whole simulations of a machine with round figures.

use std::path::PathBuf;

use clap::Parser;
use tempfile::TempDir;

use super::{
    SimulateArgs,
    record::{Record, Summary},
    simulate,
};
use crate::plan::cluster::{self, tests};
use crate::plan::mix::tests::drawn;
use crate::plan::profile::{Profile, tests::round};

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: SimulateArgs,
}

fn profile(change: impl FnOnce(&mut Profile)) -> (TempDir, PathBuf) {
    let mut profile = round();
    change(&mut profile);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("p.json");
    std::fs::write(&file, serde_json::to_string(&profile).unwrap()).unwrap();
    (folder, file)
}

/// The summary in few words.
fn text(summary: &Summary) -> String {
    serde_json::to_string(summary).unwrap()
}

fn run(change: impl FnOnce(&mut Profile), flags: &str) -> (Record, Summary) {
    let (_folder, file) = profile(change);
    let args = ["simulate", "--profile", file.to_str().unwrap()].into_iter().chain(flags.split_whitespace());
    simulate(&Cli::try_parse_from(args).unwrap().args).unwrap()
}

#[test]
fn requests_that_are_alone_take_what_the_profile_says() {
    let overhead = |p: &mut Profile| p.overhead.request_seconds = vec![0.5];
    let (_, summary) =
        run(overhead, "--rate 0.2 --duration-seconds 200 --prompt-tokens 100 --output-tokens 20 --pod-start-seconds 1");
    assert!(summary.complete > 20 && summary.complete == summary.requests, "{}", text(&summary));
    let ttft = summary.ttft_seconds.unwrap();
    // 1 ms + 100 tokens of 0.1 ms, beside the overhead.
    assert!((ttft.p50 / 0.511 - 1.0).abs() < 0.01, "{ttft:?}");
    assert!((summary.itl_seconds.p50 / 0.0055 - 1.0).abs() < 0.03, "{:?}", summary.itl_seconds);
}

/// `overfill plan` judges nodes with a model of its own: other code, apart from the schedulers.
#[test]
fn two_simulations_agree() {
    let (prompt, output) = ("lognormal:200,800,2000", "uniform:8,64");
    let flags = format!(
        "--rate 12 --duration-seconds 200 --prompt-tokens {prompt} --output-tokens {output} --prefill-nodes 1 --decode-nodes 1"
    );
    let (_, summary) = run(|_| {}, &flags);
    let planned = cluster::run(&tests::two_stage(1, 1), &drawn(prompt, output), &tests::load(12.0, 2000));
    let ttft = summary.ttft_seconds.as_ref().unwrap();
    for (name, simulated, planned) in [
        ("TTFT p50", ttft.p50, planned.ttft(0.5)),
        ("TTFT p95", ttft.p95, planned.ttft(0.95)),
        ("ITL p50", summary.itl_seconds.p50, planned.itl.quantile(0.5)),
        ("ITL p95", summary.itl_seconds.p95, planned.itl.quantile(0.95)),
    ] {
        assert!((simulated / planned - 1.0).abs() < 0.2, "{name}: {simulated} simulated, {planned} planned");
    }
}

#[test]
fn a_shared_prefix_is_computed_once() {
    let flags = "--rate 0.5 --duration-seconds 100 --prompt-tokens 1000 --output-tokens 2 --prefix-hit-rate 0.8";
    let (_, summary) = run(|_| {}, flags);
    let ttft = summary.ttft_seconds.unwrap();
    assert!(ttft.p50 < 0.04 && ttft.max > 0.09, "{ttft:?}");
}

#[test]
fn dead_nodes_and_rollouts_cost_no_request() {
    let flags = "--rate 10 --duration-seconds 120 --prompt-tokens 200 --output-tokens 100 --prefill-nodes 2 --decode-nodes 2 \
                 --pod-start-seconds 2 --at 20=kill:decode --at 40=kill:prefill --at 60=rollout:decode --at 60=rollout:prefill";
    let (record, summary) = run(|_| {}, flags);
    assert_eq!((summary.complete, summary.failed, summary.refused), (summary.requests, 0, 0), "{}", text(&summary));
    assert!(summary.requests > 1000 && summary.migrations > 0, "{}", text(&summary));
    assert_eq!((summary.prefill_most_nodes, summary.decode_most_nodes), (3, 3));
    let last = record.samples.last().unwrap();
    assert_eq!((last.prefill.serving, last.decode.serving), (2, 2));
    assert!(record.samples.iter().any(|sample| sample.decode.draining > 0));
    let least = record.samples.iter().map(|sample| sample.decode.serving).min();
    assert_eq!(least, Some(1));
}

#[test]
fn a_pool_follows_its_load() {
    let flags = "--rate 1 --duration-seconds 900 --prompt-tokens 2000 --output-tokens 8 --prefill-max-nodes 10 \
                 --max-queue-seconds 300 --scale-down-seconds 60 --at 30=rate:12 --at 180=rate:0.5";
    let (record, summary) = run(|_| {}, flags);
    assert_eq!(summary.failed + summary.refused, 0, "{}", text(&summary));
    assert!(summary.prefill_most_nodes >= 3 && summary.decode_most_nodes == 1, "{}", text(&summary));
    assert_eq!(record.samples.last().unwrap().prefill.serving, 1);
    let hours = summary.seconds / 3600.0;
    assert!(summary.prefill_node_hours > 1.2 * hours && summary.prefill_node_hours < 9.0 * hours, "{}", text(&summary));
}

#[test]
fn requests_wake_a_cluster_without_nodes() {
    let flags = "--rate 0.05 --duration-seconds 100 --prompt-tokens 100 --output-tokens 8 --prefill-nodes 0 --decode-nodes 0 \
                 --prefill-max-nodes 2 --decode-max-nodes 2 --prefill-min-nodes 0 --decode-min-nodes 0 --max-queue-seconds 300";
    let (record, summary) = run(|_| {}, flags);
    assert_eq!((summary.complete, summary.requests > 0), (summary.requests, true), "{}", text(&summary));
    assert_eq!((record.samples[0].prefill.serving, summary.prefill_most_nodes), (0, 1));
    // Until the autoscaler looks, the pod has started and its model is loaded.
    assert!(summary.ttft_seconds.unwrap().max > 30.0);
}

#[test]
fn contradictory_flags_are_refused() {
    let (_folder, file) = profile(|_| {});
    let refused = |flags: &str| {
        let flags =
            ["simulate", "--rate", "1", "--profile", file.to_str().unwrap()].into_iter().chain(flags.split(' '));
        simulate(&Cli::try_parse_from(flags).unwrap().args).unwrap_err().to_string()
    };
    assert_eq!(refused("--decode-nodes 0"), "--decode-nodes must be at least 1 without autoscaling, got 0");
    assert_eq!(refused("--prefill-nodes 4 --prefill-max-nodes 3"), "--prefill-nodes must be in [1, 3], got 4");
}
