//! The forward pass over a ragged batch of sequences whose KV is paged.

use candle_core::{DType, Result, Tensor, bail};
use overfill_kv::{BlockId, blocks_for};

use crate::{Attention, Decoder, KvCache, kernels::scatter::Slot};

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

/// Attention over the cache, which the batch's own keys and values enter first.
struct Paged<'a> {
    cache: &'a KvCache,
    batch: &'a [SequenceSlice<'a>],
    slots: Vec<Slot>,
    on_layer: &'a mut dyn FnMut(usize),
}

impl Attention for Paged<'_> {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        self.cache.put_with_tensors(layer, &self.slots, k, v)?;
        (self.on_layer)(layer);
        self.cache.attend_with_tensors(layer, self.batch, q)
    }
}

/// Runs a batch with tensor operations; see [`crate::Model::forward`].
pub(crate) fn forward(
    decoder: &Decoder,
    cache: &KvCache,
    batch: &[SequenceSlice<'_>],
    on_layer: &mut dyn FnMut(usize),
    logits: &mut Logits,
) -> Result<()> {
    let (mut tokens, mut positions, mut slots, mut rows) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for slice in batch {
        let first = tokens.len() as u32;
        tokens.extend_from_slice(slice.tokens);
        let places = slice.start..slice.start + slice.tokens.len();
        positions.extend(places.clone().map(|p| p as u32));
        slots.extend(places.map(|p| Slot::of(slice.blocks, p)));
        match slice.want {
            Want::Nothing => {}
            Want::Last => rows.push(tokens.len() as u32 - 1),
            Want::All => rows.extend(first..tokens.len() as u32),
        }
    }
    let device = decoder.device();
    let (n, count) = (tokens.len(), rows.len());
    let tokens = Tensor::from_vec(tokens, n, device)?;
    let hidden = decoder.forward(&tokens, &positions, &mut Paged { cache, batch, slots, on_layer }, None)?;
    let out = logits.reset(count, decoder.config().vocab_size);
    if count > 0 {
        let wanted = hidden.index_select(&Tensor::from_vec(rows, count, device)?, 0)?;
        out.copy_from_slice(&decoder.logits(&wanted)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?);
    }
    Ok(())
}
