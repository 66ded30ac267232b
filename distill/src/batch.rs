//! Flat batches of token sequences, and the forward passes shared by training and evaluation.

use candle_core::{Device, Result, Tensor};
use overfill_model::Decoder;

use crate::attention::{PromptKv, RaggedAttention};

/// Sequences of tokens, one after the other, without padding.
pub struct Flat {
    /// Token ids, `[n]`, u32.
    pub tokens: Tensor,
    /// Position of each token in its sequence.
    pub positions: Vec<u32>,
    /// Tokens of each sequence.
    pub lengths: Vec<usize>,
}

impl Flat {
    /// Joins sequences. The first token of sequence `i` has position `starts[i]`.
    pub fn new(sequences: &[&[u32]], starts: &[usize], device: &Device) -> Result<Self> {
        let lengths: Vec<usize> = sequences.iter().map(|tokens| tokens.len()).collect();
        let tokens = sequences.concat();
        let positions =
            lengths.iter().zip(starts).flat_map(|(n, start)| (*start..start + n).map(|p| p as u32)).collect();
        let n = tokens.len();
        Ok(Self { tokens: Tensor::from_vec(tokens, n, device)?, positions, lengths })
    }
}

/// Runs prompts of at least one token through a model and keeps their keys and values.
pub fn prefill(model: &Decoder, prompts: &[&[u32]]) -> Result<PromptKv> {
    let batch = Flat::new(prompts, &vec![0; prompts.len()], model.device())?;
    let mut attention = RaggedAttention::new(&batch.lengths, None).keeping();
    model.forward(&batch.tokens, &batch.positions, &mut attention, None)?;
    Ok(attention.into_kv())
}

/// Selects rows of `hidden` by index.
pub fn pick(hidden: &Tensor, rows: Vec<u32>) -> Result<Tensor> {
    let n = rows.len();
    hidden.index_select(&Tensor::from_vec(rows, n, hidden.device())?, 0)
}

/// Computes the loss of responses over the prompts' KV, summed over their tokens, and the number of these tokens.
///
/// The model reads tokens `0..m-1` of each response and predicts tokens `1..m`. The prefilling model predicts token 0.
pub fn respond(model: &Decoder, prompt: &PromptKv, responses: &[&[u32]]) -> Result<(Tensor, usize)> {
    let inputs: Vec<&[u32]> = responses.iter().map(|r| &r[..r.len().saturating_sub(1)]).collect();
    let batch = Flat::new(&inputs, &prompt.lengths, model.device())?;
    let mut attention = RaggedAttention::new(&batch.lengths, Some(prompt));
    let hidden = model.forward(&batch.tokens, &batch.positions, &mut attention, None)?;
    let targets: Vec<u32> = responses.iter().flat_map(|r| r.iter().skip(1).copied()).collect();
    Ok((model.cross_entropy(&hidden, &targets)?, targets.len()))
}
