//! Measures the kernels and the machine's limits, for `overfill bench`.

pub mod gpu;

use std::{hint::black_box, time::Instant};

use overfill_kv::{BLOCK_TOKENS, BlockId, KvDtype, KvStore, blocks_for};
use rayon::prelude::*;

use crate::{
    LayerSpec, ModelConfig, ModelError, Rows, SequenceSlice, Want, WeightFormat,
    cpu::{
        CpuKv,
        kernels::{
            attention::{AttentionScratch, Scoring},
            inputs::InputBuffer,
            matmul::multiply,
            packed::{Arithmetic, Packed},
            simd::{Isa, Kernel, Simd},
        },
    },
    tensor,
};

/// Bytes read to measure memory bandwidth: more than any cache holds.
const BANDWIDTH_BYTES: usize = 1 << 30;
/// Columns of the panels that are read, one per task: 256 KiB, the amount of weights per task in the kernels.
const BANDWIDTH_COLUMNS: usize = 2048;
/// Minimum bytes of weights read before a matrix is read again, so that it is no longer in a cache.
const COLD_BYTES: usize = 256 << 20;
/// Maximum number of copies of a matrix made to reach `COLD_BYTES`.
const MOST_COPIES: usize = 64;

/// Up to this many rows, each row is the newest token of a sequence of its own. More rows form one prompt.
const MOST_SEQUENCES: usize = 32;

/// This machine's limits, using all threads.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Instruction set that the kernels use.
    pub isa: String,
    /// Number of threads.
    pub threads: usize,
    /// Memory read bandwidth in bytes per second.
    pub read_bytes_per_second: f64,
    /// f32 operations per second. A multiply-add counts as two.
    pub f32_operations_per_second: f64,
}

/// Measurement of one of a model's matrix products, or of its attention.
#[derive(Clone, Debug)]
pub struct KernelFigure {
    /// Storage format of the weights, or of keys and values.
    pub format: String,
    /// The product: `qkv`, `o`, `gate_up`, `down`, `head` or `attention`.
    pub name: &'static str,
    /// Outputs x inputs. For attention: query heads/KV heads x head width, keys per query.
    pub shape: String,
    /// Number of rows multiplied at once.
    pub rows: usize,
    /// Seconds per product, the best of several runs.
    pub seconds: f64,
    /// Bytes of the packed weights, or of keys and values, divided by `seconds`. Each byte is counted once.
    pub bytes_per_second: f64,
    /// Operations per second. A multiply-add counts as two.
    pub operations_per_second: f64,
}

struct Sum<'a>(&'a [f32]);

impl Kernel for Sum<'_> {
    type Output = f32;
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn run<S: Simd>(self) -> f32 {
        // SAFETY: a chunk holds 4 * LANES values.
        unsafe {
            let mut sums = [S::splat(0.0); 4];
            for chunk in self.0.chunks_exact(4 * S::LANES) {
                if !S::STREAMS_ALONE {
                    S::prefetch(chunk.as_ptr().cast::<u8>().wrapping_add(4096));
                }
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = S::add(*sum, S::load(chunk.as_ptr().add(i * S::LANES)));
                }
            }
            S::sum(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])))
        }
    }
}

/// Measures multiply-adds on registers; the field is the number of iterations.
struct Peak(usize);

const CHAINS: usize = 10;

impl Kernel for Peak {
    /// Number of operations, and a value that depends on all results.
    type Output = (f64, f32);
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn run<S: Simd>(self) -> (f64, f32) {
        // SAFETY: only register operations.
        unsafe {
            let (a, b) = (S::splat(black_box(0.999)), S::splat(black_box(0.001)));
            let mut sums = [S::splat(black_box(1.0)); CHAINS];
            for _ in 0..self.0 {
                for sum in &mut sums {
                    *sum = S::mul_add(*sum, a, b);
                }
            }
            let mut total = 0.0;
            for sum in sums {
                total += S::sum(sum);
            }
            ((2 * CHAINS * S::LANES * self.0) as f64, total)
        }
    }
}

/// Memory for measuring read bandwidth. It is allocated like weights: as a packed matrix.
pub struct MemoryProbe(Packed);

impl MemoryProbe {
    /// Allocates one GiB.
    pub fn new() -> Result<Self, ModelError> {
        random(WeightFormat::F32, BANDWIDTH_BYTES / 4 / BANDWIDTH_COLUMNS, BANDWIDTH_COLUMNS).map(Self)
    }

