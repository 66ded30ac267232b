//! Limits of latencies, and whether a simulated run meets them.

use serde::Serialize;

use super::cluster::Outcome;
use crate::text;

/// Share of a resource above which a run counts as saturated: its queues would grow without end.
const SATURATED: f64 = 0.98;
/// Share of requests that may be too long for a node's KV cache.
const MOST_REFUSED: f64 = 0.01;

/// A limit of a percentile.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Limit {
    /// The percentile, in [0, 1].
    pub share: f64,
    /// The limit.
    pub seconds: f64,
}

/// Limits of TTFT and ITL.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Goals {
    /// Limits of the time to the first token.
    pub ttft: Vec<Limit>,
    /// Limits of the time between tokens.
    pub itl: Vec<Limit>,
}

/// What a run misses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Miss {
    /// The percentile of TTFT has another value than it may.
    Ttft(Limit, f64),
    /// The percentile of ITL.
    Itl(Limit, f64),
    /// The nodes that compute prompts are always busy.
    Arithmetic,
    /// All places of the nodes that decode are taken.
    Places,
    /// All blocks of the nodes that decode are taken.
    Kv,
    /// Prefill nodes always send.
    Transfer,
    /// This share of the requests does not fit into a node's KV cache.
    TooLong(f64),
}

/// Number and capacity of the nodes of a run.
#[derive(Clone, Copy, Debug)]
pub struct Capacity {
    /// Nodes that compute prompts.
    pub prefill_nodes: f64,
    /// Places on nodes that decode.
    pub places: f64,
    /// Blocks of nodes that decode.
    pub blocks: f64,
    /// Whether nodes send KV.
    pub sends: bool,
}

impl Goals {
    /// What the run misses, the cause before its consequence.
    pub fn misses(&self, outcome: &Outcome, capacity: &Capacity) -> Vec<Miss> {
        let mut misses = Vec::new();
        let means = &outcome.means;
        if outcome.refused_share() > MOST_REFUSED {
            misses.push(Miss::TooLong(outcome.refused_share()));
        }
        // Colocated nodes are always busy while they decode. Their queue shows whether they keep up.
        if capacity.sends && means.prefill_busy_nodes > SATURATED * capacity.prefill_nodes {
            misses.push(Miss::Arithmetic);
        }
        if capacity.sends && means.sending_nodes > SATURATED * capacity.prefill_nodes {
            misses.push(Miss::Transfer);
        }
        if means.wanted_blocks() > SATURATED * capacity.blocks {
            misses.push(Miss::Kv);
        }
        if means.wanted_places() > SATURATED * capacity.places {
            misses.push(Miss::Places);
        }
        let over = |limits: &[Limit], value: &dyn Fn(f64) -> f64, miss: fn(Limit, f64) -> Miss| -> Vec<Miss> {
            let values = limits.iter().map(|limit| (*limit, value(limit.share)));
            values.filter(|(limit, value)| *value > limit.seconds).map(|(limit, value)| miss(limit, value)).collect()
        };
        misses.extend(over(&self.ttft, &|share| outcome.ttft(share), Miss::Ttft));
        misses.extend(over(&self.itl, &|share| outcome.itl.quantile(share), Miss::Itl));
        misses
    }

    /// The strictest limit of ITL.
    pub fn itl_seconds(&self) -> Option<f64> {
        self.itl.iter().map(|limit| limit.seconds).min_by(f64::total_cmp)
    }

    /// The percentile of TTFT that is explained: the percentile of the strictest limit, or the 95th.
    pub fn ttft_share(&self) -> f64 {
        let strictest = self.ttft.iter().min_by(|a, b| (a.seconds / a.share).total_cmp(&(b.seconds / b.share)));
        strictest.map_or(0.95, |limit| limit.share)
    }
}

/// A percentile as text, for example p95.
pub fn percentile(share: f64) -> String {
    format!("p{}", (share * 1000.0).round() / 10.0)
}

impl Miss {
    /// The resource that is short.
    pub fn binds(&self) -> &'static str {
        match self {
            Self::Ttft(..) => "TTFT",
            Self::Itl(..) => "ITL",
            Self::Arithmetic => "arithmetic",
            Self::Places => "batch places",
            Self::Kv => "KV capacity",
            Self::Transfer => "transfer",
            Self::TooLong(_) => "KV capacity",
        }
    }

    /// A sentence without its full stop.
    pub fn explain(&self) -> String {
        let late = |name: &str, limit: &Limit, value: f64| {
            let (value, limit_seconds) = (text::seconds(value), text::seconds(limit.seconds));
            format!("{name} {} is {value}, limit {limit_seconds}", percentile(limit.share))
        };
        match self {
            Self::Ttft(limit, value) => late("TTFT", limit, *value),
            Self::Itl(limit, value) => late("ITL", limit, *value),
            Self::Arithmetic => "prefill nodes compute all the time".into(),
            Self::Places => "all places of the decode nodes are taken".into(),
            Self::Kv => "all KV blocks of the decode nodes are taken".into(),
            Self::Transfer => "prefill nodes send KV all the time".into(),
            Self::TooLong(share) => {
                format!("{:.1} % of the requests do not fit into the KV cache of a node", share * 100.0)
            }
        }
    }
}
