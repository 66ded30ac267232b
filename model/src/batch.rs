//! What the engines compute: a ragged batch of sequences whose KV is paged.

use candle_core::{Result, bail};
use overfill_kv::{BlockId, blocks_for};

/// The next tokens of one sequence in a batch.
#[derive(Clone, Copy, Debug)]
pub struct SequenceSlice<'a> {
    /// At least one.
    pub tokens: &'a [u32],
    /// Position of the first of them in the sequence: so many tokens have their KV in the cache already.
    pub start: usize,
    /// The sequence's blocks from position 0 on; they cover `start + tokens.len()` positions.
    pub blocks: &'a [BlockId],
    /// Which logits are asked for.
    pub want: Want,
}

/// Which of a slice's tokens have their logits computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// None: a chunk of a prompt that goes on.
    Nothing,
    /// The last.
    Last,
    /// Each.
    All,
}

/// Logits on the host, f32, a row for each token asked for, in the order of the batch. One is used for many batches: its
/// memory stays.
#[derive(Clone, Debug, Default)]
pub struct Logits {
    values: Vec<f32>,
    vocab_size: usize,
}

impl Logits {
    /// How many rows.
    pub fn rows(&self) -> usize {
        self.values.len() / self.vocab_size.max(1)
    }

    /// One row, `[vocab]`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.vocab_size..][..self.vocab_size]
    }

    /// Makes room for `rows` rows, to be overwritten.
    pub(crate) fn reset(&mut self, rows: usize, vocab_size: usize) -> &mut [f32] {
        self.vocab_size = vocab_size;
        self.values.resize(rows * vocab_size, 0.0);
        &mut self.values
    }
}

/// Checks what the forward pass relies on.
pub(crate) fn check(batch: &[SequenceSlice<'_>], vocab_size: usize) -> Result<()> {
    if batch.is_empty() {
        bail!("a batch of no slices");
    }
    for slice in batch {
        let (count, end) = (slice.tokens.len(), slice.start + slice.tokens.len());
        if count == 0 || slice.blocks.len() < blocks_for(end) {
            bail!("a slice of {count} tokens up to {end} has {} blocks", slice.blocks.len());
        }
        if let Some(token) = slice.tokens.iter().find(|t| **t as usize >= vocab_size) {
            bail!("token {token} is not in the vocabulary of {vocab_size}");
        }
    }
    Ok(())
}
