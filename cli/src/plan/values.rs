//! The plan as values of the Helm chart.

use std::fmt::Write as _;

use super::args::SettingArgs;
use super::print::number;
use super::report::{Plan, Pool};

/// Default of the router's `--max-running`.
const ROUTER_RUNNING: usize = 256;
/// A pool shrinks at the earliest after this time without load, in seconds.
const LEAST_STABILIZATION_SECONDS: u64 = 300;
/// The longest time that Kubernetes accepts, in seconds.
const MOST_STABILIZATION_SECONDS: u64 = 3600;

/// What the values need beside the plan.
pub struct Names<'a> {
    /// Name of the pair in the chart's `models`.
    pub model: &'a str,
    /// Fixed numbers of nodes, and no autoscaling.
    pub fixed: bool,
    /// Capacity of the KV cache of a prefill node and of a decode node, in tokens.
    pub kv_pool_tokens: (usize, usize),
}

/// The values as YAML.
pub fn values(plan: &Plan, settings: &SettingArgs, names: &Names<'_>) -> String {
    let mut out = format!(
        "# Written by `overfill plan` for {} requests per second, sized for {}.\n\
         # Prefill nodes: {}. Decode nodes: {}.\n",
        number(plan.rate),
        number(plan.sized_for_rate),
        one_line(&plan.pools[0].machine),
        one_line(&plan.pools[1].machine),
    );
    if plan.router_max_running > ROUTER_RUNNING {
        let _ = write!(out, "router:\n  maxRunning: {}\n", plan.router_max_running);
    }
    for (pool, kv_pool_tokens) in plan.pools.iter().zip([names.kv_pool_tokens.0, names.kv_pool_tokens.1]) {
        let prefill = pool.role == "prefill";
        let _ = write!(
            out,
            "{}:\n  pools:\n    # {}\n    - name: default\n      model: {}\n      kvPoolTokens: {kv_pool_tokens}\n",
            pool.role,
            one_line(&pool.bound_by),
            quoted(names.model),
        );
        if prefill {
            let SettingArgs { max_batch_tokens, step_target_seconds, prefill_max_running, .. } = settings;
            let _ = write!(
                out,
                "      maxRunning: {prefill_max_running}\n      maxBatchTokens: {max_batch_tokens}\n      \
                 stepTargetSeconds: {step_target_seconds}\n"
            );
        } else {
            let _ = writeln!(out, "      maxRunning: {}", settings.decode_max_running);
        }
        out += &if names.fixed { format!("      replicas: {}\n", pool.nodes) } else { autoscaling(pool) };
    }
    out
}

/// Bounds and threshold of a pool. The chart does not set the number of nodes of such a pool.
fn autoscaling(pool: &Pool) -> String {
    let (half, twice) = pool.range;
    let load = (pool.start_seconds.ceil() as u64).max(1);
    format!(
        "      autoscaling:\n        enabled: true\n        # Nodes at half and at twice the rate.\n        \
         minReplicas: {}\n        maxReplicas: {}\n        # {} per node\n        target: {}\n        \
         loadSeconds: {load}\n        scaleDownStabilizationSeconds: {}\n        # Nodes at the planned rate.\n        \
         fallbackReplicas: {}\n",
        half.unwrap_or(pool.nodes).min(pool.nodes),
        twice.unwrap_or(2 * pool.nodes).max(pool.nodes),
        if pool.role == "prefill" { "Seconds of backlog" } else { "Used share" },
        number(pool.scaling_target),
        load.clamp(LEAST_STABILIZATION_SECONDS, MOST_STABILIZATION_SECONDS),
        pool.nodes,
    )
}

/// A text for a comment: without control characters, which could end it.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// A YAML string in double quotes. JSON strings are valid there.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
