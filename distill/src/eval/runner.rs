//! A model on the serving engine, and batches of any size on it.

use std::{path::Path, sync::Arc};

use anyhow::Result;
use overfill_kv::{BlockId, OutputToken, SamplingParams};
use overfill_model::{LayerSink, LoadOptions, Model, Outputs, SequenceSlice, Want, no_layers};

/// Maximum number of tokens per forward pass. Each may need a row of logits.
const MOST_ROWS: usize = 256;

/// A part of a sequence that a model computes. The KV of all earlier tokens is there.
#[derive(Clone, Copy)]
pub struct Span<'a> {
    /// Block table of the sequence.
    pub blocks: &'a [BlockId],
    /// Position of the first of `tokens`.
    pub start: usize,
    /// The tokens; may be none.
    pub tokens: &'a [u32],
    /// What is returned.
    pub want: Wanted<'a>,
}

/// What is returned for a [`Span`].
#[derive(Clone, Copy)]
pub enum Wanted<'a> {
    /// Nothing.
    Nothing,
    /// The log-probability of each of these tokens, and the most likely token in its place. Token `i` follows the span's
    /// token `i`. There are as many as the span has tokens.
    Scores(&'a [u32]),
    /// The most likely token after each of the last tokens of the span. The number of these tokens.
    Choose(usize),
}

impl<'a> Span<'a> {
    /// Parts of at most [`MOST_ROWS`] tokens, in order.
    fn parts(self) -> impl Iterator<Item = Span<'a>> {
        let cut = move |(i, tokens): (usize, &'a [u32])| {
            let from = i * MOST_ROWS;
            let end = from + tokens.len();
            let want = match self.want {
                Wanted::Nothing => Wanted::Nothing,
                Wanted::Scores(following) => Wanted::Scores(&following[from..end]),
                // The places in front of this part's end belong to earlier parts.
                Wanted::Choose(count) => {
                    Wanted::Choose((count + end).saturating_sub(self.tokens.len()).min(tokens.len()))
                }
            };
            Span { tokens, start: self.start + from, want, ..self }
        };
        self.tokens.chunks(MOST_ROWS).enumerate().map(cut)
    }
}

/// A model, and its KV.
pub struct Runner {
    model: Model,
    outputs: Outputs,
    layers: Arc<dyn LayerSink>,
    greedy: SamplingParams,
}

impl Runner {
    /// Loads a model with room for `kv_blocks` blocks of KV.
    pub fn load(folder: &Path, options: &LoadOptions, kv_blocks: usize) -> Result<Self> {
        let options = LoadOptions { max_rows: MOST_ROWS, max_sequences: MOST_ROWS, ..*options };
        Ok(Self {
            model: Model::load(folder, &options, kv_blocks)?,
            outputs: Outputs::default(),
            layers: no_layers(),
            greedy: SamplingParams::greedy(),
        })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Computes the spans, at most one of each sequence. Returns what each wants: one entry per token or place.
    pub fn run(&mut self, spans: &[Span<'_>]) -> Result<Vec<Vec<OutputToken>>> {
        let mut found = vec![Vec::new(); spans.len()];
        let (mut batch, mut rows) = (Vec::new(), 0);
        let parts = spans.iter().enumerate().flat_map(|(i, span)| span.parts().map(move |part| (i, part)));
        for (i, part) in parts {
            // A part after the first one of its span has a full part before it, so it never shares a batch with that.
            if rows + part.tokens.len() > MOST_ROWS {
                self.compute(&std::mem::take(&mut batch), &mut found)?;
                rows = 0;
            }
            rows += part.tokens.len();
            batch.push((i, part));
        }
        self.compute(&batch, &mut found)?;
        Ok(found)
    }

    fn compute(&mut self, batch: &[(usize, Span<'_>)], found: &mut [Vec<OutputToken>]) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        let mut slices = Vec::with_capacity(batch.len());
        for (_, Span { blocks, start, tokens, want }) in batch {
            let want = match *want {
                Wanted::Nothing | Wanted::Choose(0) => Want::Nothing,
                Wanted::Scores(following) => Want::Scores { following, top: 1, next: None },
                // Greedy decoding does not look at what precedes a place.
                Wanted::Choose(count) => Want::Each {
                    params: &self.greedy,
                    prompt: &[],
                    output: tokens,
                    count,
                    allowed: &[],
                    following: &[],
                },
            };
            slices.push(SequenceSlice { tokens, start: *start, blocks, want });
        }
        self.model.engine().run(&slices, &self.layers, &mut self.outputs)?;
        for (at, (i, part)) in batch.iter().enumerate() {
            match part.want {
                Wanted::Nothing => {}
                Wanted::Scores(_) => found[*i].extend(self.outputs.take_scores(at)),
                Wanted::Choose(_) => found[*i].extend(self.outputs.take_each(at)),
            }
        }
        Ok(())
    }
}

/// Copies the KV layers that the decode model uses, as a handoff does. The blocks have the same ids on both sides.
pub fn hand_over(full: &Model, decode: &Model, blocks: &[BlockId]) -> Result<()> {
    let (from, to) = (full.kv(), decode.kv());
    for (wire, layer) in decode.kv_schema().layers.iter().enumerate() {
        let mut bytes: Vec<Vec<u8>> = Vec::with_capacity(blocks.len());
        from.read(*layer as usize, blocks, &mut |_, block| bytes.push(block.to_vec()))?;
        to.write(wire, blocks, &mut |i, block| block.copy_from_slice(&bytes[i]))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_span_is_cut_without_a_gap() {
        let tokens: Vec<u32> = (0..600).collect();
        let span = |want| Span { blocks: &[], start: 7, tokens: &tokens, want };
        let parts: Vec<Span<'_>> = span(Wanted::Scores(&tokens)).parts().collect();
        let cut: Vec<(usize, usize)> = parts.iter().map(|part| (part.start, part.tokens.len())).collect();
        assert_eq!(cut, [(7, 256), (263, 256), (519, 88)]);
        assert!(parts.iter().all(|part| matches!(part.want, Wanted::Scores(f) if f == part.tokens)));
        let places = |count| -> Vec<usize> {
            let count_of = |part: Span<'_>| if let Wanted::Choose(count) = part.want { count } else { 0 };
            span(Wanted::Choose(count)).parts().map(count_of).collect()
        };
        assert_eq!(places(1), [0, 0, 1]);
        assert_eq!(places(100), [0, 12, 88]);
        assert_eq!(places(600), [256, 256, 88]);
    }
}
