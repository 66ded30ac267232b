//! The plan: what it says, as data.

use serde::Serialize;

use super::args::Task;
use super::cluster::{LEGS, Layout, Outcome, Shares};
use super::goals::{Goals, Miss};
use super::mix::Sizes;
use super::size::{Infeasible, Kind, Planner, Sized};

/// Largest increase of the rate that is tried to find out at which load a pool must grow.
const MOST_GROWTH: f64 = 4.0;
/// Share of the load at the limit at which a pool grows: new nodes need time to start.
const GROW_AT: f64 = 0.8;
/// Percentiles that are reported.
pub const SHARES: [f64; 4] = [0.5, 0.9, 0.95, 0.99];

/// A plan.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// Requests per second.
    pub rate: f64,
    /// Requests per second that the nodes must bear within the limits: the rate and the headroom.
    pub sized_for_rate: f64,
    /// Lengths of the requests.
    pub requests: Sizes,
    /// The limits.
    pub limits: Goals,
    /// The prefill pool and the decode pool.
    pub pools: [Pool; 2],
    /// Latencies at the rate, and at the rate with headroom.
    pub latency: [Latency; 2],
    /// The percentile of TTFT that is split by leg, and the mean legs of requests near it, at the rate with headroom.
    pub ttft_share: f64,
    /// Name and seconds of each leg.
    pub ttft_legs: Vec<(&'static str, f64)>,
    /// Mean time between the first and the second token, in seconds.
    pub first_gap_seconds: f64,
    /// Cost.
    pub cost: Cost,
    /// The same load on other arrangements.
    pub comparison: Vec<Row>,
    /// Other loads and profiles.
    pub what_if: Vec<Row>,
    /// What `--max-running` of the router must be at least.
    pub router_max_running: usize,
    /// Share of the requests that are too long for a node's KV cache.
    pub refused_share: f64,
}

/// One pool.
#[derive(Clone, Debug, Serialize)]
pub struct Pool {
    /// `prefill` or `decode`.
    pub role: &'static str,
    /// The machine.
    pub machine: String,
    /// Number of nodes, with headroom.
    pub nodes: usize,
    /// Number of nodes that would be enough without headroom.
    pub nodes_without_headroom: usize,
    /// Number of nodes at half and at twice the rate, with headroom: bounds for an autoscaler. `None`: infeasible.
    pub range: (Option<usize>, Option<usize>),
    /// Nodes that each resource would need if it could be used in full.
    pub needs: Vec<(&'static str, f64)>,
    /// The resource that determines the number.
    pub bound_by: String,
    /// Load per node at which the pool must grow, in the unit of its scaling metric: seconds of backlog for prefill
    /// nodes, full nodes for decode nodes.
    pub scaling_target: f64,
    /// Time until a new node can serve, in seconds.
    pub start_seconds: f64,
}

/// Percentiles of latencies in seconds.
#[derive(Clone, Debug, Serialize)]
pub struct Latency {
    /// Requests per second.
    pub rate: f64,
    /// p50, p90, p95 and p99 of TTFT.
    pub ttft_seconds: [f64; 4],
    /// The same of ITL.
    pub itl_seconds: [f64; 4],
}

/// Cost of a cluster.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Cost {
    /// `price` or `node-hours`.
    pub unit: &'static str,
    /// Per hour.
    pub per_hour: f64,
    /// Per million output tokens.
    pub per_million_output_tokens: f64,
    /// Per million tokens of prompts and answers.
    pub per_million_tokens: f64,
}

/// One row of a table of alternatives.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What is different.
    pub name: String,
    /// Number of nodes: of the prefill and the decode pool, or of a colocated cluster.
    pub nodes: Vec<usize>,
    /// Cost; `None` if infeasible.
    pub cost: Option<Cost>,
    /// Remark, or why it is infeasible.
    pub note: String,
}

