//! What engines compute: a ragged batch of sequences whose KV is paged, and what is asked of each.

use candle_core::{Result, bail};
use overfill_kv::{BLOCK_TOKENS, BlockId, OutputToken, SamplingParams, blocks_for};
use rayon::prelude::*;

use crate::sampler::{SamplingContext, report, sample};

/// The next tokens of one sequence in a batch.
#[derive(Clone, Copy, Debug)]
pub struct SequenceSlice<'a> {
    /// At least one.
    pub tokens: &'a [u32],
    /// Position of the first of them in the sequence. The KV of all tokens before it is in the cache.
    pub start: usize,
    /// The sequence's block table from position 0 on. It covers `start + tokens.len()` positions.
    pub blocks: &'a [BlockId],
    /// What the engine gives back for these tokens.
    pub want: Want<'a>,
}

/// What an engine gives back for a slice, beside its KV.
#[derive(Clone, Copy, Debug)]
pub enum Want<'a> {
    /// Nothing: a chunk of a prompt that goes on.
    Nothing,
    /// The token after the slice's last one.
    Next(Choice<'a>),
    /// Log-probabilities of the tokens that follow the slice's first, second, ... token.
    Scores {
        /// `following[i]` follows the slice's token `i`. At most as many as the slice has tokens.
        following: &'a [u32],
        /// Alternatives to report for each.
        top: u32,
        /// Where the slice ends its prompt: how the token after the last one is chosen.
        next: Option<Choice<'a>>,
    },
    /// Logits after the slice's last token. For tests, benches and checks: they cost a copy to the host.
    LastLogits,
    /// Logits after each of the slice's tokens, as above.
    AllLogits,
}

/// How a token is chosen.
#[derive(Clone, Copy, Debug)]
pub struct Choice<'a> {
    /// The request's parameters.
    pub params: &'a SamplingParams,
    /// What came before the token.
    pub context: SamplingContext<'a>,
}

impl Want<'_> {
    /// Which of a slice's `count` tokens have their logits computed: from this one on.
    pub(crate) fn first_row(&self, count: usize) -> usize {
        match self {
            Self::Nothing => count,
            Self::Next(_) | Self::LastLogits => count - 1,
            Self::AllLogits => 0,
            Self::Scores { following: [], next, .. } => count - usize::from(next.is_some()),
            Self::Scores { .. } => 0,
        }
    }
}

/// What a batch brought. One is used for many batches, so that its memory stays.
#[derive(Clone, Debug, Default)]
pub struct Outputs {
    slices: Vec<Output>,
    logits: Logits,
}

#[derive(Clone, Debug, Default)]
struct Output {
    next: Option<OutputToken>,
    scores: Vec<OutputToken>,
    /// Rows of logits up to the slice's last.
    end: usize,
}

impl Outputs {
    /// The token chosen after slice `i` of the batch, if the slice asked for one.
    pub fn take_next(&mut self, i: usize) -> Option<OutputToken> {
        self.slices.get_mut(i)?.next.take()
    }

    /// Log-probabilities of the tokens that follow those of slice `i`, as asked for.
    pub fn take_scores(&mut self, i: usize) -> Vec<OutputToken> {
        self.slices.get_mut(i).map(|output| std::mem::take(&mut output.scores)).unwrap_or_default()
    }

    /// Rows of the slices that asked for logits, in the order of the batch.
    pub fn logits(&self) -> &Logits {
        &self.logits
    }

    /// Chooses and scores on the host, from `logits`: a row of `vocab_size` for each row that the batch wants, in its
    /// order. Rows are shared out among the threads of rayon's pool.
    pub(crate) fn fill(&mut self, batch: &[SequenceSlice<'_>], logits: &[f32], vocab_size: usize) {
        self.slices.resize_with(batch.len(), Output::default);
        self.logits.values.clear();
        self.logits.vocab_size = vocab_size;
        let mut end = 0;
        for (slice, output) in batch.iter().zip(&mut self.slices) {
            let begin = end;
            end += slice.tokens.len() - slice.want.first_row(slice.tokens.len());
            output.end = end;
            let own = &logits[begin * vocab_size..end * vocab_size];
            match slice.want {
                Want::Scores { following, top, .. } => {
                    let rows = own.par_chunks_exact(vocab_size).zip(following);
                    rows.map(|(row, token)| report(row, *token, top)).collect_into_vec(&mut output.scores);
                }
                Want::LastLogits | Want::AllLogits => self.logits.values.extend_from_slice(own),
                Want::Nothing | Want::Next(_) => output.scores.clear(),
            }
        }
        // Stateless, so tokens may be chosen in any order. With a large vocabulary it is worth several processors.
        self.slices.par_iter_mut().zip(batch).for_each(|(output, slice)| {
            let choice = match slice.want {
                Want::Next(choice) => Some(choice),
                Want::Scores { next, .. } => next,
                Want::Nothing | Want::LastLogits | Want::AllLogits => None,
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
    /// How many rows.
    pub fn rows(&self) -> usize {
        self.values.len() / self.vocab_size.max(1)
    }

    /// One row, `[vocab]`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.vocab_size..][..self.vocab_size]
    }
}

/// Where a token's key and value go: a block, and the place in it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) block: u32,
    pub(crate) token: u32,
}

impl Slot {
    /// The slot of a position in the sequence that has these blocks.
    pub(crate) fn of(blocks: &[BlockId], position: usize) -> Self {
        Self { block: blocks[position / BLOCK_TOKENS].0, token: (position % BLOCK_TOKENS) as u32 }
    }
}

/// Checks what engines rely on.
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
        if let Want::Scores { following, .. } = slice.want
            && following.len() > count
        {
            bail!("{} scores are asked for of a slice of {count} tokens", following.len());
        }
    }
    Ok(())
}
