//! Steps of extensions: how long they take, and when one waits for more of them. A step reads all weights, however few sequences it
//! has, and a sequence that asks just after its start waits until its end. Pure functions, without model, threads or clock.

use std::time::Duration;

/// The times between an extension of a sequence and the next one.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pauses([Option<Duration>; 2]);

impl Pauses {
    /// Records a pause.
    pub fn record(&mut self, pause: Duration) {
        self.0 = [Some(pause), self.0[0]];
    }

    /// How long the present pause lasts at most, if it is like the last ones: the longer one of the last two and a quarter of it. `None`
    /// before the second one.
    pub fn expected(&self) -> Option<Duration> {
        let [Some(last), Some(before)] = self.0 else { return None };
        Some(last.max(before) * 5 / 4)
    }
}

/// Times of steps.
#[derive(Clone, Copy, Debug, Default)]
pub struct StepTimes {
    /// Weighted sums over steps, for the line through their sizes and times: of 1, of tokens, of seconds, and of the products.
    count: f64,
    tokens: f64,
    seconds: f64,
    tokens_tokens: f64,
    tokens_seconds: f64,
    seconds_per_token: f64,
}

/// Weight of a step against all earlier ones.
const FORGET: f64 = 0.999;
/// Standard deviation of the sizes of steps, in tokens, below which they tell nothing about the time of a token.
const LEAST_SPREAD_TOKENS: f64 = 4.0;

impl StepTimes {
    /// Records a step.
    pub fn record(&mut self, tokens: usize, took: Duration) {
        let (x, y) = (tokens as f64, took.as_secs_f64());
        let add = |sum: &mut f64, value: f64| *sum = *sum * FORGET + value;
        add(&mut self.count, 1.0);
        add(&mut self.tokens, x);
        add(&mut self.seconds, y);
        add(&mut self.tokens_tokens, x * x);
        add(&mut self.tokens_seconds, x * y);
        let spread = self.count * self.tokens_tokens - self.tokens * self.tokens;
        // What is known from earlier steps still holds.
        if spread >= (LEAST_SPREAD_TOKENS * self.count).powi(2) {
            let slope = (self.count * self.tokens_seconds - self.tokens * self.seconds) / spread;
            self.seconds_per_token = slope.clamp(0.0, self.seconds / self.tokens);
        }
    }

    /// Seconds by which a token prolongs a step: the slope of the line with the least squares, between zero and a token's
    /// share of the mean step. 0 before there were steps of different sizes.
    pub fn seconds_per_token(&self) -> f64 {
        self.seconds_per_token
    }
}

/// Time for which `asking` sequences wait for others before their step starts. `due` has the times until the others are
/// expected. `step` is the duration of a step.
///
/// Each sequence that comes while the step waits is spared the rest of that step: without the wait, it would come during the
/// step, and its own step would start when this one ends. So waiting for `w` costs `asking * w`, and gains `step - w` for each
/// sequence that is due by then.
pub fn wait(asking: usize, due: impl IntoIterator<Item = Duration>, step: Duration) -> Duration {
    let mut due: Vec<Duration> = due.into_iter().filter(|due| *due < step).collect();
    due.sort_unstable();
    let step = step.as_secs_f64();
    let gain = |come: usize, wait: f64| come as f64 * (step - wait) - asking as f64 * wait;
    let gains = due.iter().enumerate().map(|(i, wait)| (*wait, gain(i + 1, wait.as_secs_f64())));
    gains.filter(|(_, gain)| *gain > 0.0).max_by(|a, b| a.1.total_cmp(&b.1)).map_or(Duration::ZERO, |(wait, _)| wait)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_step_waits_while_that_pays_off() {
        // Alone, or with nobody expected during the step, it starts at once.
        assert_eq!(wait(1, [], ms(10)), ms(0));
        assert_eq!(wait(1, [ms(10), ms(50)], ms(10)), ms(0));
        // One sequence waits 4 ms so that another one is spared 6 ms. Two do not.
        assert_eq!(wait(1, [ms(4)], ms(10)), ms(4));
        assert_eq!(wait(2, [ms(4)], ms(10)), ms(0));
        // Seven are back after the time of two messages; the eighth is late.
        let back = [2, 2, 2, 1, 2, 2, 9].map(ms);
        assert_eq!(wait(1, back, ms(10)), ms(2));
        assert_eq!(wait(0, [ms(9)], ms(10)), ms(9));
    }

    #[test]
    fn the_time_of_a_token_is_the_slope_of_steps_by_size() {
        let mut times = StepTimes::default();
        // All steps have about the same size.
        (0..100).for_each(|i| times.record(8 + i % 2, ms(10 + i as u64 % 3)));
        assert_eq!(times.seconds_per_token(), 0.0);
        // 8 ms, and 2 ms for each token.
        (0..9000).for_each(|i| times.record(i % 16, ms(8 + 2 * (i % 16) as u64)));
        assert!((times.seconds_per_token() - 0.002).abs() < 1e-4, "{times:?}");
        (0..9000).for_each(|_| times.record(8, ms(10)));
        assert!((times.seconds_per_token() - 0.002).abs() < 1e-3, "{times:?}");
        // Nonsense has bounds.
        (0..9000).for_each(|i| times.record(i % 16, ms(100 - (i % 16) as u64)));
        assert_eq!(times.seconds_per_token(), 0.0);
        (0..9000).for_each(|i| times.record(i % 16, ms(500 * (i % 16 / 14) as u64)));
        assert!(times.seconds_per_token() <= 0.0084, "{times:?}");
    }

    #[test]
    fn the_next_pause_is_expected_to_be_as_long_as_the_longer_one_of_two() {
        let mut pauses = Pauses::default();
        pauses.record(ms(4));
        assert_eq!(pauses.expected(), None);
        pauses.record(ms(8));
        assert_eq!(pauses.expected(), Some(ms(10)));
        pauses.record(ms(4));
        pauses.record(ms(2));
        assert_eq!(pauses.expected(), Some(ms(5)));
    }
}
