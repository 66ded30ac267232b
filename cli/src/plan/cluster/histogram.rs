//! Many values in little memory.

/// Relative width of a bucket. Percentiles are exact to half of it.
const WIDTH: f64 = 0.01;
/// Smallest value that is told from 0, in the unit of the values.
const LEAST: f64 = 1e-7;

/// A histogram of values of at least 0, with buckets of equal relative width.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    buckets: Vec<u64>,
    count: u64,
    sum: f64,
}

impl Histogram {
    /// Adds a value.
    pub fn add(&mut self, value: f64) {
        let bucket = ((value.max(LEAST) / LEAST).ln() / WIDTH.ln_1p()) as usize;
        if bucket >= self.buckets.len() {
            self.buckets.resize(bucket + 1, 0);
        }
        self.buckets[bucket] += 1;
        self.count += 1;
        self.sum += value;
    }

    /// Number of values.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Mean of the values; 0 without any.
    pub fn mean(&self) -> f64 {
        self.sum / self.count.max(1) as f64
    }

    /// The value below which `share` of all values are; 0 without any.
    pub fn quantile(&self, share: f64) -> f64 {
        let rank = ((share * self.count as f64).ceil() as u64).max(1);
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return LEAST * (1.0 + WIDTH).powf(bucket as f64 + 0.5);
            }
        }
        0.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_has_no_percentiles() {
        let empty = Histogram::default();
        assert_eq!((empty.quantile(0.5), empty.mean(), empty.count()), (0.0, 0.0, 0));
    }

    proptest! {
        #[test]
        fn percentiles_are_those_of_the_sorted_values(
            mut values in prop::collection::vec(1e-6_f64..100.0, 1..200),
            share in 0.0_f64..=1.0,
        ) {
            let mut histogram = Histogram::default();
            values.iter().for_each(|value| histogram.add(*value));
            values.sort_by(f64::total_cmp);
            let rank = ((share * values.len() as f64).ceil() as usize).max(1);
            let exact = values[rank - 1];
            prop_assert!((histogram.quantile(share) / exact - 1.0).abs() < 0.006, "{} for {exact}", histogram.quantile(share));
        }
    }
}
