//! Distance between the log-probabilities of two models.

use serde::Serialize;

/// Maximum gap in nats between the two most likely tokens in a close call: rounding may swap them.
pub const CLOSE_CALL: f64 = 0.02;

/// Absolute differences of log-probabilities in nats, over compared positions and the whole vocabulary. A difference is
/// infinite if either side is NaN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Distance {
    /// Number of compared positions.
    pub positions: usize,
    /// Greatest difference.
    pub greatest: f64,
    /// Mean difference.
    pub mean: f64,
    /// Number of positions at which both models have the same most likely token.
    pub same_greedy: usize,
    /// Number of positions with different most likely tokens at which the reference has a close call.
    pub close_calls: usize,
    #[serde(skip)]
    sum: f64,
}

impl Distance {
    /// Adds one position. Both slices are logits, `[vocab]`, of equal length.
    pub fn add(&mut self, reference: &[f32], engine: &[f32]) {
        // An empty comparison must not pass.
        assert_eq!(reference.len(), engine.len(), "both sides have logits of the same vocabulary");
        assert!(!reference.is_empty(), "logits are not empty");
        let (expected, got) = (log_sum_exp(reference), log_sum_exp(engine));
        let (mut greatest, mut sum) = (0.0_f64, 0.0);
        for (reference, engine) in reference.iter().zip(engine) {
            let distance = ((f64::from(*reference) - expected) - (f64::from(*engine) - got)).abs();
            let distance = if distance.is_nan() { f64::INFINITY } else { distance };
            greatest = greatest.max(distance);
            sum += distance;
        }
        let same = greedy(reference) == greedy(engine);
        *self = self.with(&Self {
            positions: 1,
            greatest,
            mean: 0.0,
            same_greedy: usize::from(same),
            close_calls: usize::from(!same && lead(reference) <= CLOSE_CALL),
            sum: sum / reference.len().max(1) as f64,
        });
    }

    /// Merges two sets of positions.
    pub fn with(&self, other: &Self) -> Self {
        let (positions, sum) = (self.positions + other.positions, self.sum + other.sum);
        Self {
            positions,
            greatest: self.greatest.max(other.greatest),
            mean: if positions == 0 { 0.0 } else { sum / positions as f64 },
            same_greedy: self.same_greedy + other.same_greedy,
            close_calls: self.close_calls + other.close_calls,
            sum,
        }
    }
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - greatest).exp()).sum();
    f64::from(greatest) + sum.ln()
}

/// Returns the most likely token, or the first of several equally likely ones.
pub fn greedy(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = token;
        }
    }
    best as u32
}

/// Returns the gap in nats between the most likely and the second most likely token.
fn lead(logits: &[f32]) -> f64 {
    let best = greedy(logits) as usize;
    let others = logits.iter().enumerate().filter(|(token, _)| *token != best).map(|(_, logit)| *logit);
    f64::from(logits.get(best).copied().unwrap_or(f32::NAN)) - f64::from(others.fold(f32::NEG_INFINITY, f32::max))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pairs: &[([f32; 3], [f32; 3])]) -> Distance {
        let mut distance = Distance::default();
        pairs.iter().for_each(|(reference, engine)| distance.add(reference, engine));
        distance
    }

    #[test]
    fn logits_that_differ_by_a_constant_are_the_same() {
        let distance = of(&[([1.0, 2.0, 3.0], [11.0, 12.0, 13.0])]);
        assert!(distance.greatest < 1e-12 && distance.same_greedy == 1, "{distance:?}");
    }

    #[test]
    fn the_greatest_and_the_mean_are_over_all_tokens_of_all_positions() {
        // Reference: ln(1/2) twice. Engine: ln(1/3) and ln(2/3). The third token has no weight.
        let distance = of(&[([0.0, 0.0, -1e4], [0.0, 2f32.ln(), -1e4]), ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0])]);
        let (a, b) = (1.5f64.ln(), (4.0f64 / 3.0).ln());
        assert!((distance.greatest - a).abs() < 1e-6, "{distance:?}");
        assert!((distance.mean - (a + b + a) / 6.0).abs() < 1e-4, "{distance:?}");
    }

    #[test]
    fn what_is_no_number_is_as_far_as_can_be() {
        for bad in [f32::NAN, f32::INFINITY] {
            assert_eq!(of(&[([0.0; 3], [0.0, bad, 0.0]), ([0.0; 3], [0.0; 3])]).greatest, f64::INFINITY);
            assert_eq!(of(&[([bad; 3], [bad; 3])]).mean, f64::INFINITY);
        }
    }

    #[test]
    fn a_close_call_is_the_references() {
        let close = of(&[([0.0, 0.01, -9.0], [0.0, -1.0, -9.0])]);
        assert_eq!((close.same_greedy, close.close_calls), (0, 1));
        let clear = of(&[([0.0, 1.0, -9.0], [0.0, -0.01, -9.0])]);
        assert_eq!((clear.same_greedy, clear.close_calls), (0, 0));
    }
}
