//! Estimates the duration of sequences from sequences that have ended.

use std::time::Duration;

use tokio::time::Instant;

use super::Ask;

/// Weight of the newest value in an exponential moving average.
const NEWEST: f64 = 0.1;

/// Exponential moving averages over sequences that have ended.
#[derive(Default)]
pub(super) struct Learnt {
    /// Seconds between the ends of two sequences while others wait.
    pub interval: Option<f64>,
    /// Seconds that a sequence runs on the nodes.
    pub seconds: Option<f64>,
    /// Tokens that a sequence generates.
    tokens: Option<f64>,
    /// When the last sequence ended, if others waited then.
    last_end: Option<Instant>,
}

impl Learnt {
    /// Whether a sequence that starts at `begin` will probably miss its deadline.
    pub fn is_late(&self, begin: Instant, ask: &Ask) -> bool {
        let (Some(seconds), Some(tokens)) = (self.seconds, self.tokens) else { return begin >= ask.end_by };
        // A low `max_tokens` shortens the estimate. A high one does not lengthen it, because the text may end earlier.
        let share = (f64::from(ask.max_tokens) / tokens.max(1.0)).min(1.0);
        begin + Duration::from_secs_f64(seconds * share) > ask.end_by
    }

    /// Updates the averages with a sequence that ran for `took` and generated `tokens`. `waiting`: other sequences wait.
    pub fn ended(&mut self, took: Duration, tokens: u32, waiting: bool) {
        let now = Instant::now();
        let mean = |mean: &mut Option<f64>, newest: f64| {
            *mean = Some(mean.map_or(newest, |mean| mean + NEWEST * (newest - mean)));
        };
        // A sequence that was cancelled before its first token is not representative.
        if tokens > 0 {
            mean(&mut self.seconds, took.as_secs_f64());
            mean(&mut self.tokens, tokens.into());
        }
        // Without a queue, the interval between ends depends on arrivals and not on the nodes' speed. So both ends must be
        // of a time with a queue.
        let last = std::mem::replace(&mut self.last_end, waiting.then_some(now));
        if let Some(last) = last.filter(|_| waiting) {
            mean(&mut self.interval, (now - last).as_secs_f64());
        }
    }
}
