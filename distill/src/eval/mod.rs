//! Scores models on held-out prompts, on the serving engine: greedy exact match, cross-entropy, and agreement with the full
//! model's own answers. Pairs are scored in each mode.
//!
//! A greedy answer need not be written to know where it leaves a given text: that is the first token of the text that is
//! not the most likely one in its place, if the model reads the text. So most scores come from reading, which takes a
//! fraction of the time of writing. Mode exact is really run, and its answers are compared.

mod agreement;
pub mod cli;
mod runner;
mod stages;

use anyhow::{Result, bail, ensure};
use overfill_kv::{OutputToken, blocks_for};
use serde::{Deserialize, Serialize};

use crate::data::Example;

pub use agreement::{Agreement, Range};
pub use runner::hand_over;
pub use stages::{Drafting, Stages, Way};

/// Scores on held-out prompts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Fraction of responses that greedy decoding reproduces token for token, end-of-text token included.
    pub exact_match: f64,
    /// Mean cross-entropy in nats per response token. The first token of each response is excluded: prefill predicts
    /// it.
    pub cross_entropy: f64,
    /// Number of prompts.
    pub examples: usize,
}

/// All that is measured of one arm.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// Against the responses.
    pub score: Score,
    /// Against the full model's answers, if they are given.
    pub agreement: Option<Agreement>,
    /// What became of the drafts, in mode exact.
    pub drafting: Option<Drafting>,
}

/// Prompts with their responses, in batches of prompts of similar lengths.
pub struct Texts<'a> {
    pairs: Vec<(&'a [u32], &'a [u32])>,
    batch: usize,
    answer_tokens: Option<usize>,
}

impl<'a> Texts<'a> {
    /// The last response of every example. The full model's own answers have at most `answer_tokens` tokens, or as many as the
    /// response.
    ///
    /// # Errors
    /// An example has no prompt, or a response of less than two tokens.
    pub fn new(examples: &'a [Example], batch: usize, answer_tokens: Option<usize>) -> Result<Self> {
        let mut pairs: Vec<(&[u32], &[u32])> = examples.iter().map(Example::last_response).collect();
        if pairs.is_empty() || pairs.iter().any(|(prompt, response)| prompt.is_empty() || response.len() < 2) {
            bail!("every example needs a prompt and a response of two tokens or more");
        }
        pairs.sort_by_key(|(prompt, _)| prompt.len());
        Ok(Self { pairs, batch: batch.max(1), answer_tokens })
    }

    /// Number of tokens of the longest prompt with what follows.
    pub fn most_tokens(&self) -> usize {
        self.pairs.iter().map(|pair| pair.0.len() + self.room(pair)).max().unwrap_or(0)
    }

    /// Number of KV blocks that a batch needs.
    pub fn kv_blocks(&self) -> usize {
        let blocks = |pairs: &[(&[u32], &[u32])]| {
            pairs.iter().map(|pair| blocks_for(pair.0.len() + self.room(pair))).sum::<usize>()
        };
        self.pairs.chunks(self.batch).map(blocks).max().unwrap_or(0)
    }

    fn answer_tokens(&self, (_, response): &(&[u32], &[u32])) -> usize {
        self.answer_tokens.unwrap_or(response.len())
    }

    fn room(&self, pair: &(&[u32], &[u32])) -> usize {
        self.answer_tokens(pair).max(pair.1.len())
    }

    /// Calls `f` for each batch, prefilled, with its place among all texts, its prompts and its responses.
    fn each_batch(
        &self,
        stages: &mut Stages,
        mut f: impl FnMut(&mut Stages, std::ops::Range<usize>, &[&[u32]], &[&[u32]]) -> Result<()>,
    ) -> Result<()> {
        for (i, pairs) in self.pairs.chunks(self.batch).enumerate() {
            let (prompts, responses): (Vec<&[u32]>, Vec<&[u32]>) = pairs.iter().copied().unzip();
            let room: Vec<usize> = pairs.iter().map(|pair| self.room(pair)).collect();
            stages.prefill(&prompts, &room)?;
            let start = i * self.batch;
            f(stages, start..start + pairs.len(), &prompts, &responses)?;
        }
        Ok(())
    }

