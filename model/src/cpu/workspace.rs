//! Buffers of a forward pass. They are reused, so a step allocates nothing unless it is larger than all earlier steps.

use crate::{
    ModelConfig, Rope, SequenceSlice,
    batch::Slot,
    cpu::kernels::{attention::AttentionScratch, inputs::InputBuffer},
};

/// Everything that a step of `n` tokens writes, except KV.
#[derive(Default)]
pub(crate) struct Workspace {
    /// `[n, hidden]`: the residual stream.
    pub(crate) x: Vec<f32>,
    /// `[n, hidden]`.
    pub(crate) normed: Vec<f32>,
    /// `[n, (heads + 2 kv_heads) * head_dim]`: queries, keys, values.
    pub(crate) qkv: Vec<f32>,
    /// `[n, heads * head_dim]`.
    pub(crate) q: Vec<f32>,
    /// `[n, heads * head_dim]`.
    pub(crate) attended: Vec<f32>,
    /// `[n, intermediate]`.
    pub(crate) inner: Vec<f32>,
    /// `[ropes, n, rotary_dim / 2]` each.
    pub(crate) cos: Vec<f32>,
    pub(crate) sin: Vec<f32>,
    /// `[n]`: where each token's KV is stored.
    pub(crate) slots: Vec<Slot>,
    /// Rows whose logits are requested.
    pub(crate) wanted: Vec<usize>,
    pub(crate) inputs: InputBuffer,
    pub(crate) attention: AttentionScratch,
}

/// How a rope rotates.
pub(crate) struct Rotation {
    /// Radians per token, `[rotary_dim / 2]`.
    frequencies: Vec<f32>,
    /// Factor of cosines and sines.
    factor: f32,
}

impl Rotation {
    /// All of a model's.
    pub(crate) fn all(config: &ModelConfig) -> Vec<Self> {
        let of = |(rope, frequencies): (&Rope, Vec<f32>)| Self { frequencies, factor: rope.attention_factor() };
        config.ropes.iter().zip(config.inverse_frequencies()).map(of).collect()
    }
}

/// Widths of a model's activations.
pub(crate) struct Widths {
    pub(crate) hidden: usize,
    pub(crate) qkv: usize,
    pub(crate) heads: usize,
    pub(crate) inner: usize,
}

impl Workspace {
    /// Resizes the buffers for a batch, and computes its slots, requested rows and rotations. `ropes`: all of the
    /// model's.
    pub(crate) fn prepare(&mut self, batch: &[SequenceSlice<'_>], widths: &Widths, ropes: &[Rotation]) {
        let n: usize = batch.iter().map(|slice| slice.tokens.len()).sum();
        self.x.resize(n * widths.hidden, 0.0);
        self.normed.resize(n * widths.hidden, 0.0);
        self.qkv.resize(n * widths.qkv, 0.0);
        self.q.resize(n * widths.heads, 0.0);
        self.attended.resize(n * widths.heads, 0.0);
        self.inner.resize(n * widths.inner, 0.0);
        self.cos.clear();
        self.sin.clear();
        self.slots.clear();
        self.wanted.clear();
        for slice in batch {
            let first = self.slots.len();
            for position in slice.start..slice.start + slice.tokens.len() {
                self.slots.push(Slot::of(slice.blocks, position));
            }
            self.wanted.extend(first + slice.want.first_row(slice.tokens.len())..self.slots.len());
        }
        for Rotation { frequencies, factor } in ropes {
            for position in batch.iter().flat_map(|slice| slice.start..slice.start + slice.tokens.len()) {
                for frequency in frequencies {
                    let (sin, cos) = (position as f32 * frequency).sin_cos();
                    self.sin.push(sin * factor);
                    self.cos.push(cos * factor);
                }
            }
        }
    }
}
