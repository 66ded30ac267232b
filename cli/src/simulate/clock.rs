//! Simulated time.
//!
//! The services wait with tokio's timers, whose clock stands still and jumps to the next event. Timers have a resolution
//! of 1 ms. If steps are so short that this matters, all times of the profile and of the settings are stretched by a
//! factor. Fixed waits inside the services, such as those of a circuit breaker, are not stretched: they count as shorter.

use std::time::Duration;

use overfill_node::MAX_DEADLINE_SECONDS;
use tokio::time::Instant;

/// The shortest step lasts at least this long on the clock.
const RESOLUTION_SECONDS: f64 = 0.02;
/// Largest factor. A limit of 86 s becomes the longest time that nodes take, a day.
const MOST_FACTOR: f64 = 1000.0;

/// Converts simulated time and the time of the clock.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Instant,
    factor: f64,
}

impl Clock {
    /// A clock that starts now. `shortest_seconds`: the shortest step of the profile.
    pub fn start(shortest_seconds: f64) -> Self {
        Self { start: Instant::now(), factor: (RESOLUTION_SECONDS / shortest_seconds).clamp(1.0, MOST_FACTOR) }
    }

    /// The time on the clock of `seconds` of simulated time.
    pub fn real(&self, seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds * self.factor)
    }

    /// The time on the clock of a time limit. Nodes take at most a day, so a longer limit is cut there.
    pub fn limit(&self, seconds: f64) -> Duration {
        self.real(seconds).min(Duration::from_secs_f64(MAX_DEADLINE_SECONDS))
    }

    /// Simulated seconds since the start.
    pub fn now(&self) -> f64 {
        self.start.elapsed().as_secs_f64() / self.factor
    }

    /// A speed or rate per simulated second, per second of the clock.
    pub fn rate(&self, per_second: f64) -> f64 {
        per_second / self.factor
    }

    /// Work in seconds of the clock, in simulated seconds.
    pub fn simulated(&self, seconds: f64) -> f64 {
        seconds / self.factor
    }

    /// Waits until a simulated time.
    pub async fn until(&self, seconds: f64) {
        tokio::time::sleep_until(self.start + self.real(seconds)).await;
    }
}
