//! What a simulated run shows.

use serde::Serialize;

use super::Histogram;

/// Names of the legs of the time to the first token, in order.
pub const LEGS: [&str; 5] = ["overhead", "queue", "reserve", "prefill queue", "prefill"];

/// Sums over the nodes of a cluster, or their means over time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Shares {
    /// Prefill nodes (or colocated nodes) that compute.
    pub prefill_busy_nodes: f64,
    /// Prompt tokens that are not computed yet, on nodes and at the router.
    pub prefill_queued_tokens: f64,
    /// Prefill nodes that send KV.
    pub sending_nodes: f64,
    /// Decode nodes that compute.
    pub decode_busy_nodes: f64,
    /// Requests that hold blocks on decode nodes (or colocated nodes).
    pub seated_requests: f64,
    /// Requests that wait on decode nodes.
    pub waiting_requests: f64,
    /// Blocks in use on decode nodes (or colocated nodes).
    pub used_blocks: f64,
}

impl Shares {
    /// Places in use on nodes that decode, plus places that waiting requests want.
    pub fn wanted_places(&self) -> f64 {
        self.seated_requests + self.waiting_requests
    }

    /// Blocks in use on nodes that decode, plus blocks that waiting requests want if they are like the others.
    pub fn wanted_blocks(&self) -> f64 {
        self.used_blocks * self.wanted_places() / self.seated_requests.max(1e-9)
    }

    fn add(&mut self, other: &Self, factor: f64) {
        let fields = [
            (&mut self.prefill_busy_nodes, other.prefill_busy_nodes),
            (&mut self.prefill_queued_tokens, other.prefill_queued_tokens),
            (&mut self.sending_nodes, other.sending_nodes),
            (&mut self.decode_busy_nodes, other.decode_busy_nodes),
            (&mut self.seated_requests, other.seated_requests),
            (&mut self.waiting_requests, other.waiting_requests),
            (&mut self.used_blocks, other.used_blocks),
        ];
        for (field, value) in fields {
            *field += value * factor;
        }
    }
}

/// What a simulated run shows. Latencies are those of the measured requests.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Time to the first token by leg, of each request, the fastest first.
    pub first_tokens: Vec<[f64; LEGS.len()]>,
    /// Times between tokens.
    pub itl: Histogram,
    /// Times between the first and the second token.
    pub first_gap: Histogram,
    /// Means over the time in which the measured requests arrived.
    pub means: Shares,
    /// Length of that time, in seconds.
    pub window_seconds: f64,
    /// Prompt tokens computed in that time.
    pub prefill_tokens: f64,
    /// Decode steps in that time.
    pub decode_steps: f64,
    /// Sequences in these steps.
    pub decode_rows: f64,
    /// Preemptions in the whole run.
    pub preemptions: usize,
    /// Measured requests that are too long for a node's KV cache.
    pub refused: usize,
}

impl Outcome {
    /// The percentile of the time to the first token, by nearest rank; 0 without requests.
    pub fn ttft(&self, share: f64) -> f64 {
        self.ranked(share).map_or(0.0, |legs| legs.iter().sum())
    }

    /// Share of the measured requests that are too long for a node's KV cache.
    pub fn refused_share(&self) -> f64 {
        self.refused as f64 / (self.refused + self.first_tokens.len()).max(1) as f64
    }

    fn ranked(&self, share: f64) -> Option<&[f64; LEGS.len()]> {
        let rank = (share * self.first_tokens.len() as f64).ceil() as usize;
        self.first_tokens.get(rank.clamp(1, self.first_tokens.len().max(1)) - 1)
    }

    /// Mean legs of the requests whose time to the first token is close to this percentile: one in fifty on both sides.
    pub fn legs(&self, share: f64) -> [f64; LEGS.len()] {
        let count = self.first_tokens.len();
        let middle = (share * count as f64).ceil() as usize;
        let (from, to) = (middle.saturating_sub(count / 50 + 1), (middle + count / 50).min(count));
        let near = &self.first_tokens[from.min(to)..to];
        let mut legs = [0.0; LEGS.len()];
        for (i, leg) in legs.iter_mut().enumerate() {
            *leg = near.iter().map(|request| request[i]).sum::<f64>() / near.len().max(1) as f64;
        }
        legs
    }
}

/// Collects an [`Outcome`].
#[derive(Default)]
pub struct Recorder {
    outcome: Outcome,
    opened: Option<f64>,
    closed: Option<f64>,
    samples: f64,
    /// Measured requests that have ended.
    pub ended: usize,
}

impl Recorder {
    /// Opens the time window of means with the first measured arrival, and closes it with the first one after.
    pub fn window(&mut self, measured: bool, now: f64) {
        match (measured, self.opened, self.closed) {
            (true, None, _) => self.opened = Some(now),
            (false, Some(_), None) => self.closed = Some(now),
            _ => {}
        }
    }

    /// Whether the window is open.
    pub fn is_open(&self) -> bool {
        self.opened.is_some() && self.closed.is_none()
    }

    /// A request got its first token.
    pub fn first_token(&mut self, legs: [f64; LEGS.len()]) {
        self.outcome.first_tokens.push(legs);
    }

    /// A request got another token after `seconds`. `second` says whether it is the second one.
    pub fn gap(&mut self, seconds: f64, second: bool) {
        self.outcome.itl.add(seconds);
        if second {
            self.outcome.first_gap.add(seconds);
        }
    }

    /// The nodes were as in `sums` at `times` samples.
    pub fn sample(&mut self, times: f64, sums: &Shares) {
        self.outcome.means.add(sums, times);
        self.samples += times;
    }

    /// A step computed prompt tokens.
    pub fn prefilled(&mut self, tokens: usize) {
        if self.is_open() {
            self.outcome.prefill_tokens += tokens as f64;
        }
    }

    /// A decode step computed a token for each of these sequences.
    pub fn decoded(&mut self, rows: usize) {
        if self.is_open() {
            self.outcome.decode_steps += 1.0;
            self.outcome.decode_rows += rows as f64;
        }
    }

    /// A sequence was preempted.
    pub fn preempted(&mut self) {
        self.outcome.preemptions += 1;
    }

    /// A request was too long.
    pub fn refused(&mut self) {
        self.outcome.refused += 1;
        self.ended += 1;
    }

    /// The outcome.
    pub fn finish(mut self) -> Outcome {
        let sums = std::mem::take(&mut self.outcome.means);
        self.outcome.means.add(&sums, 1.0 / self.samples.max(1.0));
        if let (Some(opened), Some(closed)) = (self.opened, self.closed) {
            self.outcome.window_seconds = closed - opened;
        }
        let total = |legs: &[f64; LEGS.len()]| legs.iter().sum::<f64>();
        self.outcome.first_tokens.sort_by(|a, b| total(a).total_cmp(&total(b)));
        self.outcome
    }
}
