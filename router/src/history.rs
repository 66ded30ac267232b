//! The last quarter of an hour of this router, for its page: latencies, requests and handoffs.

use std::{
    collections::VecDeque,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use overfill_kv::TransferStats;
use parking_lot::Mutex;

/// Seconds that one point of the history covers.
pub const INTERVAL_SECONDS: u64 = 5;
/// Number of points: 15 minutes.
const POINTS: usize = 180;
/// Number of handoffs that are remembered.
const HANDOFFS: usize = 50;

/// The router's recent past.
#[derive(Default)]
pub struct History(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    points: VecDeque<Point>,
    handoffs: VecDeque<Handoff>,
    next_handoff: u64,
}

/// What happened in one interval.
#[derive(Clone, Default)]
pub struct Point {
    /// Begin of the interval, in seconds since 1970.
    pub begin: u64,
    /// Sequences that ended.
    pub requests: u64,
    /// Tokens generated.
    pub tokens: u64,
    /// Maximum number of sequences that waited.
    pub waiting: usize,
    /// Times to first token.
    pub ttft: Latencies,
    /// Times between two tokens.
    pub itl: Latencies,
}

/// A handoff that has ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Handoff {
    /// Counts the router's handoffs.
    pub id: u64,
    /// End of the handoff, in seconds since 1970.
    pub ended: f64,
    /// Name of the prefill node.
    pub prefill_node: String,
    /// Name of the decode node.
    pub decode_node: String,
    /// Size and duration.
    pub stats: TransferStats,
}

impl History {
    /// Records a token. `after`: time since the previous token, or since the request for the first token.
    pub fn token(&self, first: bool, after: Duration) {
        self.with_point(|point| {
            point.tokens += 1;
            if first { &mut point.ttft } else { &mut point.itl }.add(after);
        });
    }

    /// Records a sequence that has ended.
    pub fn ended(&self) {
        self.with_point(|point| point.requests += 1);
    }

    /// Records how many sequences wait now.
    pub fn waiting(&self, sequences: usize) {
        self.with_point(|point| point.waiting = point.waiting.max(sequences));
    }

    /// Records a handoff that has ended.
    pub fn handoff(&self, prefill_node: &str, decode_node: &str, stats: TransferStats) {
        let mut inner = self.0.lock();
        let id = inner.next_handoff;
        inner.next_handoff += 1;
        if inner.handoffs.len() == HANDOFFS {
            inner.handoffs.pop_front();
        }
        let (prefill_node, decode_node) = (prefill_node.to_owned(), decode_node.to_owned());
        inner.handoffs.push_back(Handoff { id, ended: now().as_secs_f64(), prefill_node, decode_node, stats });
    }

    /// The points of the last quarter of an hour, oldest first. Intervals in which nothing happened are left out.
    pub fn points(&self) -> Vec<Point> {
        let oldest = now().as_secs().saturating_sub(POINTS as u64 * INTERVAL_SECONDS);
        self.0.lock().points.iter().filter(|point| point.begin >= oldest).cloned().collect()
    }

    /// The last handoffs, oldest first.
    pub fn handoffs(&self) -> Vec<Handoff> {
        self.0.lock().handoffs.iter().cloned().collect()
    }

    fn with_point(&self, change: impl FnOnce(&mut Point)) {
        let begin = now().as_secs() / INTERVAL_SECONDS * INTERVAL_SECONDS;
        let points = &mut self.0.lock().points;
        // A clock that was set back continues the newest point.
        if points.back().is_none_or(|point| point.begin < begin) {
            if points.len() == POINTS {
                points.pop_front();
            }
            points.push_back(Point { begin, ..Point::default() });
        }
        if let Some(point) = points.back_mut() {
            change(point);
        }
    }
}

/// Time since 1970.
pub fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Latencies, counted in buckets whose bounds grow by [`GROWTH`].
#[derive(Clone, Debug, Default)]
pub struct Latencies {
    counts: Vec<u32>,
    total: u64,
}

/// Upper bound of the first bucket, in seconds.
const LEAST_SECONDS: f64 = 1e-4;
/// Ratio of the bounds of two buckets: percentiles are too high by at most 10 %.
const GROWTH: f64 = 1.1;
/// Number of buckets: up to more than an hour.
const BUCKETS: usize = 184;

impl Latencies {
    fn add(&mut self, latency: Duration) {
        let bucket = ((latency.as_secs_f64() / LEAST_SECONDS).ln() / GROWTH.ln()).ceil().max(0.0) as usize;
        if self.counts.is_empty() {
            self.counts = vec![0; BUCKETS];
        }
        self.counts[bucket.min(BUCKETS - 1)] += 1;
        self.total += 1;
    }

    /// The `share` quantile in seconds, for example 0.95. `None` without latencies.
    pub fn quantile_seconds(&self, share: f64) -> Option<f64> {
        let rank = (share * self.total as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        let bucket = self.counts.iter().position(|count| {
            seen += u64::from(*count);
            seen >= rank
        })?;
        Some(LEAST_SECONDS * GROWTH.powi(bucket as i32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_near_and_never_too_low() {
        let mut latencies = Latencies::default();
        assert_eq!(latencies.quantile_seconds(0.5), None);
        for milliseconds in 1..=1000 {
            latencies.add(Duration::from_millis(milliseconds));
        }
        for (share, exact) in [(0.5, 0.5), (0.95, 0.95), (1.0, 1.0), (0.0, 0.001)] {
            let near = latencies.quantile_seconds(share).unwrap();
            assert!(near >= exact - 1e-9 && near <= exact * GROWTH, "{share}: {near} instead of {exact}");
        }
        latencies.add(Duration::from_secs(1_000_000));
        assert!(latencies.quantile_seconds(1.0).unwrap() > 3600.0);
    }

    #[test]
    fn the_newest_is_kept_and_memory_is_bounded() {
        let history = History::default();
        history.token(true, Duration::from_millis(100));
        history.token(false, Duration::from_millis(10));
        history.ended();
        history.waiting(3);
        history.waiting(1);
        let points = history.points();
        let sum = |of: fn(&Point) -> u64| points.iter().map(of).sum::<u64>();
        assert_eq!((sum(|p| p.tokens), sum(|p| p.requests), sum(|p| p.waiting as u64)), (2, 1, 3));
        let stats = TransferStats { bytes: 1, seconds: 0.5, exposed_seconds: 0.0 };
        for _ in 0..2 * HANDOFFS {
            history.handoff("p", "d", stats);
        }
        let handoffs = history.handoffs();
        assert_eq!((handoffs.len(), handoffs[0].id), (HANDOFFS, HANDOFFS as u64));
    }
}
