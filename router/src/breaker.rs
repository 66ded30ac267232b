//! A node's circuit breaker: open after a failure, half-open when some time has passed. Pure.

use std::time::Duration;

use tokio::time::Instant;

/// How long the first failure keeps requests away.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// How long repeated failures keep requests away at most.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// Suspicions in a row that count as a failure.
const MAX_SUSPICIONS: u32 = 3;

/// Keeps requests from a node that fails them.
#[derive(Debug)]
pub struct Breaker {
    state: State,
    /// How long the next failure keeps the breaker open.
    pause: Duration,
    suspicions: u32,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    /// Requests go through.
    Closed,
    /// No request goes through until this moment. Then one may, as a probe.
    Open(Instant),
    /// A probe is under way. Its outcome decides.
    HalfOpen,
}

impl Default for Breaker {
    /// The breaker of a node that has just joined.
    fn default() -> Self {
        Self { state: State::Closed, pause: PAUSE_MIN, suspicions: 0 }
    }
}

impl Breaker {
    /// May a request go to the node?
    pub fn admits(&self, now: Instant) -> bool {
        match self.state {
            State::Closed => true,
            State::Open(until) => now >= until,
            State::HalfOpen => false,
        }
    }

    /// A request goes to the node. True: the request is a probe.
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

    /// A request got what it wanted of the node.
    pub fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// The node failed a request.
    pub fn failed(&mut self, now: Instant) {
        // All requests on a node fail together, which is one failure.
        if let State::Open(_) = self.state {
            return;
        }
        self.state = State::Open(now + self.pause);
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }

    /// A request failed through this node or another one.
    pub fn suspected(&mut self, now: Instant) {
        self.suspicions += 1;
        if self.suspicions >= MAX_SUSPICIONS || self.state == State::HalfOpen {
            self.suspicions = 0;
            self.failed(now);
        }
    }

    /// A probe ended without an outcome: the next request is a probe, too.
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
