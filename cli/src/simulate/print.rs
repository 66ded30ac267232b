//! The summary as text.

use super::record::Summary;
use crate::text::{seconds, table};

/// The summary as tables.
pub fn print(summary: &Summary) -> String {
    let s = summary;
    let mut out = String::new();
    let mut line = |text: String| {
        out += &text;
        out.push('\n');
    };
    line(format!("Simulated {:.0} s in {:.1} s.\n", s.seconds, s.real_seconds));
    let per_second = s.requests as f64 / s.seconds.max(1e-9);
    line(format!(
        "{} requests ({per_second:.2}/s): {} complete, {} refused, {} failed, {} migrations",
        s.requests, s.complete, s.refused, s.failed, s.migrations
    ));
    let limits = [("TTFT", s.limits.ttft_limit_seconds), ("mean ITL", s.limits.itl_limit_seconds)];
    let limits: Vec<String> =
        limits.iter().filter_map(|(name, limit)| Some(format!("{name} <= {}", seconds((*limit)?)))).collect();
    if !limits.is_empty() {
        let share = 100.0 * s.good as f64 / s.requests.max(1) as f64;
        line(format!("{} requests ({share:.1} %) are good: {}", s.good, limits.join(", ")));
    }
    line(format!("{:.1} output tokens/s\n", s.output_tokens_per_second));
    let itl = &s.itl_seconds;
    let row = |name: &str, values: [f64; 5]| {
        let [mean, p50, p90, p95, p99] = values.map(seconds);
        [name.into(), mean, p50, p90, p95, p99]
    };
    let ttft = s.ttft_seconds.as_ref().map_or([0.0; 5], |t| [t.mean, t.p50, t.p90, t.p95, t.p99]);
    let rows = [row("TTFT", ttft), row("ITL", [itl.mean, itl.p50, itl.p90, itl.p95, itl.p99])];
    line(table(["", "mean", "p50", "p90", "p95", "p99"], &rows));
    let nodes = [
        ["prefill".into(), format!("{:.2}", s.prefill_node_hours), s.prefill_most_nodes.to_string()],
        ["decode".into(), format!("{:.2}", s.decode_node_hours), s.decode_most_nodes.to_string()],
    ];
    line(table(["Nodes", "node-hours", "most at a time"], &nodes));
    out
}
