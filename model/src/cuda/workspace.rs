//! Activations of a step, allocated once for the largest step.

use super::{
    blas,
    device::{Fault, Gpu},
    launch::DECODE_HEADS,
    memory::Buffer,
    pack::padded,
};
use crate::{ModelConfig, Parameter, config::Heads};

/// Thread blocks of decode attention per multiprocessor to aim for.
const BLOCKS_PER_MULTIPROCESSOR: usize = 2;
/// Most thread blocks that share a sequence's keys.
const MOST_SPLITS: usize = 32;

/// The largest step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Tokens.
    pub(super) rows: usize,
    /// Slices of one token, and rows of logits that are computed at once.
    pub(super) sequences: usize,
}

/// Buffers of activations.
pub(super) struct Workspace {
    /// The residual stream, f32 `[rows, hidden]`.
    pub(super) x: Buffer,
    /// 16 bits, `[rows, hidden]`.
    pub(super) normed: Buffer,
    /// 16 bits, `[rows, queries, keys and values]`.
    pub(super) qkv: Buffer,
    /// 16 bits, `[rows, queries]`.
    pub(super) q: Buffer,
    /// 16 bits, `[rows, queries]`.
    pub(super) attended: Buffer,
    /// 16 bits, `[rows, 2 * intermediate]`.
    pub(super) gate_up: Buffer,
    /// 16 bits, `[rows, intermediate]`.
    pub(super) inner: Buffer,
    /// f32, `[rows, hidden]`: what is added to `x` after a norm or with a factor. Empty if the model has neither.
    pub(super) added: Buffer,
    /// f32, `[ropes, rows, rotary_dim / 2]`.
    pub(super) cos: Buffer,
    pub(super) sin: Buffer,
    /// Partial results of decode attention, f32 `[sequences, heads, splits, head_dim + 2]`.
    pub(super) partial: Buffer,
    /// f32, `[sequences, vocabulary]`.
    pub(super) logits: Buffer,
    /// Weights without quantisation, of one layer at a time.
    pub(super) scratch: Buffer,
    splits: Splits,
}

/// How decode attention is split.
#[derive(Clone, Copy)]
struct Splits {
    /// Thread blocks for one sequence without splitting.
    per_sequence: usize,
    target: usize,
}

impl Splits {
    fn of(self, sequences: usize) -> usize {
        self.target.div_ceil(self.per_sequence * sequences.max(1)).clamp(1, MOST_SPLITS)
    }
}

/// Whether products are added to the residual stream as they are.
pub(super) fn adds_directly(config: &ModelConfig) -> bool {
    let normed = [Parameter::AttentionOutputNorm, Parameter::MlpOutputNorm].map(|norm| config.axes_of(norm).is_some());
    normed == [false; 2] && config.scales.residual == 1.0
}

impl Workspace {
    /// Allocates buffers for steps up to `limits`. `scratch_bytes`: for weights without quantisation.
    pub(super) fn new(gpu: &Gpu, config: &ModelConfig, limits: Limits, scratch_bytes: usize) -> Result<Self, Fault> {
        let Heads { heads, kv_heads, head_dim } = config.heads();
        let per_sequence = kv_heads * (heads / kv_heads).div_ceil(DECODE_HEADS);
        let splits = Splits { per_sequence, target: gpu.multiprocessors * BLOCKS_PER_MULTIPROCESSOR };
        // Products with many rows compute whole groups of rows.
        let rows = limits.rows.next_multiple_of(blas::ROWS);
        let sequences = limits.sequences.next_multiple_of(blas::ROWS);
        let (hidden, inner) = (padded(config.hidden_size), padded(config.intermediate_size));
        let partials = (1..=limits.sequences).map(|n| n * splits.of(n)).max().unwrap_or(1);
        let buffer = |elements: usize, bytes: usize| Buffer::zeroed(gpu.launcher.stream(), elements * bytes);
        let angles = || buffer(config.ropes.len() * rows * config.rotary_dim / 2, 4);
        let added = if adds_directly(config) { 0 } else { rows * hidden };
        Ok(Self {
            x: buffer(rows * hidden, 4)?,
            normed: buffer(rows.max(sequences) * hidden, 2)?,
            qkv: buffer(rows * padded((heads + 2 * kv_heads) * head_dim), 2)?,
            q: buffer(rows * heads * head_dim, 2)?,
            attended: buffer(rows * padded(heads * head_dim), 2)?,
            gate_up: buffer(rows * 2 * inner, 2)?,
            inner: buffer(rows * inner, 2)?,
            added: buffer(added, 4)?,
            cos: angles()?,
            sin: angles()?,
            partial: buffer(partials * heads * (head_dim + 2), 4)?,
            logits: buffer(sequences * padded(config.vocab_size), 4)?,
            scratch: buffer(scratch_bytes, 1)?,
            splits,
        })
    }

    /// Thread blocks that share the keys of each of `sequences` sequences.
    pub(super) fn splits(&self, sequences: usize) -> usize {
        self.splits.of(sequences)
    }
}
