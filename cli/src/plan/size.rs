//! The search for the smallest number of nodes that meets the limits.
//!
//! The prefill pool is sized first, beside a decode pool that is large enough. Then the decode pool is sized beside it. A
//! larger prefill pool is tried as long as it saves more decode nodes than it costs: a prompt holds its place on a decode
//! node while it waits for a prefill node. All runs see the same requests, so a difference between two runs comes from
//! the nodes and not from chance.

use super::cluster::{EngineLimits, Layout, Load, NodeModel, Outcome, Setup, run};
use super::goals::{Capacity, Goals, Miss};
use super::mix::{Mix, Sizes};

/// Most nodes of a pool.
pub const MOST_NODES: usize = 4096;
/// A pool is given up if this many times the nodes that its arithmetic needs, and this many more, miss a limit.
const GIVE_UP: (usize, usize) = (8, 32);
/// Smallest step size of a colocated node that is tried, in tokens.
const LEAST_STEP_TOKENS: usize = 64;
/// Most requests of a run.
const MOST_REQUESTS: f64 = 200_000.0;
/// Requests of the run in which each is alone.
const ALONE_REQUESTS: usize = 1000;
/// Arrivals per second of that run.
const ALONE_RATE: f64 = 1e-6;
/// Times of a request's life that a run is warmed up and measured for.
const WARM_UP_LIVES: f64 = 2.0;
const MEASURED_LIVES: f64 = 3.0;

/// Everything but the load and the number of nodes.
#[derive(Clone, Debug)]
pub struct Planner {
    /// The full model on a prefill node's machine.
    pub full: NodeModel,
    /// The pruned model on the same machine. `None` if there is none.
    pub pruned: Option<NodeModel>,
    /// The model of decode nodes on their machine.
    pub decode: NodeModel,
    /// Speed of a prefill node's handoffs, in bytes per second.
    pub transfer_bytes_per_second: f64,
    /// Size of the KV of one token, in bytes.
    pub kv_bytes_per_token: f64,
    /// Limits of the engines.
    pub limits: EngineLimits,
    /// The requests.
    pub mix: Mix,
    /// The limits of latencies.
    pub goals: Goals,
    /// Price of a prefill node and of a decode node per hour.
    pub prices: (f64, f64),
    /// Measured requests of a run, at least.
    pub requests: usize,
    /// Random seed.
    pub seed: u64,
    /// All nodes share one machine.
    pub one_machine: bool,
}

/// Which models run where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The full model on prefill nodes, the pruned one on decode nodes.
    TwoStage,
    /// The full model on all nodes.
    ColocatedFull,
    /// The pruned model on all nodes.
    ColocatedPruned,
}

/// A number of nodes that meets the limits, and what it shows.
#[derive(Clone, Debug)]
pub struct Sized {
    /// The nodes.
    pub layout: Layout,
    /// The run.
    pub outcome: Outcome,
    /// Requests per second of the run.
    pub rate: f64,
}

/// Why no number of nodes meets the limits.
#[derive(Clone, Debug, PartialEq)]
pub struct Infeasible(pub String);

impl Planner {
    /// The cluster of this kind and layout.
    fn setup(&self, kind: Kind, layout: Layout) -> Setup {
        let prefill = match (kind, &self.pruned) {
            (Kind::ColocatedPruned, Some(pruned)) => pruned.clone(),
            _ => self.full.clone(),
        };
        Setup {
            layout,
            prefill,
            decode: self.decode.clone(),
            transfer_bytes_per_second: self.transfer_bytes_per_second,
            kv_bytes_per_token: self.kv_bytes_per_token,
            limits: self.limits,
            one_machine: self.one_machine,
        }
    }

    /// Runs the cluster at `rate` requests per second, long enough for a steady state. `life` is the mean time that a
    /// request takes alone, in seconds.
    pub fn run(&self, kind: Kind, layout: Layout, rate: f64, life: f64) -> Outcome {
        let requests = |lives: f64, least: f64| (rate * life * lives).max(least).min(MOST_REQUESTS).ceil() as usize;
        let least = self.requests as f64;
        let load = Load {
            rate,
            warm_up: requests(WARM_UP_LIVES, least / 5.0),
            measured: requests(MEASURED_LIVES, least),
            seed: self.seed,
            even: false,
        };
        run(&self.setup(kind, layout), &self.mix, &load)
    }

