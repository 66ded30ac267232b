//! What a simulation shows: every request and every second.

use overfill_kv::Role;
use serde::Serialize;

use crate::bench::serve::summary::{Distribution, Limits};
use crate::plan::cluster::Histogram;

/// Seconds of an interval over which latencies are shown.
pub const INTERVAL_SECONDS: f64 = 5.0;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// With all its tokens.
    Complete,
    /// It was refused before any work.
    Refused,
    /// With an error.
    Failed,
}

/// One request.
#[derive(Clone, Debug, Serialize)]
pub struct Request {
    /// When it was sent, in seconds.
    pub sent_seconds: f64,
    /// Length of its prompt.
    pub prompt_tokens: usize,
    /// Length of its answer.
    pub output_tokens: usize,
    /// How it ended.
    pub end: End,
    /// The error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Time to the first token.
    pub ttft_seconds: Option<f64>,
    /// Mean time between tokens.
    pub mean_itl_seconds: Option<f64>,
    /// Number of times that it was computed again on other nodes.
    pub migrations: u32,
}

impl Request {
    fn is_good(&self, limits: &Limits) -> bool {
        let within = |value: Option<f64>, limit: Option<f64>| limit.is_none_or(|limit| value.unwrap_or(0.0) <= limit);
        self.end == End::Complete
            && within(self.ttft_seconds, limits.ttft_limit_seconds)
            && within(self.mean_itl_seconds, limits.itl_limit_seconds)
    }
}

/// A role's nodes in one second.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct PoolSample {
    /// Nodes that serve.
    pub serving: usize,
    /// Nodes that start.
    pub starting: usize,
    /// Nodes that drain.
    pub draining: usize,
    /// What the autoscaler sees: seconds of backlog, or full nodes.
    pub load: f64,
    /// Nodes that serve and have no request.
    pub idle: usize,
    /// Requests that hold blocks.
    pub running: usize,
    /// Requests that wait on nodes.
    pub waiting: usize,
    /// Share of the KV blocks in use.
    pub used_kv_share: f64,
}

/// The cluster in one second.
#[derive(Clone, Debug, Serialize)]
pub struct Sample {
    /// Seconds since the start.
    pub seconds: f64,
    /// Requests sent in the last second.
    pub sent_requests: usize,
    /// Requests that wait at the router.
    pub router_waiting: usize,
    /// Prefill nodes.
    pub prefill: PoolSample,
    /// Decode nodes.
    pub decode: PoolSample,
}

/// Latencies in an interval.
#[derive(Clone, Debug, Default)]
pub struct Interval {
    /// Times to the first token.
    pub ttft: Histogram,
    /// Times between tokens.
    pub itl: Histogram,
}

/// A run.
#[derive(Debug, Default)]
pub struct Record {
    /// All requests that have ended, in the order of their ends.
    pub requests: Vec<Request>,
    /// Every second.
    pub samples: Vec<Sample>,
    /// Latencies by time.
    pub intervals: Vec<Interval>,
    /// All times between tokens.
    pub itl: Histogram,
    /// Requests sent since the last sample.
    pub sent: usize,
}

impl Record {
    fn interval(&mut self, now: f64) -> &mut Interval {
        let i = (now / INTERVAL_SECONDS) as usize;
        if i >= self.intervals.len() {
            self.intervals.resize_with(i + 1, Interval::default);
        }
        &mut self.intervals[i]
    }

    /// A request got its first token.
    pub fn first_token(&mut self, now: f64, seconds: f64) {
        self.interval(now).ttft.add(seconds);
    }

    /// A request got another token.
    pub fn token(&mut self, now: f64, gap: f64) {
        self.interval(now).itl.add(gap);
        self.itl.add(gap);
    }
}

/// Percentiles of the ITL.
#[derive(Debug, Serialize)]
pub struct Percentiles {
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p95: f64,
    pub p99: f64,
}

/// The run in a few figures.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// Simulated time until the last request ended.
    pub seconds: f64,
    /// Time of the simulation itself.
    pub real_seconds: f64,
    /// Requests sent.
    pub requests: usize,
    /// Requests that got all tokens.
    pub complete: usize,
    /// Requests that were refused: the queue was full, or they waited too long.
    pub refused: usize,
    /// Requests that failed otherwise.
    pub failed: usize,
    /// Complete requests within the limits.
    pub good: usize,
    /// Times that a request was computed again on other nodes.
    pub migrations: u32,
    /// Times to the first token.
    pub ttft_seconds: Option<Distribution>,
    /// Times between tokens.
    pub itl_seconds: Percentiles,
    /// Output tokens per second, until the last request ended.
    pub output_tokens_per_second: f64,
    /// Node-hours by role.
    pub prefill_node_hours: f64,
    pub decode_node_hours: f64,
    /// Most nodes at one time by role.
    pub prefill_most_nodes: usize,
    pub decode_most_nodes: usize,
    /// The limits of a good request.
    #[serde(flatten)]
    pub limits: Limits,
}

/// Nodes of a role in the whole run.
#[derive(Clone, Copy, Debug)]
pub struct Used {
    /// Whose nodes.
    pub role: Role,
    /// Seconds of all nodes, added up.
    pub node_seconds: f64,
    /// Most nodes at one time.
    pub most: usize,
}

impl Record {
    /// The run in a few figures.
    pub fn summary(&self, seconds: f64, real_seconds: f64, limits: Limits, used: [Used; 2]) -> Summary {
        let count = |end| self.requests.iter().filter(|request| request.end == end).count();
        let tokens: u64 = self.requests.iter().filter(|r| r.ttft_seconds.is_some()).count() as u64 + self.itl.count();
        let of = |role| used.iter().find(|used| used.role == role).map_or((0.0, 0), |u| (u.node_seconds, u.most));
        let (prefill, decode) = (of(Role::Prefill), of(Role::Decode));
        Summary {
            seconds,
            real_seconds,
            requests: self.requests.len(),
            complete: count(End::Complete),
            refused: count(End::Refused),
            failed: count(End::Failed),
            good: self.requests.iter().filter(|request| request.is_good(&limits)).count(),
            migrations: self.requests.iter().map(|request| request.migrations).sum(),
            ttft_seconds: Distribution::of(self.requests.iter().filter_map(|r| r.ttft_seconds).collect()),
            itl_seconds: Percentiles {
                mean: self.itl.mean(),
                p50: self.itl.quantile(0.5),
                p90: self.itl.quantile(0.9),
                p95: self.itl.quantile(0.95),
                p99: self.itl.quantile(0.99),
            },
            output_tokens_per_second: tokens as f64 / seconds.max(1e-9),
            prefill_node_hours: prefill.0 / 3600.0,
            decode_node_hours: decode.0 / 3600.0,
            prefill_most_nodes: prefill.1,
            decode_most_nodes: decode.1,
            limits,
        }
    }
}
