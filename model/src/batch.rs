//! Input and output of an engine: a ragged batch of sequences over paged KV, and what each slice requests.

use candle_core::bail;
use overfill_kv::{BLOCK_TOKENS, BlockId, OutputToken, SamplingParams, blocks_for};
use rayon::prelude::*;

use crate::{
    ModelError,
    sampler::{SamplingContext, TokenMask, report, sample},
};

/// The next tokens of one sequence in a batch.
#[derive(Clone, Copy, Debug)]
pub struct SequenceSlice<'a> {
    /// Token ids, at least one.
    pub tokens: &'a [u32],
    /// Position of `tokens[0]` in the sequence. The KV of all earlier tokens is already in the cache.
    pub start: usize,
    /// The sequence's block table, starting at position 0. It covers `start + tokens.len()` positions.
    pub blocks: &'a [BlockId],
    /// What the engine returns for these tokens.
    pub want: Want<'a>,
}

/// What an engine returns for a slice. The KV of the slice's tokens is written in every case.
#[derive(Clone, Copy, Debug)]
pub enum Want<'a> {
    /// Nothing. For a chunk of a prompt that is not the last one.
    Nothing,
    /// The token that follows the slice's last token.
    Next(Choice<'a>),
    /// Log-probabilities of given tokens, each at the position after one of the slice's tokens.
    Scores {
        /// `following[i]` is the token that follows the slice's token `i`. No longer than the slice.
        following: &'a [u32],
        /// Number of most likely alternatives to report for each token.
        top: u32,
        /// How to choose the token after the slice's last one; `None` unless the slice ends its prompt.
        next: Option<Choice<'a>>,
    },
    /// The tokens that the model chooses after each of the last tokens of the slice, each as if the slice ended there.
    Each {
        /// The request's sampling parameters.
        params: &'a SamplingParams,
        /// The request's prompt.
        prompt: &'a [u32],
        /// The output up to the end of the slice.
        output: &'a [u32],
        /// Number of tokens to choose; no more than the slice and the output have tokens, but for the prompt's last one.
        count: usize,
        /// The tokens allowed in each place; empty allows all.
        allowed: &'a [Vec<u32>],
        /// The token that another model has chosen in each place; empty, or `count` tokens. Their log-probabilities are
        /// reported as scores.
        following: &'a [u32],
    },
    /// Logits after the slice's last token. For tests, benchmarks and checks: the logits are copied to the host.
    LastLogits,
    /// Logits after every token of the slice. Also copied to the host.
    AllLogits,
}

/// How to choose a token.
#[derive(Clone, Copy, Debug)]
pub struct Choice<'a> {
    /// The request's sampling parameters.
    pub params: &'a SamplingParams,
    /// The tokens before it, and the tokens allowed at its position.
    pub context: SamplingContext<'a>,
}

impl Want<'_> {
    /// Index of the first of a slice's `count` tokens whose logits are computed; logits of all later tokens are
    /// computed too.
    pub(crate) fn first_row(&self, count: usize) -> usize {
        match self {
            Self::Nothing => count,
            Self::Next(_) | Self::LastLogits => count - 1,
            Self::AllLogits => 0,
            Self::Each { count: places, .. } => count - places,
            Self::Scores { following: [], next, .. } => count - usize::from(next.is_some()),
            Self::Scores { .. } => 0,
        }
    }
}

/// Results of a batch. Reuse one value for many batches, so that its buffers are reused.
#[derive(Clone, Debug, Default)]
pub struct Outputs {
    slices: Vec<Output>,
    logits: Logits,
}

#[derive(Clone, Debug, Default)]
struct Output {
    next: Option<OutputToken>,
    scores: Vec<OutputToken>,
    /// Tokens chosen in each place.
    each: Vec<OutputToken>,
    /// End of this slice's rows in the batch's logits.
    end: usize,
}

impl Outputs {
    /// Takes the token chosen after slice `i` of the batch.
    ///
    /// # Errors
    /// There is none: the slice did not request one, or the engine broke its contract. The caller must not go on with
    /// another slice's token.
    pub fn take_next(&mut self, i: usize) -> Result<OutputToken, ModelError> {
        self.slices.get_mut(i).and_then(|output| output.next.take()).ok_or(ModelError::NoToken { slice: i })
    }

    /// Takes the log-probabilities of given tokens that slice `i` requested; empty if it requested none.
    pub fn take_scores(&mut self, i: usize) -> Vec<OutputToken> {
        self.slices.get_mut(i).map(|output| std::mem::take(&mut output.scores)).unwrap_or_default()
    }

    /// Takes the tokens that slice `i` requested with [`Want::Each`]; empty if it requested none.
    pub fn take_each(&mut self, i: usize) -> Vec<OutputToken> {
        self.slices.get_mut(i).map(|output| std::mem::take(&mut output.each)).unwrap_or_default()
    }

    /// Logits of all slices that requested them, in batch order.
    pub fn logits(&self) -> &Logits {
        &self.logits
    }