/// Makes the plan.
///
/// # Errors
/// A request alone misses a limit.
pub fn plan(task: &Task) -> Result<Plan, Infeasible> {
    let (planner, sized_for) = (&task.planner, task.rate * (1.0 + task.headroom));
    let sizes = planner.mix.sizes(planner.seed);
    let (_, life) = planner.alone(Kind::TwoStage)?;
    let variants = variants(task);
    let (sized, bare, others) = std::thread::scope(|scope| {
        let sized = scope.spawn(|| planner.two_stage(sized_for));
        let others: Vec<_> = variants.iter().map(|variant| scope.spawn(|| variant.size(task))).collect();
        let bare = planner.two_stage(task.rate);
        let joined = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        let others: Vec<Result<Sized, Infeasible>> = others.into_iter().map(joined).collect();
        (joined(sized), bare, others)
    });
    let (sized, bare) = (sized?, bare?);
    let (prefill, decode) = nodes(sized.layout);
    let (prefill_bare, decode_bare) = nodes(bare.layout);
    let range = |index: usize| -> (Option<usize>, Option<usize>) {
        let of = |name: &str| {
            let at = variants.iter().position(|variant| variant.name == name)?;
            let (prefill, decode) = nodes(others[at].as_ref().ok()?.layout);
            Some([prefill, decode][index])
        };
        (of(HALF), of(TWICE))
    };
    let at_rate = planner.run(Kind::TwoStage, sized.layout, task.rate, life);
    let highest = planner.highest_rate(Kind::TwoStage, sized.layout, sized_for, MOST_GROWTH);
    let limit = planner.run(Kind::TwoStage, sized.layout, highest, life);
    let targets = scaling_targets(planner, &limit, prefill, decode);
    let needs = needs(planner, &sizes, &sized);
    let pool = |role: usize| {
        let (one_less, needs) = (one_less(planner, &sized, role, life), needs[role].clone());
        Pool {
            role: ["prefill", "decode"][role],
            machine: [&task.machines.0, &task.machines.1][role].clone(),
            nodes: [prefill, decode][role],
            nodes_without_headroom: [prefill_bare, decode_bare][role].min([prefill, decode][role]),
            range: range(role),
            bound_by: bound_by([prefill, decode][role], &needs, one_less, role == 0),
            needs,
            scaling_target: [targets.0, targets.1][role],
            start_seconds: [task.start_seconds.0, task.start_seconds.1][role],
        }
    };
    let share = planner.goals.ttft_share();
    let rows: Vec<Row> = variants.iter().zip(&others).map(|(variant, sized)| variant.row(task, sized)).collect();
    let (comparison, what_if) =
        rows.into_iter().partition(|row| variants.iter().any(|v| v.name == row.name && v.compares()));
    Ok(Plan {
        rate: task.rate,
        sized_for_rate: sized_for,
        requests: sizes,
        limits: planner.goals.clone(),
        pools: [pool(0), pool(1)],
        latency: [latency(task.rate, &at_rate), latency(sized_for, &sized.outcome)],
        ttft_share: share,
        ttft_legs: LEGS.into_iter().zip(sized.outcome.legs(share)).collect(),
        first_gap_seconds: sized.outcome.first_gap.mean(),
        cost: cost(task, &sizes, sized.layout, task.rate),
        comparison,
        what_if,
        router_max_running: prefill * planner.limits.prefill_running + decode * planner.limits.decode_running,
        refused_share: sized.outcome.refused_share(),
    })
}