    /// What the run misses.
    pub fn misses(&self, layout: Layout, outcome: &Outcome) -> Vec<Miss> {
        let (prefill, decoding, blocks) = match layout {
            Layout::TwoStage { prefill, decode } => (prefill, decode, self.decode.kv_blocks),
            Layout::Colocated { nodes } => (nodes, nodes, self.full.kv_blocks),
        };
        let capacity = Capacity {
            prefill_nodes: prefill as f64,
            places: (decoding * self.limits.decode_running) as f64,
            blocks: (decoding * blocks) as f64,
            sends: matches!(layout, Layout::TwoStage { .. }),
        };
        self.goals.misses(outcome, &capacity)
    }

    /// Runs requests one at a time on one node of each kind. Returns the run and the mean time of a request in seconds.
    ///
    /// # Errors
    /// A request alone misses a limit.
    pub fn alone(&self, kind: Kind) -> Result<(Outcome, f64), Infeasible> {
        let layout = match kind {
            Kind::TwoStage => Layout::TwoStage { prefill: 1, decode: 1 },
            _ => Layout::Colocated { nodes: 1 },
        };
        // A trace may have several requests at one moment.
        let measured = self.requests.min(ALONE_REQUESTS);
        let load = Load { rate: ALONE_RATE, warm_up: 1, measured, seed: self.seed, even: true };
        let outcome = run(&self.setup(kind, layout), &self.mix, &load);
        if let Some(miss) = self.misses(layout, &outcome).first() {
            let cause = match miss {
                Miss::Ttft(limit, _) => {
                    let [overhead, _, _, _, prefill] = outcome.legs(limit.share).map(crate::text::seconds);
                    format!(": its prefill takes {prefill}, and calls between services take {overhead}")
                }
                Miss::Itl(..) => match outcome.first_gap.mean() > 2.0 * outcome.itl.quantile(0.5) {
                    true => format!(
                        ": the mean step takes {}, and the handoff before the second token {}",
                        crate::text::seconds(outcome.itl.quantile(0.5)),
                        crate::text::seconds(outcome.first_gap.mean())
                    ),
                    false => ": a decode step with one sequence takes as long".into(),
                },
                _ => String::new(),
            };
            return Err(Infeasible(format!("of requests that are alone, {}{cause}", miss.explain())));
        }
        let requests = outcome.first_tokens.len().max(1) as f64;
        let first = outcome.first_tokens.iter().map(|legs| legs.iter().sum::<f64>()).sum::<f64>() / requests;
        Ok((outcome.clone(), first + outcome.itl.mean() * outcome.itl.count() as f64 / requests))
    }

    /// The cheapest two-stage cluster that meets the limits at `rate` requests per second.
    ///
    /// # Errors
    /// No number of nodes meets the limits.
    pub fn two_stage(&self, rate: f64) -> Result<Sized, Infeasible> {
        let (_, life) = self.alone(Kind::TwoStage)?;
        let sizes = self.mix.sizes(self.seed);
        let (prefill_least, decode_least) = self.least(rate, &sizes);
        let ample = (4 * decode_least + 8).max((rate * life * 2.0 / self.limits.decode_running as f64) as usize);
        let missed = |prefill, decode| {
            let layout = Layout::TwoStage { prefill, decode };
            self.misses(layout, &self.run(Kind::TwoStage, layout, rate, life)).into_iter().next()
        };
        let prefill = least(prefill_least, |n| missed(n, ample)).map_err(|(n, miss)| {
            Infeasible(format!("even with {n} prefill nodes and {ample} decode nodes, {}", miss.explain()))
        })?;
        let decode_of = |prefill| least(decode_least, |n| missed(prefill, n));
        let decode = decode_of(prefill).map_err(|(n, miss)| {
            Infeasible(format!("even with {prefill} prefill nodes and {n} decode nodes, {}", miss.explain()))
        })?;
        let mut best = (prefill, decode);
        let cost = |(prefill, decode): (usize, usize)| {
            prefill as f64 * self.prices.0.max(1e-9) + decode as f64 * self.prices.1.max(1e-9)
        };
        for prefill in prefill + 1..=prefill + 3 {
            if best.1 == decode_least {
                break;
            }
            match decode_of(prefill) {
                Ok(decode) if cost((prefill, decode)) < cost(best) => best = (prefill, decode),
                _ => break,
            }
        }
        let layout = Layout::TwoStage { prefill: best.0, decode: best.1 };
        Ok(Sized { layout, outcome: self.run(Kind::TwoStage, layout, rate, life), rate })
    }

