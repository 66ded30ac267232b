//! The forward pass over a ragged batch of sequences whose KV is paged.

use candle_core::{DType, Result, Tensor};

use crate::{Attention, Decoder, KvCache, Logits, SequenceSlice, Want, cpu::kernels::scatter::Slot};

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
