//! Importance of each channel (Minitron's activation-based rule, as in OverFill).
//!
//! Score of a hidden channel: |mean over tokens of the attention's input| plus the same for the MLP's input, summed over
//! the layers; in most families these are outputs of norms. Score of an intermediate channel: mean over tokens of down_proj's
//! input. Importance is the L1 or L2 norm of the scores over samples. Sums are f64, one per channel, so samples are not
//! kept.

use std::str::FromStr;

use anyhow::Result;
use candle_core::Tensor;
use overfill_model::{Axis, Decoder, Site, column_sums};

use crate::{attention::RaggedAttention, batch::Flat};

/// Norm that combines the scores of all samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norm {
    /// Sum of magnitudes.
    L1,
    /// Root of the sum of squares.
    L2,
}

impl FromStr for Norm {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "l1" => Ok(Self::L1),
            "l2" => Ok(Self::L2),
            other => Err(format!("norm must be l1 or l2, got {other:?}")),
        }
    }
}

impl std::fmt::Display for Norm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::L1 => "l1",
            Self::L2 => "l2",
        })
    }
}

/// Importance of each channel over the samples seen so far.
pub struct Importance {
    norm: Norm,
    hidden: Vec<f64>,
    /// One list per layer.
    intermediate: Vec<Vec<f64>>,
}

impl Importance {
    /// Starts without samples, for a model of the given widths and number of layers.
    pub fn new(norm: Norm, hidden: usize, intermediate: usize, layers: usize) -> Self {
        Self { norm, hidden: vec![0.0; hidden], intermediate: vec![vec![0.0; intermediate]; layers] }
    }

    /// Runs samples of at least one token through the model and adds their scores.
    pub fn observe(&mut self, model: &Decoder, samples: &[&[u32]]) -> Result<()> {
        let batch = Flat::new(samples, &vec![0; samples.len()], model.device())?;
        let mut attention = RaggedAttention::new(&batch.lengths, None);
        let mut hidden = vec![vec![0.0; self.hidden.len()]; samples.len()];
        let (norm, intermediate) = (self.norm, &mut self.intermediate);
        let mut see = |site: Site, layer: usize, x: &Tensor| {
            let axis = site.axis(model.config());
            // Pruning cuts no other axis.
            if !matches!(axis, Some(Axis::Hidden | Axis::Intermediate)) {
                return Ok(());
            }
            for (sample, sums) in column_sums(x, &batch.lengths)?.into_iter().enumerate() {
                let means = sums.into_iter().map(|sum| f64::from(sum / batch.lengths[sample] as f32));
                match axis {
                    Some(Axis::Hidden) => {
                        hidden[sample].iter_mut().zip(means).for_each(|(sum, mean)| *sum += mean.abs())
                    }
                    _ => accumulate(norm, &mut intermediate[layer], means),
                }
            }
            Ok(())
        };
        model.forward(&batch.tokens, &batch.positions, &mut attention, Some(&mut see))?;
        for hidden in hidden {
            accumulate(norm, &mut self.hidden, hidden.into_iter());
        }
        Ok(())
    }

    /// Returns the `keep` most important hidden channels, ascending.
    pub fn hidden_channels(&self, keep: usize) -> Vec<u32> {
        top(&self.hidden, keep)
    }

    /// Returns the `keep` most important intermediate channels of a layer, ascending.
    pub fn intermediate_channels(&self, layer: usize, keep: usize) -> Vec<u32> {
        top(&self.intermediate[layer], keep)
    }
}

/// Adds scores to the norm. The final square root is omitted: it does not change the order.
fn accumulate(norm: Norm, sums: &mut [f64], scores: impl Iterator<Item = f64>) {
    for (sum, score) in sums.iter_mut().zip(scores) {
        *sum += match norm {
            Norm::L1 => score.abs(),
            Norm::L2 => score * score,
        };
    }
}

/// Returns the indices of the `keep` largest scores, ascending. Among equal scores, lower indices are preferred.
fn top(scores: &[f64], keep: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    order.sort_by(|a, b| scores[*b as usize].total_cmp(&scores[*a as usize]));
    order.truncate(keep);
    order.sort_unstable();
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_are_kept_in_their_order() {
        assert_eq!(top(&[0.1, 3.0, 0.2, 3.0, 5.0], 3), [1, 3, 4]);
        assert_eq!(top(&[1.0, 1.0, 1.0], 2), [0, 1]);
    }

    #[test]
    fn norms_over_samples() {
        let mut sums = [0.0; 2];
        accumulate(Norm::L2, &mut sums, [3.0, -1.0].into_iter());
        accumulate(Norm::L2, &mut sums, [0.0, -2.0].into_iter());
        assert_eq!(sums, [9.0, 5.0]);
        let mut sums = [0.0; 1];
        accumulate(Norm::L1, &mut sums, [-3.0].into_iter());
        assert_eq!(sums, [3.0]);
    }
}