    fn read(&self) {
        let sum = |panel| Isa::best().run(Sum(bytemuck::cast_slice(self.0.panel(panel))));
        black_box((0..self.0.panels()).into_par_iter().map(sum).sum::<f32>());
    }

    /// Read bandwidth in bytes per second, from one pass with all threads.
    pub fn read_bytes_per_second(&self) -> f64 {
        let begin = Instant::now();
        self.read();
        self.0.size_bytes() as f64 / begin.elapsed().as_secs_f64()
    }
}

/// Measures memory bandwidth and arithmetic. Reports the best of `runs` runs.
pub fn machine(runs: usize) -> Result<Machine, ModelError> {
    let isa = Isa::best();
    let threads = rayon::current_num_threads();
    let memory = MemoryProbe::new()?;
    let read = best(runs, || memory.read());
    const STEPS: usize = 20_000_000;
    let mut operations = 0.0;
    let arithmetic = best(runs, || {
        operations = (0..threads).into_par_iter().map(|_| black_box(isa.run(Peak(STEPS))).0).sum();
    });
    Ok(Machine {
        isa: format!("{isa:?}").to_lowercase(),
        threads,
        read_bytes_per_second: memory.0.size_bytes() as f64 / read,
        f32_operations_per_second: operations / arithmetic,
    })
}

/// Measures the matrix products of a model with this geometry, with random weights.
pub fn kernels(
    config: &ModelConfig,
    weights: WeightFormat,
    role: Rows,
    rows: &[usize],
    runs: usize,
) -> Result<Vec<KernelFigure>, ModelError> {
    let (hidden, inner, d) = (config.hidden_size, config.intermediate_size, config.head_dim);
    let (q, kv) = (config.num_attention_heads * d, config.num_key_value_heads * d);
    let products = [
        ("qkv", q + 2 * kv, hidden),
        ("o", hidden, q),
        ("gate_up", 2 * inner, hidden),
        ("down", hidden, inner),
        ("head", config.vocab_size, hidden),
    ];
    let how = Arithmetic { isa: Isa::best(), rows: role };
    let mut figures = Vec::new();
    for (name, outputs, inputs) in products {
        let matrix = random(weights, outputs, inputs)?;
        let copies = (COLD_BYTES / matrix.size_bytes()).clamp(1, MOST_COPIES);
        let matrices = [Ok(matrix)]
            .into_iter()
            .chain((1..copies).map(|_| random(weights, outputs, inputs)))
            .collect::<Result<Vec<_>, _>>()?;
        for &rows in rows {
            // With many rows, a single product takes long enough to measure.
            let matrices = &matrices[..if rows > MOST_SEQUENCES { 1 } else { matrices.len() }];
            let x: Vec<f32> = (0..rows * inputs).map(|i| (i as f32 * 0.37).sin()).collect();
            let (mut out, mut buffer) = (vec![0.0; rows * outputs], InputBuffer::default());
            let all = best(runs, || {
                rayon::scope(|_| {
                    for matrix in matrices {
                        let inputs = how.inputs(matrix, &x, &mut buffer);
                        multiply(how.isa, matrix, inputs, 1, &mut out, outputs, |_, [sums, _], out| {
                            out.copy_from_slice(&sums[..out.len()]);
                        });
                    }
                });
            });
            let seconds = all / matrices.len() as f64;
            figures.push(KernelFigure {
                format: weights.to_string(),
                name,
                shape: format!("{outputs}x{inputs}"),
                rows,
                seconds,
                bytes_per_second: matrices[0].size_bytes() as f64 / seconds,
                operations_per_second: 2.0 * (rows * outputs * inputs) as f64 / seconds,
            });
        }
    }
    Ok(figures)
}