    /// The smallest colocated cluster that meets the limits at `rate` requests per second, with the step size that suits
    /// it best: large steps delay the tokens of answers, small ones read the weights more often.
    ///
    /// # Errors
    /// No number of nodes meets the limits.
    pub fn colocated(&self, kind: Kind, rate: f64) -> Result<Sized, Infeasible> {
        let most = self.limits.max_batch_tokens;
        let sizes = [1, 2, 4, 8].map(|part| (most / part).max(LEAST_STEP_TOKENS.min(most)));
        let sized = sizes.map(|max_batch_tokens| {
            let limits = EngineLimits { max_batch_tokens, ..self.limits };
            Self { limits, ..self.clone() }.colocated_with_steps(kind, rate)
        });
        let nodes = |sized: &Sized| match sized.layout {
            Layout::Colocated { nodes } => nodes,
            Layout::TwoStage { prefill, decode } => prefill + decode,
        };
        // Without any, the largest steps say why.
        let better = |best: Result<Sized, Infeasible>, other| match (&best, &other) {
            (Ok(a), Ok(b)) if nodes(b) < nodes(a) => other,
            (Err(_), Ok(_)) => other,
            _ => best,
        };
        sized.into_iter().reduce(better).unwrap_or(Err(Infeasible("there is no step size".into())))
    }

    fn colocated_with_steps(&self, kind: Kind, rate: f64) -> Result<Sized, Infeasible> {
        let (_, life) = self.alone(kind)?;
        let missed = |nodes| {
            let layout = Layout::Colocated { nodes };
            self.misses(layout, &self.run(kind, layout, rate, life)).into_iter().next()
        };
        let (prefill, _) = self.least(rate, &self.mix.sizes(self.seed));
        let from = if kind == Kind::ColocatedFull { prefill } else { 1 };
        let nodes =
            least(from, missed).map_err(|(n, miss)| Infeasible(format!("even with {n} nodes, {}", miss.explain())))?;
        let layout = Layout::Colocated { nodes };
        Ok(Sized { layout, outcome: self.run(kind, layout, rate, life), rate })
    }

    /// Fewest nodes of both pools whose arithmetic could do the work at all. With fewer, queues grow without end, but so
    /// slowly near the limit that a run of finite length may not show it.
    fn least(&self, rate: f64, sizes: &Sizes) -> (usize, usize) {
        let nodes = |needed: f64, node: f64| ((needed / node).ceil() as usize).clamp(1, MOST_NODES);
        let prefill = self.full.prefill.best_rate(self.limits.max_batch_tokens as f64, 0.0);
        let decode = self.decode.decode.best_rate(self.limits.decode_running as f64, 0.0);
        let tokens = (sizes.mean_output_tokens - 1.0).max(0.0);
        (nodes(rate * sizes.mean_computed_tokens, prefill), nodes(rate * tokens, decode))
    }

    /// The highest rate up to `most` times `rate` at which these nodes meet the limits.
    pub fn highest_rate(&self, kind: Kind, layout: Layout, rate: f64, most: f64) -> f64 {
        let Ok((_, life)) = self.alone(kind) else { return rate };
        let meets = |rate| self.misses(layout, &self.run(kind, layout, rate, life)).is_empty();
        let (mut low, mut high) = (rate, rate * most);
        for _ in 0..6 {
            let middle = (low * high).sqrt();
            if meets(middle) { low = middle } else { high = middle }
        }
        low
    }
}

/// The smallest number from `from` on that misses nothing, if more is never worse.
///
/// # Errors
/// A number far above `from`, and what it misses.
pub fn least<M>(from: usize, mut missed: impl FnMut(usize) -> Option<M>) -> Result<usize, (usize, M)> {
    let (mut low, mut high) = (from.max(1), from.max(1));
    let most = (high * GIVE_UP.0 + GIVE_UP.1).min(MOST_NODES.max(high));
    let mut step = 1;
    while let Some(miss) = missed(high) {
        if high >= most {
            return Err((high, miss));
        }
        low = high + 1;
        high = (high + step).min(most);
        step *= 2;
    }
    // `high` is enough, and everything below `low` is not.
    while low < high {
        let middle = low + (high - low) / 2;
        match missed(middle) {
            None => high = middle,
            Some(_) => low = middle + 1,
        }
    }
    Ok(low)
}