    /// The greedy answer to each prompt of the first model of `stages`, alone.
    ///
    /// # Errors
    /// The computation failed.
    pub fn answers(&self, stages: &mut Stages) -> Result<Vec<Vec<u32>>> {
        let mut answers = Vec::with_capacity(self.pairs.len());
        let stop = stages.eos_token_ids();
        self.each_batch(stages, |stages, places, prompts, _| {
            let most: Vec<usize> = self.pairs[places].iter().map(|pair| self.answer_tokens(pair)).collect();
            answers.extend(stages.write(Way::Alone, prompts, &most, &stop)?.0);
            Ok(())
        })?;
        Ok(answers)
    }

    /// Scores each way of answering. `answers`: the full model's, from [`Self::answers`].
    ///
    /// # Errors
    /// There is no decode model and a way needs one, or the computation failed.
    pub fn measure(&self, stages: &mut Stages, ways: &[Way], answers: Option<&[Vec<u32>]>) -> Result<Vec<Measured>> {
        ensure!(
            answers.is_none_or(|answers| answers.len() == self.pairs.len()),
            "there is not one answer for each prompt"
        );
        let mut tallies: Vec<Tally> = ways.iter().map(|_| Tally::default()).collect();
        let stop = stages.eos_token_ids();
        self.each_batch(stages, |stages, places, prompts, responses| {
            let answers = answers.map(|answers| &answers[places.clone()]);
            for (way, tally) in ways.iter().zip(&mut tallies) {
                let scores = stages.read(*way, prompts, responses)?;
                tally.read(&scores);
                if let Way::Exact { .. } = way {
                    let most: Vec<usize> = self.pairs[places.clone()].iter().map(|pair| self.room(pair)).collect();
                    let (written, drafting) = stages.write(*way, prompts, &most, &stop)?;
                    tally.drafting.get_or_insert_default().add(&drafting);
                    for (i, written) in written.iter().enumerate() {
                        tally.exact += usize::from(written == upto(responses[i], &stop));
                        if let Some(answers) = answers {
                            let same = answers[i].iter().enumerate().map(|(at, token)| written.get(at) == Some(token));
                            tally.agreed.push(same.collect());
                        }
                    }
                    continue;
                }
                for (scores, response) in scores.iter().zip(responses) {
                    let served = upto(response, &stop);
                    tally.exact += usize::from(agreed(scores, served).all(|same| same));
                }
                if let Some(answers) = answers {
                    let texts: Vec<&[u32]> = answers.iter().map(Vec::as_slice).collect();
                    let scores = stages.read(*way, prompts, &texts)?;
                    tally.agreed.extend(scores.iter().zip(texts).map(|(scores, text)| agreed(scores, text).collect()));
                }
            }
            Ok(())
        })?;
        Ok(tallies.into_iter().map(|tally| tally.finish(self.pairs.len(), answers.is_some())).collect())
    }

    /// Scores one way of answering against the responses.
    ///
    /// # Errors
    /// As [`Self::measure`].
    pub fn score(&self, stages: &mut Stages, way: Way) -> Result<Score> {
        let measured = self.measure(stages, &[way], None)?;
        Ok(measured[0].score)
    }
}

/// The response up to its first end-of-text token, where serving ends. Chat templates may add tokens behind it.
fn upto<'t>(response: &'t [u32], stop: &[u32]) -> &'t [u32] {
    let end = response.iter().position(|token| stop.contains(token)).map_or(response.len(), |at| at + 1);
    &response[..end]
}

/// Whether each token of `text` is the most likely one in its place.
fn agreed<'t>(scores: &'t [OutputToken], text: &'t [u32]) -> impl Iterator<Item = bool> + 't {
    text.iter().zip(scores).map(|(token, scored)| scored.top.first().is_some_and(|(best, _)| best == token))
}

/// Sums over batches.
#[derive(Default)]
struct Tally {
    exact: usize,
    nats: f64,
    tokens: usize,
    agreed: Vec<Vec<bool>>,
    drafting: Option<Drafting>,
}

impl Tally {
    fn read(&mut self, scores: &[Vec<OutputToken>]) {
        for scored in scores.iter().flat_map(|scores| &scores[1..]) {
            self.nats -= f64::from(scored.logprob);
            self.tokens += 1;
        }
    }

    fn finish(self, examples: usize, has_answers: bool) -> Measured {
        let Self { exact, nats, tokens, agreed, drafting } = self;
        let score =
            Score { exact_match: exact as f64 / examples as f64, cross_entropy: nats / tokens as f64, examples };
        Measured { score, agreement: has_answers.then(|| Agreement::of(&agreed)), drafting }
    }
}