    /// Chooses and scores tokens on the host. `logits` holds `vocab_size` values for each requested row, in batch
    /// order. Rows are distributed over rayon's threads.
    pub(crate) fn fill(&mut self, batch: &[SequenceSlice<'_>], logits: &[f32], vocab_size: usize) {
        self.fill_rest(batch, |_| None, logits, vocab_size);
    }

    /// Like [`Self::fill`], after a device has chosen tokens of its own: `chosen` takes what follows slice `i`. `logits` has
    /// the rows of the other slices only.
    pub(crate) fn fill_rest(
        &mut self,
        batch: &[SequenceSlice<'_>],
        mut chosen: impl FnMut(usize) -> Option<OutputToken>,
        logits: &[f32],
        vocab_size: usize,
    ) {
        self.slices.resize_with(batch.len(), Output::default);
        self.logits.values.clear();
        self.logits.vocab_size = vocab_size;
        let mut end = 0;
        for (i, (slice, output)) in batch.iter().zip(&mut self.slices).enumerate() {
            output.next = chosen(i);
            output.each.clear();
            if output.next.is_some() {
                output.scores.clear();
                continue;
            }
            let begin = end;
            end += slice.tokens.len() - slice.want.first_row(slice.tokens.len());
            output.end = end;
            let own = &logits[begin * vocab_size..end * vocab_size];
            match slice.want {
                Want::Scores { following, top, .. } => {
                    let rows = own.par_chunks_exact(vocab_size).zip(following);
                    rows.map(|(row, token)| report(row, *token, top)).collect_into_vec(&mut output.scores);
                }
                Want::Each { params, prompt, output: before, count, allowed, following } => {
                    let rows = own.par_chunks_exact(vocab_size).zip(following);
                    rows.map(|(row, token)| report(row, *token, 0)).collect_into_vec(&mut output.scores);
                    let rows = own.par_chunks_exact(vocab_size).enumerate();
                    let choose = |(place, row): (usize, &[f32])| {
                        let before = &before[..before.len() + 1 + place - count];
                        let allowed = allowed.get(place).map(|words| TokenMask { words });
                        sample(row, params, &SamplingContext { allowed, ..SamplingContext::following(prompt, before) })
                    };
                    rows.map(choose).collect_into_vec(&mut output.each);
                }
                Want::LastLogits | Want::AllLogits => {
                    output.scores.clear();
                    self.logits.values.extend_from_slice(own);
                }
                Want::Nothing | Want::Next(_) => output.scores.clear(),
            }
        }
        // Sampling is stateless, so tokens can be chosen in any order. With a large vocabulary, running in parallel
        // pays off.
        let rest = self.slices.par_iter_mut().zip(batch).filter(|(output, _)| output.next.is_none());
        rest.for_each(|(output, slice)| {
            let choice = match slice.want {
                Want::Next(choice) => Some(choice),
                Want::Scores { next, .. } => next,
                Want::Nothing | Want::Each { .. } | Want::LastLogits | Want::AllLogits => None,
            };
            output.next = choice.map(|Choice { params, context }| {
                sample(&logits[(output.end - 1) * vocab_size..][..vocab_size], params, &context)
            });
        });
    }
}

/// Logits on the host, f32.
#[derive(Clone, Debug, Default)]
pub struct Logits {
    values: Vec<f32>,
    vocab_size: usize,
}

impl Logits {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.values.len() / self.vocab_size.max(1)
    }

    /// Row `i`, `[vocab]`. Panics if there is no such row.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.vocab_size..][..self.vocab_size]
    }
}

/// Where a token's key and value are stored: a block and the token's index within it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) block: u32,
    pub(crate) token: u32,
}

impl Slot {
    /// The slot of a position in the sequence with block table `blocks`.
    pub(crate) fn of(blocks: &[BlockId], position: usize) -> Self {
        Self { block: blocks[position / BLOCK_TOKENS].0, token: (position % BLOCK_TOKENS) as u32 }
    }
}

/// Checks the batch: no empty slices, enough blocks, token ids within the vocabulary, no more scores than tokens.
pub(crate) fn check(batch: &[SequenceSlice<'_>], vocab_size: usize) -> candle_core::Result<()> {
    if batch.is_empty() {
        bail!("the batch has no slices");
    }
    for slice in batch {
        let (count, end) = (slice.tokens.len(), slice.start + slice.tokens.len());
        if count == 0 || slice.blocks.len() < blocks_for(end) {
            bail!("a slice of {count} tokens up to {end} has {} blocks", slice.blocks.len());
        }
        if let Some(token) = slice.tokens.iter().find(|t| **t as usize >= vocab_size) {
            bail!("token {token} is not in the vocabulary of {vocab_size}");
        }
        match slice.want {
            Want::Scores { following, .. } if following.len() > count => {
                bail!("{} scores are requested for a slice of {count} tokens", following.len());
            }
            Want::Each { count: places, output, .. } if places > count || places > output.len() + 1 => {
                bail!("{places} choices are requested after {count} tokens, {} of them output", output.len());
            }
            Want::Each { count: places, following, .. } if !following.is_empty() && following.len() != places => {
                bail!("{} scores are requested with {places} choices", following.len());
            }
            _ => {}
        }
    }
    Ok(())
}
