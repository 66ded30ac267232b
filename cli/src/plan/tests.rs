//! Whole plans, from files to output.

use std::path::{Path, PathBuf};

use clap::Parser;

use super::profile::tests::round;
use super::*;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: PlanArgs,
}

struct Case {
    folder: tempfile::TempDir,
    profile: PathBuf,
}

impl Case {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let profile = folder.path().join("profile.json");
        std::fs::write(&profile, serde_json::to_string(&round()).unwrap()).unwrap();
        Self { folder, profile }
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let file = self.folder.path().join(name);
        std::fs::write(&file, text).unwrap();
        file
    }

    fn args(&self, line: &str) -> PlanArgs {
        let profile = self.profile.to_str().unwrap();
        let words = ["plan", "--profile", profile, "--requests", "300"];
        Line::try_parse_from(words.into_iter().chain(line.split_whitespace())).unwrap().args
    }

    fn plan(&self, line: &str) -> report::Plan {
        report::plan(&self.args(line).task().unwrap()).unwrap()
    }

    fn fault(&self, line: &str) -> String {
        format!("{:#}", self.args(line).task().err().unwrap())
    }
}

const LIMITS: &str = "--ttft-p95-seconds 0.5 --itl-p95-seconds 0.05";

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_plan_says_what_it_should() {
    let case = Case::new();
    let plan = case.plan(&format!("--rate 40 --prompt-tokens 400 --output-tokens 100 {LIMITS}"));
    let [prefill, decode] = &plan.pools;
    // 40 ms per prompt, 48 prompts per second: at least two nodes.
    assert!(prefill.nodes >= 2 && prefill.nodes_without_headroom <= prefill.nodes, "{prefill:?}");
    assert!(decode.nodes >= 2, "{decode:?}");
    let (half, twice) = prefill.range;
    assert!(half.unwrap() <= prefill.nodes && twice.unwrap() > prefill.nodes, "{prefill:?}");
    assert!(prefill.scaling_target > 0.0 && (0.05..=1.0).contains(&decode.scaling_target));
    let names: Vec<_> = plan.comparison.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(names, ["two-stage", "colocated, full model", "colocated, pruned model"]);
    assert!(plan.comparison[2].note.contains("other quality"));
    assert_eq!(plan.comparison[0].nodes, [prefill.nodes, decode.nodes]);
    assert_eq!(plan.what_if.len(), 7);
    // 4 nodes for 40 x 100 tokens per second would cost 0.28 node-hours per million.
    let nodes = (prefill.nodes + decode.nodes) as f64;
    assert!((plan.cost.per_million_output_tokens / (nodes / 3600.0 / 4000.0 * 1e6) - 1.0).abs() < 1e-9);
    let sum: f64 = plan.ttft_legs.iter().map(|(_, seconds)| seconds).sum();
    assert!((sum / plan.latency[1].ttft_seconds[2] - 1.0).abs() < 0.2, "{sum} {:?}", plan.latency[1]);
    let text = print::print(&plan);
    for part in ["POOL", "COMPARISON", "WHAT IF", "TTFT p95 by leg", "node-hours", "twice the rate"] {
        assert!(text.contains(part), "{part} is missing in {text}");
    }
}

#[test]
fn prices_and_other_machines_count() {
    let case = Case::new();
    let mut cheap = round();
    cheap.machine = "cheap".into();
    let file = case.file("decode.json", &serde_json::to_string(&cheap).unwrap());
    let line = format!(
        "--rate 10 --decode-profile {0} --alternative int8={0} --prefill-node-price 4 --decode-node-price 1 {LIMITS}",
        path(&file)
    );
    let plan = case.plan(&line);
    let [prefill, decode] = &plan.pools;
    assert_eq!(plan.cost.per_hour, 4.0 * prefill.nodes as f64 + decode.nodes as f64);
    assert_eq!((decode.machine.as_str(), plan.cost.unit), ("cheap", "price"));
    assert!(plan.what_if.iter().any(|row| row.name == "profile int8"));
}

