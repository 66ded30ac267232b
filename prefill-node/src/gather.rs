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

/// Weight of a step against all earlier ones.
const FORGET: f64 = 0.999;
/// Standard deviation of the sizes of steps, in tokens, below which they tell nothing about the time of a token.
const LEAST_SPREAD_TOKENS: f64 = 4.0;
/// Largest steps that count. Long prompts are bound by arithmetic, and would hide that a few tokens more cost little.
const MOST_STEP_TOKENS: usize = 128;
/// A step that takes this many times as long as expected counts as that long: something else kept it waiting.
const MOST_SLOWDOWN: f64 = 4.0;
/// Weight of all steps from which on a time is expected.
const LEAST_STEPS: f64 = 16.0;

/// Sizes and times of steps, as the sums that the line with the least squares follows from.
#[derive(Clone, Copy, Debug, Default)]
pub struct StepTimes {
    count: f64,
    tokens: f64,
    seconds: f64,
    tokens_tokens: f64,
    tokens_seconds: f64,
    seconds_per_token: Option<f64>,
}

impl StepTimes {
    /// Records a step.
    pub fn record(&mut self, tokens: usize, took: Duration) {
        if tokens > MOST_STEP_TOKENS {
            return;
        }
        let x = tokens as f64;
        let y = took.as_secs_f64().min(self.expected(x).map_or(f64::INFINITY, |expected| MOST_SLOWDOWN * expected));
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
            self.seconds_per_token = Some(slope.clamp(0.0, self.seconds / self.tokens));
        }
    }

    /// Expected time of a step in seconds; `None` before there were enough.
    fn expected(&self, tokens: f64) -> Option<f64> {
        let slope = self.seconds_per_token.filter(|_| self.count >= LEAST_STEPS)?;
        Some(self.seconds / self.count + slope * (tokens - self.tokens / self.count))
    }

    /// Seconds by which a token prolongs a step: the slope of the line, between zero and a token's share of the mean step. `None`
    /// before there were steps of different sizes.
    pub fn seconds_per_token(&self) -> Option<f64> {
        self.seconds_per_token
    }
}

/// Time for which `asking` sequences wait for others before their step starts. `due` has the times until the others are
/// expected. `step` is the duration of a step, and `room` the number of others that fit into it.
///
/// If the step does not wait, a sequence that is due during the step starts when the step ends. If the step waits for `w`, each
/// sequence that is due within `w` ends a whole step earlier. In return, every sequence, asking or due, ends `w` later.
pub fn wait(asking: usize, room: usize, due: impl IntoIterator<Item = Duration>, step: Duration) -> Duration {
    let mut due: Vec<Duration> = due.into_iter().filter(|due| *due < step).collect();
    due.sort_unstable();
    let (all, step) = ((asking + due.len()) as f64, step.as_secs_f64());
    let gain = |come: usize, wait: Duration| come as f64 * step - all * wait.as_secs_f64();
    let gains = due.iter().take(room).enumerate().map(|(i, wait)| (*wait, gain(i + 1, *wait)));
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
        let wait = |asking, due: &[u64], step| wait(asking, 8, due.iter().copied().map(ms), ms(step));
        // Alone, or with nobody expected during the step, it starts at once.
        assert_eq!(wait(1, &[], 10), ms(0));
        assert_eq!(wait(1, &[10, 50], 10), ms(0));
        // One sequence waits 4 ms so that another one is spared 6 ms. Two do not.
        assert_eq!(wait(1, &[4], 10), ms(4));
        assert_eq!(wait(2, &[4], 10), ms(0));
        // Seven are back after the time of two messages; the eighth is late.
        assert_eq!(wait(1, &[2, 2, 2, 1, 2, 2, 9], 10), ms(2));
        assert_eq!(wait(0, &[9], 10), ms(9));
        // Five sequences would lose more than one gains.
        assert_eq!(wait(1, &[4, 9, 9, 9, 9, 9], 10), ms(0));
        // With room for only two others, the step does not wait. With room for eight, it does.
        assert_eq!(super::wait(4, 2, [ms(3); 8], ms(10)), ms(0));
        assert_eq!(super::wait(4, 8, [ms(3); 8], ms(10)), ms(3));
    }

    #[test]
    fn the_time_of_a_token_is_the_slope_of_steps_by_size() {
        let slope_after = |times: &mut StepTimes, steps: usize, took: fn(usize) -> u64| {
            (0..steps).for_each(|i| times.record(1 + i % 16, ms(took(1 + i % 16))));
            times.seconds_per_token().unwrap()
        };
        let mut times = StepTimes::default();
        // All steps have about the same size.
        (0..100).for_each(|i| times.record(8 + i % 2, ms(10 + i as u64 % 3)));
        assert_eq!(times.seconds_per_token(), None);
        let two = slope_after(&mut times, 9000, |tokens| 8 + 2 * tokens as u64);
        assert!((two - 0.002).abs() < 1e-4, "{two}");
        // Long prompts, and steps of one size, change nothing.
        (0..9000).for_each(|_| times.record(500, ms(9000)));
        (0..2000).for_each(|_| times.record(8, ms(24)));
        let still = times.seconds_per_token().unwrap();
        assert!((still - two).abs() < 2e-4, "{still}");
        // A step that something else kept waiting hardly counts.
        let mut times = StepTimes::default();
        slope_after(&mut times, 100, |tokens| 8 + 2 * tokens as u64);
        times.record(16, ms(5000));
        let after = slope_after(&mut times, 100, |tokens| 8 + 2 * tokens as u64);
        assert!((after - 0.002).abs() < 4e-4, "{after}");
        // Larger steps that take less time.
        assert_eq!(slope_after(&mut StepTimes::default(), 100, |tokens| 100 - tokens as u64), 0.0);
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