#[cfg(test)]
pub mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::super::goals::Limit;
    use super::super::mix::{Source, tests::drawn};
    use super::super::profile::tests::round;
    use super::super::trace::Trace;
    use super::*;

    pub fn planner(prompt: &str, output: &str, ttft: f64, itl: f64) -> Planner {
        let profile = round();
        let model = |model| NodeModel::new(&profile, model).unwrap();
        let limit = |seconds| vec![Limit { share: 0.95, seconds }];
        Planner {
            full: model(&profile.full),
            pruned: profile.pruned.as_ref().map(model),
            decode: model(profile.decoder()),
            transfer_bytes_per_second: profile.transfer_bytes_per_second,
            kv_bytes_per_token: profile.kv_bytes_per_token,
            limits: EngineLimits {
                max_batch_tokens: 512,
                step_target: Duration::from_secs(1),
                prefill_running: 16,
                decode_running: 32,
                router_running: 100_000,
            },
            mix: drawn(prompt, output),
            goals: Goals { ttft: limit(ttft), itl: limit(itl) },
            prices: (1.0, 1.0),
            requests: 600,
            seed: 0,
            one_machine: false,
        }
    }

    fn nodes(planner: &Planner, rate: f64) -> (usize, usize) {
        match planner.two_stage(rate).unwrap().layout {
            Layout::TwoStage { prefill, decode } => (prefill, decode),
            Layout::Colocated { .. } => unreachable!(),
        }
    }

    #[test]
    fn as_many_nodes_as_the_work_needs_and_a_little_more() {
        // A prompt of 500 tokens takes about 51 ms, so 100 per second keep 5.1 nodes busy. 32 sequences take 21 ms per
        // token: 100 answers of 64 tokens per second need 63 x 100 x 21 / 32 ms, 4.1 nodes.
        let (prefill, decode) = nodes(&planner("500", "64", 0.5, 0.1), 100.0);
        assert!((6..=7).contains(&prefill) && (5..=6).contains(&decode), "{prefill} {decode}");
        // A strict limit of ITL allows only small batches: 14 ms are 18 sequences.
        let (_, strict) = nodes(&planner("500", "64", 0.5, 0.0105), 100.0);
        assert!(strict > decode, "{strict}");
    }

    #[test]
    fn what_is_infeasible_says_why() {
        let why = |prompt, output, ttft, itl| planner(prompt, output, ttft, itl).two_stage(1.0).unwrap_err().0;
        let slow = why("5000", "10", 0.1, 0.1);
        assert!(slow.contains("TTFT p95 is 51") && slow.contains("its prefill takes 51"), "{slow}");
        let slow = why("50", "100", 0.1, 0.001);
        assert!(slow.contains("ITL p95 is 5.5 ms, limit 1.0 ms: a decode step with one"), "{slow}");
        let long = why("70000", "10", 100.0, 0.1);
        assert!(long.contains("100.0 % of the requests do not fit"), "{long}");
    }

    #[test]
    fn requests_of_one_moment_are_not_alone() {
        let text = "{\"timestamp\":0,\"input_length\":500,\"output_length\":9}\n".repeat(20)
            + "{\"timestamp\":9000,\"input_length\":500,\"output_length\":9}";
        let trace = Trace::parse(&text, 0).unwrap();
        let mut planner = planner("1", "1", 0.1, 0.1);
        planner.mix.source = Source::Trace(trace);
        // A prompt alone takes 51 ms. Twenty together take a second, unless there are many nodes.
        let (outcome, _) = planner.alone(Kind::TwoStage).unwrap();
        assert!((outcome.ttft(0.95) - 0.051).abs() < 1e-6, "{}", outcome.ttft(0.95));
        assert!(nodes(&planner, 2.0).0 >= 8);
    }

    #[test]
    fn two_stages_need_fewer_nodes_than_the_full_model_alone() {
        let planner = planner("400", "200", 0.5, 0.05);
        let of = |sized: Sized| match sized.layout {
            Layout::TwoStage { prefill, decode } => prefill + decode,
            Layout::Colocated { nodes } => nodes,
        };
        let both = of(planner.two_stage(40.0).unwrap());
        let full = of(planner.colocated(Kind::ColocatedFull, 40.0).unwrap());
        let pruned = of(planner.colocated(Kind::ColocatedPruned, 40.0).unwrap());
        assert!(pruned < both && both < full, "{pruned} {both} {full}");
    }

    #[test]
    fn a_cluster_meets_its_limits_at_its_highest_rate() {
        let planner = planner("500", "64", 0.5, 0.1);
        let layout = Layout::TwoStage { prefill: 2, decode: 2 };
        let highest = planner.highest_rate(Kind::TwoStage, layout, 5.0, 16.0);
        // Two nodes compute at most 39 prompts per second.
        assert!((20.0..39.0).contains(&highest), "{highest}");
    }

    proptest! {
        #[test]
        fn the_search_finds_the_smallest_number(from in 1_usize..50, more in 0_usize..350) {
            let (mut asked, needed) = (0, from + more.min(7 * from + 32));
            let found = least(from, |n| { asked += 1; (n < needed).then_some(()) });
            prop_assert_eq!(found, Ok(needed));
            prop_assert!(asked < 40, "{} questions", asked);
        }
    }

    #[test]
    fn a_search_ends_and_says_what_is_missing() {
        assert_eq!(least(3, |n| Some(n + 1)), Err((56, 57)));
    }
}