#[test]
fn a_trace_brings_its_own_rate() {
    let case = Case::new();
    let lines: String = (0..50)
        .map(|i| format!("{{\"timestamp\":{},\"input_length\":{},\"output_length\":20}}\n", i * 500, 100 + i))
        .collect();
    let trace = case.file("t.jsonl", &lines);
    let plan = case.plan(&format!("--trace {} {LIMITS}", path(&trace)));
    assert!((plan.rate - 2.0).abs() < 1e-9, "{}", plan.rate);
    assert_eq!(plan.requests.max_prompt_tokens, 149);
}

#[test]
fn faults_say_what_is_needed() {
    let case = Case::new();
    assert!(case.fault(LIMITS).starts_with("--rate is needed"));
    assert!(case.fault("--rate 1 --ttft-p95-seconds 1").contains("at least one limit of itl is needed"));
    assert!(
        case.fault(&format!("--rate 1 {LIMITS} --kv-pool-tokens 3"))
            .contains("--kv-pool-tokens must be at least 16, got 3")
    );
    let mut other = round();
    other.kv_bytes_per_token = 7.0;
    let file = case.file("o.json", &serde_json::to_string(&other).unwrap());
    let fault = case.fault(&format!("--rate 1 {LIMITS} --decode-profile {}", path(&file)));
    assert!(fault.contains("got 1000 and 7"), "{fault}");
    let parse = |line: &str| Line::try_parse_from(line.split_whitespace()).err().unwrap().to_string();
    assert!(parse("plan --profile p --rate 1 --prefix-hit-rate 2").contains("must be in [0, 1], got 2"));
    assert!(parse("plan --profile p --alternative int8").contains("must be NAME=FILE"));
}

#[test]
fn what_a_request_alone_misses_is_infeasible() {
    let case = Case::new();
    let task = case.args("--rate 1 --prompt-tokens 5000 --ttft-p95-seconds 0.1 --itl-p95-seconds 1").task().unwrap();
    let Err(Infeasible(reason)) = report::plan(&task) else { panic!("feasible") };
    assert!(reason.contains("TTFT p95 is 51") && reason.contains("limit 100.0 ms"), "{reason}");
}

#[test]
fn a_given_cluster_is_judged() {
    let case = Case::new();
    let judged = |nodes: &str| {
        let task =
            case.args(&format!("--rate 20 --prompt-tokens 400 --output-tokens 100 {LIMITS} {nodes}")).task().unwrap();
        report::judge(&task, task.given.unwrap())
    };
    let ample = judged("--prefill-nodes 3 --decode-nodes 3");
    assert_eq!(ample.misses, Vec::<String>::new());
    let scarce = judged("--prefill-nodes 1 --decode-nodes 1 --one-machine");
    assert!(!scarce.misses.is_empty() && scarce.decode_batch > ample.decode_batch, "{scarce:?}");
}

#[test]
fn values_are_those_of_the_chart() {
    let case = Case::new();
    let line = format!("--rate 40 --prompt-tokens 400 --output-tokens 100 {LIMITS}");
    let (plan, args) = (case.plan(&line), case.args(&line));
    let task = args.task().unwrap();
    let names = |fixed| Names { model: "a: \"b\"", fixed, kv_pool_tokens: task.kv_pool_tokens };
    let scaled = values::values(&plan, &task.settings, &names(false));
    for line in [
        "    - name: default",
        "      model: \"a: \\\"b\\\"\"",
        "      kvPoolTokens: 65536",
        "        enabled: true",
        "        loadSeconds: 30",
        "        loadSeconds: 15",
    ] {
        assert!(scaled.lines().any(|l| l == line), "{line:?} is missing in {scaled}");
    }
    assert!(!scaled.contains("replicas:"), "the autoscaler owns the number: {scaled}");
    let fixed = values::values(&plan, &task.settings, &names(true));
    assert!(fixed.contains(&format!("      replicas: {}\n", plan.pools[1].nodes)) && !fixed.contains("autoscaling"));
}
