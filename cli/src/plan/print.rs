//! The plan as text.

use super::goals::{Goals, Limit, percentile};
use super::report::{Cost, Judgement, Latency, Plan, Pool, Row};
use crate::text;

/// What a given cluster does, as a table.
pub fn print_judgement(given: &Judgement, limits: &Goals) -> String {
    let rows = latency_rows(&given.latency, limits);
    let mut out = text::table(LATENCY, &rows);
    out += &format!(
        "\nTTFT {} by leg: {}. Between the first two tokens: {} on average.\n{:.2} sequences per decode step.\n",
        percentile(limits.ttft_share()),
        legs(&given.ttft_legs),
        text::seconds(given.first_gap_seconds),
        given.decode_batch,
    );
    match given.misses.as_slice() {
        [] => out += "All limits are met.\n",
        misses => out += &format!("Limits are missed: {}.\n", misses.join("; ")),
    }
    out
}

const LATENCY: [&str; 6] = ["LATENCY", "P50", "P90", "P95", "P99", "LIMIT"];

fn latency_rows(latency: &Latency, limits: &Goals) -> [[String; 6]; 2] {
    let limit = |limits: &[Limit]| {
        let limits = limits.iter().map(|limit| format!("{} {}", percentile(limit.share), text::seconds(limit.seconds)));
        limits.collect::<Vec<_>>().join(", ")
    };
    let row = |name: &str, values: &[f64; 4], limits: &[Limit]| {
        let [a, b, c, d] = values.map(text::seconds);
        [format!("{name} at {}/s", number(latency.rate)), a, b, c, d, limit(limits)]
    };
    [row("TTFT", &latency.ttft_seconds, &limits.ttft), row("ITL", &latency.itl_seconds, &limits.itl)]
}

fn legs(legs: &[(&str, f64)]) -> String {
    let legs = legs.iter().map(|(name, seconds)| format!("{name} {}", text::seconds(*seconds)));
    legs.collect::<Vec<_>>().join(", ")
}

/// The plan as tables.
pub fn print(plan: &Plan) -> String {
    let sizes = &plan.requests;
    let mut out = format!(
        "{} requests per second; nodes are sized for {}. Mean prompt {:.0} tokens ({:.0} computed), mean answer {:.0} tokens.\n",
        number(plan.rate),
        number(plan.sized_for_rate),
        sizes.mean_prompt_tokens,
        sizes.mean_computed_tokens,
        sizes.mean_output_tokens,
    );
    if plan.refused_share > 0.0 {
        out += &format!(
            "{:.2} % of the requests do not fit into a node's KV cache and are refused.\n",
            100.0 * plan.refused_share
        );
    }
    let pool = |pool: &Pool| {
        let needs = pool.needs.iter().map(|(name, nodes)| format!("{name} {nodes:.2}"));
        [
            pool.role.to_owned(),
            pool.nodes.to_string(),
            pool.nodes_without_headroom.to_string(),
            needs.collect::<Vec<_>>().join(", "),
            pool.bound_by.clone(),
        ]
    };
    out += "\n";
    out += &text::table(
        ["POOL", "NODES", "WITHOUT HEADROOM", "NODES THAT EACH RESOURCE NEEDS", "BOUND BY"],
        &plan.pools.each_ref().map(pool),
    );
    let rows: Vec<[String; 6]> = plan.latency.iter().flat_map(|latency| latency_rows(latency, &plan.limits)).collect();
    out += "\n";
    out += &text::table(LATENCY, &rows);
    out += &format!(
        "\nTTFT {} by leg: {}. Between the first two tokens: {} on average.\n",
        percentile(plan.ttft_share),
        legs(&plan.ttft_legs),
        text::seconds(plan.first_gap_seconds),
    );
    out += &format!(
        "Cost: {} per hour; per million tokens {}, of output {}.\n",
        cost(plan.cost.per_hour, &plan.cost),
        cost(plan.cost.per_million_tokens, &plan.cost),
        cost(plan.cost.per_million_output_tokens, &plan.cost)
    );
    if plan.router_max_running > 256 {
        out += &format!("The router needs --max-running {} (default: 256).\n", plan.router_max_running);
    }
    out += &format!(
        "Autoscaling targets per node: prefill {} of backlog, decode {} full nodes.\n",
        text::seconds(plan.pools[0].scaling_target),
        number(plan.pools[1].scaling_target),
    );
    out += "\n";
    out += &rows_table("COMPARISON", &plan.comparison);
    out += "\n";
    out += &rows_table("WHAT IF", &plan.what_if);
    out
}

fn rows_table(title: &str, rows: &[Row]) -> String {
    let rows: Vec<[String; 4]> = rows
        .iter()
        .map(|row| {
            let nodes = match row.nodes.as_slice() {
                [prefill, decode] => format!("{prefill} prefill, {decode} decode"),
                [nodes] => nodes.to_string(),
                _ => "-".into(),
            };
            let cost = row.cost.as_ref().map_or("-".into(), |c| cost(c.per_million_output_tokens, c));
            [row.name.clone(), nodes, cost, row.note.clone()]
        })
        .collect();
    text::table([title, "NODES", "PER MILLION OUTPUT TOKENS", ""], &rows)
}

/// A number with three significant digits and no zeros at the end.
pub fn number(value: f64) -> String {
    let decimals = if value == 0.0 { 0 } else { (2 - value.abs().log10().floor() as i32).clamp(0, 9) };
    let text = format!("{value:.0$}", decimals as usize);
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

fn cost(value: f64, cost: &Cost) -> String {
    let unit = if cost.unit == "price" { "" } else { " node-hours" };
    format!("{}{unit}", number(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        assert_eq!([4.0, 4.8, 0.012345, 12345.6, 0.0, 100.0].map(number), ["4", "4.8", "0.0123", "12346", "0", "100"]);
    }
}
