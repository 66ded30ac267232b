//! What is learnt from sequences that have ended about sequences to come.

use std::time::Duration;

use tokio::time::Instant;

use super::Ask;

/// Weight of the newest figure in a running mean.
const NEWEST: f64 = 0.1;

/// Running means over the sequences that have ended.
#[derive(Default)]
pub(super) struct Learnt {
    /// Seconds between two ends while somebody waits.
    pub interval: Option<f64>,
    /// Seconds of a sequence on the nodes.
    seconds: Option<f64>,
    /// Tokens that a sequence generates.
    tokens: Option<f64>,
    last_end: Option<Instant>,
}

impl Learnt {
    /// Will a sequence that begins at `begin` probably end too late?
    pub fn is_late(&self, begin: Instant, ask: &Ask) -> bool {
        let (Some(seconds), Some(tokens)) = (self.seconds, self.tokens) else { return begin >= ask.end_by };
        // A sequence that may have few tokens takes less time. One that may have many need not become long.
        let share = (f64::from(ask.max_tokens) / tokens.max(1.0)).min(1.0);
        begin + Duration::from_secs_f64(seconds * share) > ask.end_by
    }

    /// Learns from a sequence that took `took` and generated `tokens`. `waiting`: others wait for its place.
    pub fn ended(&mut self, took: Duration, tokens: u32, waiting: bool) {
        let now = Instant::now();
        let mean = |mean: &mut Option<f64>, newest: f64| {
            *mean = Some(mean.map_or(newest, |mean| mean + NEWEST * (newest - mean)));
        };
        // A sequence that was cancelled before its first token says nothing of the others.
        if tokens > 0 {
            mean(&mut self.seconds, took.as_secs_f64());
            mean(&mut self.tokens, tokens.into());
        }
        let last = self.last_end.replace(now);
        // Without a queue, ends are as far apart as arrivals are.
        if let Some(last) = last.filter(|_| waiting) {
            mean(&mut self.interval, (now - last).as_secs_f64());
        }
    }
}
