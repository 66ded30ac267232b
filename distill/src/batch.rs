//! Rectangular batches of token rows, and the forward passes shared by training and evaluation.

use candle_core::{Result, Tensor};
use overfill_model::Decoder;

use crate::attention::{DenseAttention, PromptKv};

/// Rows of tokens, padded at the end to the same length.
pub struct Rectangle {
    /// Token ids, `[rows * columns]`, u32.
    pub tokens: Tensor,
    /// Position of each token in its sequence.
    pub positions: Vec<u32>,
    /// Number of rows.
    pub rows: usize,
    /// Tokens per row, padding included.
    pub columns: usize,
    /// Valid tokens per row.
    pub lengths: Vec<usize>,
}

impl Rectangle {
    /// Pads `rows`. The first token of row `i` has position `starts[i]`.
    pub fn new(rows: &[&[u32]], starts: &[usize], device: &candle_core::Device) -> Result<Self> {
        let lengths: Vec<usize> = rows.iter().map(|row| row.len()).collect();
        let columns = lengths.iter().copied().max().unwrap_or(0).max(1);
        let mut tokens = Vec::with_capacity(rows.len() * columns);
        let mut positions = Vec::with_capacity(rows.len() * columns);
        for (row, start) in rows.iter().zip(starts) {
            tokens.extend_from_slice(row);
            tokens.resize(tokens.len() + columns - row.len(), 0);
            positions.extend((*start..start + columns).map(|p| p as u32));
        }
        let n = tokens.len();
        Ok(Self { tokens: Tensor::from_vec(tokens, n, device)?, positions, rows: rows.len(), columns, lengths })
    }
}

/// Result of prefilling a batch of prompts.
pub struct Prefilled {
    /// Keys and values of the prompts.
    pub kv: PromptKv,
}

/// Runs prompts through a model and keeps their keys and values.
pub fn prefill(model: &Decoder, prompts: &[&[u32]]) -> Result<Prefilled> {
    let batch = Rectangle::new(prompts, &vec![0; prompts.len()], model.device())?;
    let mut attention = DenseAttention::new(batch.rows, batch.columns, None).keeping();
    model.forward(&batch.tokens, &batch.positions, &mut attention, None)?;
    Ok(Prefilled { kv: attention.into_prompt(batch.lengths) })
}

/// Selects rows of `hidden` by index.
pub fn pick(hidden: &Tensor, rows: Vec<u32>) -> Result<Tensor> {
    let n = rows.len();
    hidden.index_select(&Tensor::from_vec(rows, n, hidden.device())?, 0)
}

/// Computes teacher-forced logits of responses over the prompts' KV.
///
/// The model reads tokens `0..m-1` of each response and predicts tokens `1..m`. The prefilling model predicts token 0.
/// Returns the logits of all rows, concatenated, and their targets.
pub fn respond(model: &Decoder, prompt: &PromptKv, responses: &[&[u32]]) -> Result<(Tensor, Vec<u32>)> {
    let inputs: Vec<&[u32]> = responses.iter().map(|r| &r[..r.len().saturating_sub(1)]).collect();
    let batch = Rectangle::new(&inputs, &prompt.lengths, model.device())?;
    let mut attention = DenseAttention::new(batch.rows, batch.columns, Some(prompt));
    let hidden = model.forward(&batch.tokens, &batch.positions, &mut attention, None)?;
    let rows = |(r, n): (usize, &usize)| (r * batch.columns..r * batch.columns + n).map(|i| i as u32);
    let predicting: Vec<u32> = batch.lengths.iter().enumerate().flat_map(rows).collect();
    let targets = responses.iter().flat_map(|r| r.iter().skip(1).copied()).collect();
    Ok((model.logits(&pick(&hidden, predicting)?)?, targets))
}
