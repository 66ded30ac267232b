//! How long a step of the engine takes, as a function of its size and of the context that it reads.

use serde::{Deserialize, Serialize};

/// One measured step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Point {
    /// Tokens that the step computes: prompt tokens in a prefill step, sequences in a decode step.
    pub rows: usize,
    /// Tokens of KV before each of these tokens.
    pub context_tokens: usize,
    /// Duration of the step.
    pub seconds: f64,
}

/// Duration of a step: `base(rows) + context_seconds * (sum of the rows' contexts)`.
///
/// The base is what the step takes without context: reading the weights and the matrix products. It is interpolated
/// linearly between measured sizes. The second term is attention, which is linear in the KV that it reads.
#[derive(Clone, Debug, PartialEq)]
pub struct StepCurve {
    /// Rows and base in seconds, by rows. At least one.
    base: Vec<(f64, f64)>,
    /// Seconds for one row and one token of context.
    context_seconds: f64,
}

impl StepCurve {
    /// Fits the curve to measured steps. `None` without any.
    ///
    /// The slope of the context comes from steps with the same number of rows and different contexts, by least squares.
    /// With only one context, it is 0.
    pub fn fit(points: &[Point]) -> Option<Self> {
        let mut sizes: Vec<usize> = points.iter().map(|point| point.rows).collect();
        sizes.sort_unstable();
        sizes.dedup();
        let of = |rows: usize| points.iter().filter(move |point| point.rows == rows);
        let read = |point: &Point| (point.rows * point.context_tokens) as f64;
        let means = |rows: usize| {
            let count = of(rows).count() as f64;
            (of(rows).map(read).sum::<f64>() / count, of(rows).map(|point| point.seconds).sum::<f64>() / count)
        };
        let (mut product, mut square) = (0.0, 0.0);
        for &rows in &sizes {
            let (mean_read, mean_seconds) = means(rows);
            for point in of(rows) {
                let away = read(point) - mean_read;
                product += away * (point.seconds - mean_seconds);
                square += away * away;
            }
        }
        // Noise must not make a longer context faster.
        let context_seconds = if square > 0.0 { (product / square).max(0.0) } else { 0.0 };
        let base: Vec<(f64, f64)> = sizes
            .iter()
            .map(|&rows| {
                let (mean_read, mean_seconds) = means(rows);
                // Steps take time, however large the noise of the slope is.
                (rows as f64, (mean_seconds - context_seconds * mean_read).max(mean_seconds * 0.01))
            })
            .collect();
        (!base.is_empty()).then_some(Self { base, context_seconds })
    }

    /// Duration in seconds of a step with `rows` rows that read `context` tokens of KV in total.
    pub fn seconds(&self, rows: f64, context: f64) -> f64 {
        self.base(rows) + self.context_seconds * context
    }

    /// Seconds that attention needs for `context` tokens of KV in total.
    pub fn context(&self, context: f64) -> f64 {
        self.context_seconds * context
    }

    /// Duration without context. Beyond the measured sizes, the line through the two nearest ones continues. Below the
    /// smallest size, the base is at least half of its duration: the weights are read in any case.
    pub fn base(&self, rows: f64) -> f64 {
        match self.base.as_slice() {
            [] => 0.0,
            // One size says nothing about others. Then the time is proportional, as it is where arithmetic limits.
            [(only, seconds)] => seconds * rows / only,
            list => {
                let above = list.partition_point(|(size, _)| *size < rows).clamp(1, list.len() - 1);
                let ((x0, y0), (x1, y1)) = (list[above - 1], list[above]);
                let line = y0 + (y1 - y0) * (rows - x0) / (x1 - x0);
                let (first, last) = (list[0], list[list.len() - 1]);
                if rows < first.0 {
                    line.max(first.1 / 2.0)
                } else if rows > last.0 {
                    line.max(last.1)
                } else {
                    line
                }
            }
        }
    }

    /// Highest rate in rows per second over the measured sizes up to `most` rows, with `context` tokens before each row.
    pub fn best_rate(&self, most: f64, context: f64) -> f64 {
        let sizes = self.base.iter().map(|(rows, _)| *rows).filter(|rows| *rows < most).chain([most]);
        sizes.map(|rows| rows / self.seconds(rows, rows * context)).fold(0.0, f64::max)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn point(rows: usize, context_tokens: usize, seconds: f64) -> Point {
        Point { rows, context_tokens, seconds }
    }

    #[test]
    fn a_fit_finds_base_and_slope() {
        let exact = |rows: usize, context: usize| {
            point(rows, context, 0.01 + 0.001 * rows as f64 + 1e-6 * (rows * context) as f64)
        };
        let points: Vec<Point> = [1, 4, 16].iter().flat_map(|n| [exact(*n, 100), exact(*n, 1000)]).collect();
        let curve = StepCurve::fit(&points).unwrap();
        for (rows, each) in [(1, 0), (2, 500), (10, 3000), (32, 100)] {
            let expected = exact(rows, each).seconds;
            let got = curve.seconds(rows as f64, (rows * each) as f64);
            assert!((got / expected - 1.0).abs() < 1e-9, "{rows} {each}: {got} instead of {expected}");
        }
        assert!((curve.best_rate(16.0, 0.0) - 16.0 / 0.026).abs() < 1e-6);
    }

    #[test]
    fn little_is_known_from_little() {
        assert_eq!(StepCurve::fit(&[]), None);
        let one = StepCurve::fit(&[point(100, 0, 2.0)]).unwrap();
        assert_eq!((one.seconds(50.0, 1e6), one.base(200.0)), (1.0, 4.0));
        // A longer context that seems faster is noise.
        let noisy = StepCurve::fit(&[point(1, 10, 2.0), point(1, 1000, 1.0)]).unwrap();
        assert_eq!(noisy.seconds(1.0, 1000.0), 1.5);
    }

    proptest! {
        #[test]
        fn steps_take_time_and_context_never_saves_any(
            points in prop::collection::vec((1_usize..600, 0_usize..5000, 1e-5_f64..1.0), 1..20),
            rows in 0.5_f64..2000.0,
            context in 0.0_f64..1e6,
        ) {
            let points: Vec<Point> = points.iter().map(|(r, c, s)| point(*r, *c, *s)).collect();
            let curve = StepCurve::fit(&points).unwrap();
            prop_assert!(curve.base(rows) > 0.0, "{curve:?} at {rows}");
            prop_assert!(curve.seconds(rows, context) >= curve.base(rows));
            prop_assert!(curve.best_rate(512.0, 0.0) > 0.0);
        }
    }
}
