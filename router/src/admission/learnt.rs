//! What sequences that have ended tell of those to come.

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
    /// Tokens that it generates.
    tokens: Option<f64>,
    last_end: Option<Instant>,
}

impl Learnt {
    /// Would a sequence that begins at `begin` end too late, as far as one can tell?
    pub fn is_late(&self, begin: Instant, ask: &Ask) -> bool {
        let (Some(seconds), Some(tokens)) = (self.seconds, self.tokens) else { return begin >= ask.end_by };
        // Short ones take less time than most; that long ones will become as long as they may is not known.
        let share = (f64::from(ask.max_tokens) / tokens.max(1.0)).min(1.0);
        begin + Duration::from_secs_f64(seconds * share) > ask.end_by
    }

    /// A sequence has ended after so much time, with so many tokens; `waiting`: others wait for its place.
    pub fn ended(&mut self, took: Duration, tokens: u32, waiting: bool) {
        let now = Instant::now();
        let mean = |mean: &mut Option<f64>, newest: f64| {
            *mean = Some(mean.map_or(newest, |mean| mean + NEWEST * (newest - mean)));
        };
        // One that was cancelled before its first token says nothing of the others.
        if tokens > 0 {
            mean(&mut self.seconds, took.as_secs_f64());
            mean(&mut self.tokens, tokens.into());
        }
        match self.last_end.replace(now) {
            Some(last) if waiting => mean(&mut self.interval, (now - last).as_secs_f64()),
            // Without a queue, ends are as far apart as arrivals are.
            _ => {}
        }
    }
}
