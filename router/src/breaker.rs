//! A node's circuit breaker: open after a failure, half-open after a pause. It does no I/O and reads no clock.

use std::time::Duration;

use tokio::time::Instant;

/// Pause after the first failure.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// Maximum pause. The pause doubles with every repeated failure.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// Number of consecutive suspicions that count as a failure.
const MAX_SUSPICIONS: u32 = 3;

/// Stops requests to a node that fails them.
#[derive(Debug)]
pub struct Breaker {
    state: State,
    /// Time for which the next failure opens the breaker.
    pause: Duration,
    suspicions: u32,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    /// Requests go through.
    Closed,
    /// No request goes through until this time. Then one request may go through as a probe.
    Open(Instant),
    /// A probe is under way. Its outcome decides.
    HalfOpen,
}

impl Default for Breaker {
    /// A closed breaker, for a node that has just joined.
    fn default() -> Self {
        Self { state: State::Closed, pause: PAUSE_MIN, suspicions: 0 }
    }
}

impl Breaker {
    /// Whether a request may go to the node.
    pub fn admits(&self, now: Instant) -> bool {
        match self.state {
            State::Closed => true,
            State::Open(until) => now >= until,
            State::HalfOpen => false,
        }
    }

    /// Records that a request goes to the node. Returns whether the request is a probe.
    pub fn begin(&mut self, now: Instant) -> bool {
        match self.state {
            State::Open(until) if now >= until => {
                self.state = State::HalfOpen;
                true
            }
            // The node may have been chosen before it failed another request.
            State::Closed | State::Open(_) | State::HalfOpen => false,
        }
    }

    /// Records that the node served a request.
    pub fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// Records that the node failed a request.
    pub fn failed(&mut self, now: Instant) {
        // When a node fails, all of its requests fail. They count as one failure.
        if let State::Open(_) = self.state {
            return;
        }
        self.state = State::Open(now + self.pause);
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }

    /// Records that a request failed because of this node or of another one.
    pub fn suspected(&mut self, now: Instant) {
        self.suspicions += 1;
        if self.suspicions >= MAX_SUSPICIONS || self.state == State::HalfOpen {
            self.suspicions = 0;
            self.failed(now);
        }
    }

    /// Records that a probe ended without a result. The next request becomes a probe.
    pub fn abandoned(&mut self, now: Instant) {
        if self.state == State::HalfOpen {
            self.state = State::Open(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_probe_at_a_time_decides() {
        let start = Instant::now();
        let mut breaker = Breaker::default();
        assert!(breaker.admits(start) && !breaker.begin(start));
        breaker.failed(start);
        breaker.failed(start);
        assert!(!breaker.admits(start));
        let later = start + PAUSE_MIN;
        assert!(breaker.admits(later) && breaker.begin(later));
        assert!(!breaker.admits(later), "a second request beside the probe");
        breaker.failed(later);
        assert!(!breaker.admits(later + PAUSE_MIN), "the pause has not grown");
        let later = later + 2 * PAUSE_MIN;
        assert!(breaker.admits(later) && breaker.begin(later));
        breaker.abandoned(later);
        assert!(breaker.admits(later) && breaker.begin(later));
        breaker.succeeded();
        assert!(breaker.admits(start) && !breaker.begin(start));
    }

    #[test]
    fn suspicion_alone_needs_to_be_repeated() {
        let now = Instant::now();
        let mut breaker = Breaker::default();
        breaker.suspected(now);
        breaker.suspected(now);
        breaker.succeeded();
        breaker.suspected(now);
        breaker.suspected(now);
        assert!(breaker.admits(now));
        breaker.suspected(now);
        assert!(!breaker.admits(now));
    }

    #[test]
    fn the_pause_is_bounded() {
        let mut now = Instant::now();
        let mut breaker = Breaker::default();
        for _ in 0..20 {
            breaker.begin(now);
            breaker.failed(now);
            now += PAUSE_MAX;
            assert!(breaker.admits(now));
        }
    }
}