/// What a given cluster does at the rate.
#[derive(Clone, Debug, Serialize)]
pub struct Judgement {
    /// Latencies.
    pub latency: Latency,
    /// Mean time between the first and the second token, in seconds.
    pub first_gap_seconds: f64,
    /// Name and seconds of each leg of TTFT, near the explained percentile.
    pub ttft_legs: Vec<(&'static str, f64)>,
    /// Mean number of sequences in a decode step.
    pub decode_batch: f64,
    /// Means over time.
    pub means: Shares,
    /// What it misses.
    pub misses: Vec<String>,
}

/// Says what the nodes of `layout` do at the task's rate, without headroom.
pub fn judge(task: &Task, layout: Layout) -> Judgement {
    let planner = &task.planner;
    // Only the length of the run depends on it.
    let life = planner.alone(Kind::TwoStage).map_or(1.0, |(_, life)| life);
    let outcome = planner.run(Kind::TwoStage, layout, task.rate, life);
    Judgement {
        latency: latency(task.rate, &outcome),
        first_gap_seconds: outcome.first_gap.mean(),
        ttft_legs: LEGS.into_iter().zip(outcome.legs(planner.goals.ttft_share())).collect(),
        decode_batch: outcome.decode_rows / outcome.decode_steps.max(1.0),
        means: outcome.means,
        misses: planner.misses(layout, &outcome).iter().map(Miss::explain).collect(),
    }
}

fn nodes(layout: Layout) -> (usize, usize) {
    match layout {
        Layout::TwoStage { prefill, decode } => (prefill, decode),
        Layout::Colocated { nodes } => (nodes, 0),
    }
}

fn latency(rate: f64, outcome: &Outcome) -> Latency {
    Latency {
        rate,
        ttft_seconds: SHARES.map(|share| outcome.ttft(share)),
        itl_seconds: SHARES.map(|share| outcome.itl.quantile(share)),
    }
}

fn cost(task: &Task, sizes: &Sizes, layout: Layout, rate: f64) -> Cost {
    let (prefill_price, decode_price) = task.planner.prices;
    let per_hour = match layout {
        Layout::TwoStage { prefill, decode } => prefill as f64 * prefill_price + decode as f64 * decode_price,
        Layout::Colocated { nodes } => nodes as f64 * prefill_price,
    };
    let million = |tokens: f64| per_hour / (3600.0 * rate * tokens) * 1e6;
    Cost {
        unit: if task.priced { "price" } else { "node-hours" },
        per_hour,
        per_million_output_tokens: million(sizes.mean_output_tokens),
        per_million_tokens: million(sizes.mean_prompt_tokens + sizes.mean_output_tokens),
    }
}

/// Nodes that each resource of both pools would need if it could be used in full.
fn needs(planner: &Planner, sizes: &Sizes, sized: &Sized) -> [Vec<(&'static str, f64)>; 2] {
    let Shares { prefill_busy_nodes, sending_nodes, seated_requests, used_blocks, .. } = sized.outcome.means;
    let outcome = &sized.outcome;
    let tokens = sized.rate * (sizes.mean_output_tokens - 1.0).max(0.0);
    // The context of a batch is the context of its sequences in the run.
    let context = used_blocks * overfill_kv::BLOCK_TOKENS as f64 / seated_requests.max(1e-9);
    let within = |limit: f64| {
        let fits = |rows: &usize| planner.decode.decode_seconds(*rows, (*rows as f64 * context) as usize) <= limit;
        let rows = (1..=planner.limits.decode_running).rev().find(fits).unwrap_or(1);
        rows as f64 / planner.decode.decode_seconds(rows, (rows as f64 * context) as usize)
    };
    let mut decode = vec![
        ("batch places", outcome.means.wanted_places() / planner.limits.decode_running as f64),
        ("KV capacity", outcome.means.wanted_blocks() / planner.decode.kv_blocks as f64),
    ];
    if let Some(limit) = planner.goals.itl_seconds() {
        decode.push(("ITL", tokens / within(limit)));
    }
    [vec![("arithmetic", prefill_busy_nodes), ("transfer", sending_nodes)], decode]
}

/// What one node less in a pool misses.
fn one_less(planner: &Planner, sized: &Sized, role: usize, life: f64) -> Option<Miss> {
    let (prefill, decode) = nodes(sized.layout);
    let layout = match role {
        0 if prefill > 1 => Layout::TwoStage { prefill: prefill - 1, decode },
        1 if decode > 1 => Layout::TwoStage { prefill, decode: decode - 1 },
        _ => return None,
    };
    planner.misses(layout, &planner.run(Kind::TwoStage, layout, sized.rate, life)).into_iter().next()
}

/// The resource that determines the number of nodes. `queues` says whether requests wait at the pool itself: then it may
/// miss a limit of TTFT although no resource is used up.
fn bound_by(nodes: usize, needs: &[(&'static str, f64)], one_less: Option<Miss>, queues: bool) -> String {
    let (resource, needed) = needs.iter().copied().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or(("nothing", 0.0));
    let Some(miss) = one_less else {
        return match nodes {
            1 => format!("nothing: one node is enough ({resource} {:.0} % used)", 100.0 * needed),
            _ => format!("{resource}: a run with one node less is near its limit"),
        };
    };
    let cause = match miss {
        Miss::Ttft(..) if queues && needed < 0.9 * (nodes - 1) as f64 => "queueing",
        Miss::Ttft(..) => resource,
        _ => miss.binds(),
    };
    format!("{cause}: with one node less, {}", miss.explain())
}

/// Load per node at which the pools must grow, from a run at the highest rate that the nodes bear.
fn scaling_targets(planner: &Planner, limit: &Outcome, prefill: usize, decode: usize) -> (f64, f64) {
    let means = &limit.means;
    let pace = limit.prefill_tokens / (means.prefill_busy_nodes * limit.window_seconds).max(1e-9);
    let backlog = means.prefill_queued_tokens / pace.max(1e-9) / prefill as f64;
    let nodes = decode as f64;
    let places = means.wanted_places() / (nodes * planner.limits.decode_running as f64);
    let blocks = means.used_blocks / (nodes * planner.decode.kv_blocks as f64);
    let itl = planner.goals.itl_seconds().map_or(0.0, |limit_seconds| limit.itl.mean() / limit_seconds);
    let two_digits = |value: f64| {
        let unit = 10_f64.powf(value.log10().floor() - 1.0);
        (value / unit).round() * unit
    };
    (two_digits((GROW_AT * backlog).max(0.01)), two_digits((GROW_AT * places.max(blocks).max(itl)).clamp(0.05, 1.0)))
}

const HALF: &str = "half the rate";
const TWICE: &str = "twice the rate";

/// A different case.
struct Variant<'a> {
    name: String,
    kind: Kind,
    rate: f64,
    planner: std::borrow::Cow<'a, Planner>,
    note: &'static str,
}

fn variants(task: &Task) -> Vec<Variant<'_>> {
    let base = &task.planner;
    let of = |name: &str, kind, rate, note| Variant {
        name: name.into(),
        kind,
        rate: task.rate * rate,
        planner: std::borrow::Cow::Borrowed(base),
        note,
    };
    let mut list = vec![
        of("two-stage", Kind::TwoStage, 1.0, "the full model reads, the pruned one writes"),
        of("colocated, full model", Kind::ColocatedFull, 1.0, "one model, chunked prefill in one batch with decode"),
    ];
    if base.pruned.is_some() {
        list.push(of(
            "colocated, pruned model",
            Kind::ColocatedPruned,
            1.0,
            "other quality: the pruned model reads the prompts as well",
        ));
    }
    list.push(of(HALF, Kind::TwoStage, 0.5, ""));
    list.push(of("this rate", Kind::TwoStage, 1.0, ""));
    list.push(of(TWICE, Kind::TwoStage, 2.0, ""));
    let mut changed = |name: &str, change: &dyn Fn(&mut Planner)| {
        let mut planner = base.clone();
        change(&mut planner);
        let planner = std::borrow::Cow::Owned(planner);
        list.push(Variant { name: name.into(), kind: Kind::TwoStage, rate: task.rate, planner, note: "" });
    };
    changed("prompts twice as long", &|planner| planner.mix.prompt_factor = 2.0);
    changed("answers twice as long", &|planner| planner.mix.output_factor = 2.0);
    changed("prefix hit rate 0 %", &|planner| planner.mix.hit_rate = Some(0.0));
    changed("prefix hit rate 50 %", &|planner| planner.mix.hit_rate = Some(0.5));
    for (name, planner) in &task.alternatives {
        let name = format!("profile {name}");
        list.push(Variant { planner: std::borrow::Cow::Borrowed(planner), ..of(&name, Kind::TwoStage, 1.0, "") });
    }
    list
}

impl Variant<'_> {
    fn size(&self, task: &Task) -> Result<Sized, Infeasible> {
        let rate = self.rate * (1.0 + task.headroom);
        match self.kind {
            Kind::TwoStage => self.planner.two_stage(rate),
            kind => self.planner.colocated(kind, rate),
        }
    }

    /// Whether it belongs to the comparison.
    fn compares(&self) -> bool {
        !self.note.is_empty()
    }

    fn row(&self, task: &Task, sized: &Result<Sized, Infeasible>) -> Row {
        let name = self.name.clone();
        match sized {
            Err(Infeasible(reason)) => {
                Row { name, nodes: Vec::new(), cost: None, note: format!("infeasible: {reason}") }
            }
            Ok(sized) => {
                let sizes = self.planner.mix.sizes(self.planner.seed);
                let nodes = match sized.layout {
                    Layout::TwoStage { prefill, decode } => vec![prefill, decode],
                    Layout::Colocated { nodes } => vec![nodes],
                };
                Row { name, nodes, cost: Some(cost(task, &sizes, sized.layout, self.rate)), note: self.note.into() }
            }
        }
    }
}