/// Measures attention of a model with this geometry. Few rows are the newest tokens of sequences of `context` tokens
/// each; many rows form one prompt.
pub fn attention(
    config: &ModelConfig,
    dtype: KvDtype,
    rows: &[usize],
    context: usize,
    runs: usize,
) -> Result<Vec<KernelFigure>, ModelError> {
    let sizes = config.heads();
    let mut figures = Vec::new();
    for &rows in rows {
        let prompt = rows > MOST_SEQUENCES;
        let how = Arithmetic { isa: Isa::best(), rows: if prompt { Rows::Many } else { Rows::Few } };
        let (sequences, each) = if prompt { (1, rows) } else { (rows, context) };
        let blocks = blocks_for(each);
        let layer_bytes = sequences * blocks * 2 * sizes.kv_heads * BLOCK_TOKENS * sizes.head_dim * dtype.size_bytes();
        let layers = if prompt { 1 } else { (COLD_BYTES / layer_bytes).clamp(1, MOST_COPIES) };
        let cache = CpuKv::new(layers, sequences * blocks, sizes, dtype)?;
        let tables: Vec<Vec<BlockId>> =
            (0..sequences).map(|s| (s * blocks..(s + 1) * blocks).map(|b| BlockId(b as u32)).collect()).collect();
        for layer in 0..layers {
            for table in &tables {
                // 0x3c3c is a finite number in every type. Memory that was never written would all be mapped to one
                // page of zeros.
                cache.write(layer, table, &mut |_, bytes| bytes.fill(0x3c)).map_err(candle_core::Error::wrap)?;
            }
        }
        let tokens = vec![0; if prompt { each } else { 1 }];
        let slice = |blocks| SequenceSlice { tokens: &tokens, start: each - tokens.len(), blocks, want: Want::Nothing };
        let batch: Vec<SequenceSlice<'_>> = tables.iter().map(|blocks| slice(&blocks[..])).collect();
        let q: Vec<f32> = (0..rows * sizes.heads * sizes.head_dim).map(|i| (i as f32 * 0.37).sin()).collect();
        let (mut out, mut scratch) = (vec![0.0; q.len()], AttentionScratch::default());
        let all = best(runs, || {
            rayon::scope(|_| {
                (0..layers).for_each(|layer| {
                    cache.attend(how, layer, &batch, Scoring::of(&LayerSpec::PLAIN), &q, &mut out, &mut scratch)
                });
            });
        });
        let seconds = all / layers as f64;
        // Each token of a prompt attends to itself and all earlier tokens.
        let seen = if prompt { each * (each + 1) / 2 } else { rows * context };
        figures.push(KernelFigure {
            format: dtype.to_string(),
            name: "attention",
            shape: format!("{}/{}x{}, {each}", sizes.heads, sizes.kv_heads, sizes.head_dim),
            rows,
            seconds,
            bytes_per_second: layer_bytes as f64 / seconds,
            operations_per_second: (4 * seen * sizes.heads * sizes.head_dim) as f64 / seconds,
        });
    }
    Ok(figures)
}

/// Number of threads that compute.
pub fn threads() -> usize {
    rayon::current_num_threads()
}

/// Operations per second of f32 matrix products of `rows` tokens with a model's matrices, as training computes them: of each
/// matrix the product itself, and both of the backward pass. One pass.
pub fn training_products(config: &ModelConfig, rows: usize) -> Result<f64, ModelError> {
    let (hidden, inner, d) = (config.hidden_size, config.intermediate_size, config.head_dim);
    let (q, kv) = (config.num_attention_heads * d, config.num_key_value_heads * d);
    let layers = config.num_hidden_layers;
    let counted = [(q, hidden, layers), (kv, hidden, 2 * layers), (hidden, q, layers), (inner, hidden, 2 * layers)];
    let (mut seconds, mut operations) = (0.0, 0.0);
    for (outputs, inputs, count) in counted.into_iter().chain([(hidden, inner, layers), (config.vocab_size, hidden, 1)])
    {
        // As many rows of the output layer at a time as the loss computes.
        let rows = if count == 1 { rows.min(tensor::loss_rows(outputs)) } else { rows };
        let once = tensor::seconds_of_products(rows, outputs, inputs, 3);
        seconds += once * count as f64;
        operations += 6.0 * (rows * outputs * inputs * count) as f64;
    }
    Ok(operations / seconds)
}

fn random(weights: WeightFormat, outputs: usize, inputs: usize) -> Result<Packed, ModelError> {
    Packed::pack(weights, outputs, inputs, |panel, out| {
        let mut state = panel as u32 | 1;
        for value in out {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *value = (state >> 8) as f32 / (1 << 23) as f32 - 1.0;
        }
        Ok(())
    })
}

/// Seconds of the fastest run, after a warm-up run.
fn best(runs: usize, mut f: impl FnMut()) -> f64 {
    f();
    let seconds = |f: &mut dyn FnMut()| {
        let start = Instant::now();
        f();
        start.elapsed().as_secs_f64()
    };
    (0..runs.max(1)).map(|_| seconds(&mut f)).fold(f64::INFINITY, f64::min)
}
