//! Products of f32 matrices in memory, with the crate that candle's own products use.
//!
//! Unlike candle's, these take any stride, and can be added to what is there.

use std::time::Instant;

use gemm::{Parallelism, gemm};

/// A matrix whose rows, or whose columns, lie in a slice.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// `rows` rows of `columns` values, `stride` values apart.
    ///
    /// # Panics
    /// If `data` is too short.
    pub(crate) fn new(data: &'a [f32], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(columns <= stride && (rows == 0 || (rows - 1) * stride + columns <= data.len()));
        Self { data, rows, columns, row_stride: stride, column_stride: 1 }
    }

    /// `rows` rows of `columns` values, one after the other.
    pub(crate) fn dense(data: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::new(data, rows, columns, columns)
    }

    /// The transposed matrix.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// Threads of a product.
#[derive(Clone, Copy)]
pub(crate) enum Threads {
    /// The calling thread.
    One,
    /// All threads of the pool.
    All,
}

/// What happens to the values that a product is written to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Write {
    /// The product takes their place.
    Replace,
    /// The product is added.
    Add,
}

/// Writes `a b` into `out`, whose rows are `stride` values apart. The order of a sum does not depend on the threads.
///
/// # Panics
/// If the shapes do not fit.
#[allow(unsafe_code)]
pub(crate) fn multiply(a: Matrix<'_>, b: Matrix<'_>, out: &mut [f32], stride: usize, write: Write, threads: Threads) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    assert!(b.rows == k && n <= stride && (m == 0 || (m - 1) * stride + n <= out.len()));
    if m == 0 || n == 0 {
        return;
    }
    let parallelism = match threads {
        Threads::One => Parallelism::None,
        Threads::All => Parallelism::Rayon(0),
    };
    // SAFETY: the assertions here and in `Matrix::new` keep all three within their slices, and `out` is borrowed mutably.
    unsafe {
        gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            stride as isize,
            write == Write::Add,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Seconds of the fastest of `runs` runs of a linear layer's three products on all threads: outputs, and the gradients of
/// inputs and weights.
pub(crate) fn seconds_of_products(rows: usize, outputs: usize, inputs: usize, runs: usize) -> f64 {
    let values = |count: usize| (0..count).map(|i| (i % 13) as f32 / 13.0).collect::<Vec<f32>>();
    let (x, y, weight) = (values(rows * inputs), values(rows * outputs), values(outputs * inputs));
    // Of the sizes of `x`, `y` and `weight`.
    let mut out = [x.clone(), y.clone(), weight.clone()];
    let (x, y) = (Matrix::dense(&x, rows, inputs), Matrix::dense(&y, rows, outputs));
    let weight = Matrix::dense(&weight, outputs, inputs);
    let mut run = || {
        let begin = Instant::now();
        multiply(x, weight.t(), &mut out[1], outputs, Write::Replace, Threads::All);
        multiply(y, weight, &mut out[0], inputs, Write::Replace, Threads::All);
        multiply(y.t(), x, &mut out[2], inputs, Write::Replace, Threads::All);
        begin.elapsed().as_secs_f64()
    };
    run();
    (0..runs).map(|_| run()).fold(f64::INFINITY, f64::min)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Training resumed with another number of threads goes on with the same bits.
    #[test]
    fn a_product_does_not_depend_on_the_threads() {
        let (m, n, k) = (150, 700, 900);
        let values = |count: usize| (0..count).map(|i| (i as f32 * 0.7).sin()).collect::<Vec<_>>();
        let (a, b) = (values(m * k), values(n * k));
        let [one, all] = [Threads::One, Threads::All].map(|threads| {
            let mut out = vec![0.5; m * n];
            multiply(Matrix::dense(&a, m, k), Matrix::dense(&b, n, k).t(), &mut out, n, Write::Add, threads);
            out
        });
        assert!(one == all);
    }

    #[test]
    fn products_are_sums_of_products() {
        let (m, n, k) = (5, 7, 3);
        let values = |count: usize| (0..count).map(|i| (i as f32 * 0.7).sin()).collect::<Vec<_>>();
        let (a, b) = (values(m * (k + 2)), values(n * k));
        for (write, before) in [(Write::Replace, 0.0), (Write::Add, 2.0)] {
            for threads in [Threads::One, Threads::All] {
                let mut out = vec![2.0; m * (n + 1)];
                // b is given transposed.
                let (left, right) = (Matrix::new(&a, m, k, k + 2), Matrix::dense(&b, n, k).t());
                multiply(left, right, &mut out, n + 1, write, threads);
                for i in 0..m {
                    for j in 0..n {
                        let sum: f32 = (0..k).map(|l| a[i * (k + 2) + l] * b[j * k + l]).sum();
                        assert!((out[i * (n + 1) + j] - before - sum).abs() < 1e-5);
                    }
                    assert_eq!(out[i * (n + 1) + n], 2.0);
                }
            }
        }
    }
}
