//! The forward pass over a ragged batch of sequences whose KV is paged.

use candle_core::{DType, Result, Tensor};
use overfill_kv::{BlockId, blocks_for};

use crate::{Attention, Decoder, KvCache, ModelError};

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

/// Logits on the host, f32, a row for each token asked for, in the order of the batch.
#[derive(Clone, Debug)]
pub struct Logits {
    values: Vec<f32>,
    vocab_size: usize,
}

impl Logits {
    /// How many rows.
    pub fn rows(&self) -> usize {
        self.values.len() / self.vocab_size
    }

    /// One row, `[vocab]`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.vocab_size..][..self.vocab_size]
    }
}

/// Attention over the cache, which the batch's own keys and values enter first.
struct Paged<'a> {
    cache: &'a KvCache,
    batch: &'a [SequenceSlice<'a>],
    on_layer: &'a mut dyn FnMut(usize),
}

impl Attention for Paged<'_> {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        self.cache.put(layer, self.batch, k, v)?;
        (self.on_layer)(layer);
        self.cache.attend(layer, self.batch, q)
    }
}

/// Runs a batch; see [`crate::Model::forward`].
pub(crate) fn forward(
    decoder: &Decoder,
    cache: &KvCache,
    batch: &[SequenceSlice<'_>],
    on_layer: &mut dyn FnMut(usize),
) -> std::result::Result<Logits, ModelError> {
    let vocab_size = decoder.config().vocab_size;
    let mut tokens = Vec::new();
    let mut positions = Vec::new();
    let mut rows = Vec::new();
    for slice in batch {
        let end = slice.start + slice.tokens.len();
        if slice.tokens.is_empty() || slice.blocks.len() < blocks_for(end) {
            let (count, blocks) = (slice.tokens.len(), slice.blocks.len());
            return Err(
                candle_core::Error::Msg(format!("a slice of {count} tokens up to {end} has {blocks} blocks")).into()
            );
        }
        let first = tokens.len();
        tokens.extend_from_slice(slice.tokens);
        positions.extend((slice.start..end).map(|p| p as u32));
        match slice.want {
            Want::Nothing => {}
            Want::Last => rows.push(tokens.len() as u32 - 1),
            Want::All => rows.extend(first as u32..tokens.len() as u32),
        }
    }
    let device = decoder.device();
    let n = tokens.len();
    let tokens = Tensor::from_vec(tokens, n, device)?;
    let hidden = decoder.forward(&tokens, &positions, &mut Paged { cache, batch, on_layer }, None)?;
    let values = if rows.is_empty() {
        Vec::new()
    } else {
        let count = rows.len();
        let wanted = hidden.index_select(&Tensor::from_vec(rows, count, device)?, 0)?;
        decoder.logits(&wanted)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?
    };
    Ok(Logits { values, vocab_size })
}
