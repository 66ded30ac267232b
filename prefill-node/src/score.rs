//! Scores: what the full model says about an output that the decode model has written. They run while the node has nothing
//! else to compute, one at a time.

use std::{collections::VecDeque, ops::Range, sync::Arc};

use overfill_kv::{
    BLOCK_TOKENS, BlockHash, BlockId, BlockLease, BlockPool, OutputToken, RequestId, SamplingParams, blocks_for,
};
use overfill_model::{ModelError, Want};
use tokio::{sync::oneshot, time::Instant};

use crate::compute::Compute;

/// Maximum number of scores that wait. Each holds the tokens of a sequence, and no KV.
pub const MAX_WAITING_SCORES: usize = 64;

/// Maximum number of tokens in one step of a score. Each scored token needs a row of logits, which takes 0.5 MB at a
/// vocabulary of 128 k. A prompt that arrives waits for the step.
const STEP_TOKENS: usize = 128;

/// A checked request to score an output.
#[derive(Clone, Debug)]
pub struct ScoreRequest {
    /// Id of the request that had the output.
    pub id: RequestId,
    /// Prompt and output.
    pub tokens: Vec<u32>,
    /// Number of tokens at the end of `tokens` that are output; at least one, and fewer than there are tokens.
    pub generated: usize,
    /// The output's sampling parameters.
    pub sampling: SamplingParams,
    /// Time at which the score fails if it has not ended.
    pub deadline: Instant,
}

impl ScoreRequest {
    /// The prompt.
    pub fn prompt(&self) -> &[u32] {
        &self.tokens[..self.prompt_tokens()]
    }

    fn prompt_tokens(&self) -> usize {
        self.tokens.len() - self.generated
    }
}

/// The result of a score. Both lists have one element per token of the output.
#[derive(Clone, Debug, Default)]
pub struct Scored {
    /// What the full model would have chosen.
    pub choices: Vec<OutputToken>,
    /// The output's tokens with their log-probabilities under the full model.
    pub logprobs: Vec<OutputToken>,
}

/// Why there is no score.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScoreError {
    /// Too many scores wait.
    #[error("{MAX_WAITING_SCORES} scores are waiting")]
    QueueFull,
    /// Prompts need the KV blocks.
    #[error("the score has made room for prompts")]
    Evicted,
    /// The computation failed.
    #[error("computing a score: {0}")]
    Failed(String),
}

/// Receives a score.
pub type ScoreReply = oneshot::Sender<Result<Scored, ScoreError>>;

/// A score in the engine's queue.
pub struct Score {
    /// The request.
    pub request: ScoreRequest,
    /// Hashes of the prompt's full blocks, which may be in the prefix cache.
    pub hashes: Vec<BlockHash>,
    /// Receives the result. It is closed when the requester has left.
    pub reply: ScoreReply,
}

impl Score {
    fn is_over(&self) -> bool {
        self.reply.is_closed() || Instant::now() >= self.request.deadline
    }

    fn end(self, result: Result<Scored, ScoreError>) {
        // A requester that has left needs no answer.
        let _ = self.reply.send(result);
    }
}

/// The part of a score that one step computes.
pub struct ScoreChunk<'a> {
    /// The score's request.
    pub request: &'a ScoreRequest,
    /// Blocks of the sequence, in order of position.
    pub blocks: &'a [BlockId],
    /// Token positions in the sequence.
    pub tokens: Range<usize>,
}

impl ScoreChunk<'_> {
    /// Positions of the output's tokens that the chunk's last tokens predict.
    pub fn scored(&self) -> Range<usize> {
        (self.tokens.start + 1).max(self.request.prompt_tokens())..self.tokens.end + 1
    }

    /// What the engine returns for the chunk: a choice and a log-probability for each position in [`Self::scored`].
    pub(crate) fn want(&self) -> Want<'_> {
        let (scored, prompt_tokens) = (self.scored(), self.request.prompt_tokens());
        if scored.is_empty() {
            return Want::Nothing;
        }
        let (prompt, output) = self.request.tokens.split_at(prompt_tokens);
        Want::Each {
            params: &self.request.sampling,
            prompt,
            output: &output[..self.tokens.end - prompt_tokens],
            count: scored.len(),
            allowed: &[],
            following: &self.request.tokens[scored],
        }
    }
}

/// The score that is computed.
struct Active {
    score: Score,
    lease: Arc<BlockLease>,
    /// Number of leading tokens whose KV is computed or cached.
    computed: usize,
    scored: Scored,
}

impl Active {
    /// Takes the blocks of a score. `None` if too few are available.
    fn begin(score: &Score, pool: &BlockPool) -> Option<(Arc<BlockLease>, usize)> {
        // The last token of the prompt predicts the first one of the output, so its block must be computed.
        let cacheable = (score.request.prompt_tokens() - 1) / BLOCK_TOKENS;
        let mut lease = pool.lookup(&score.hashes[..cacheable.min(score.hashes.len())]);
        let cached = lease.len();
        lease.append(pool.allocate(blocks_for(score.request.tokens.len() - 1) - cached).ok()?);
        Some((Arc::new(lease), cached * BLOCK_TOKENS))
    }
}

/// The scores of an engine.
#[derive(Default)]
pub struct Scores {
    waiting: VecDeque<Score>,
    active: Option<Active>,
}

impl Scores {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.active.is_none()
    }

    /// Queues a score, or refuses it.
    pub fn push(&mut self, score: Score) {
        if self.waiting.len() < MAX_WAITING_SCORES {
            self.waiting.push_back(score);
        } else {
            score.end(Err(ScoreError::QueueFull));
        }
    }

    /// Drops scores whose requesters have left or whose deadlines have passed.
    pub fn settle(&mut self) {
        self.waiting.retain(|score| !score.is_over());
        self.active.take_if(|active| active.score.is_over());
    }

    /// Ends the score that is computed, to make room. Returns false if there is none.
    pub fn evict(&mut self) -> bool {
        let active = self.active.take();
        active.map(|active| active.score.end(Err(ScoreError::Evicted))).is_some()
    }

    /// Ends all scores: the node is about to leave.
    pub fn clear(&mut self) {
        self.evict();
        self.waiting.drain(..).for_each(|score| score.end(Err(ScoreError::Evicted)));
    }

    /// Computes the next chunk of a score, if there is one.
    ///
    /// # Errors
    /// The device is lost. The score has failed with it, as with other errors of the model.
    pub fn step(&mut self, compute: &mut impl Compute, pool: &BlockPool) -> Result<(), ModelError> {
        if self.active.is_none() {
            let Some(score) = self.waiting.pop_front() else { return Ok(()) };
            match Active::begin(&score, pool) {
                Some((lease, computed)) => {
                    self.active = Some(Active { score, lease, computed, scored: Scored::default() });
                }
                None => score.end(Err(ScoreError::Evicted)),
            }
        }
        let Some(mut active) = self.active.take() else { return Ok(()) };
        let request = &active.score.request;
        // Nothing follows the last token.
        let all = request.tokens.len() - 1;
        let tokens = active.computed..all.min(active.computed + STEP_TOKENS);
        let chunk = ScoreChunk { request, blocks: active.lease.blocks(), tokens: tokens.clone() };
        match compute.score(&chunk, &active.lease) {
            Ok(Scored { choices, logprobs }) => {
                active.scored.choices.extend(choices);
                active.scored.logprobs.extend(logprobs);
                active.computed = tokens.end;
                if tokens.end == all {
                    active.score.end(Ok(active.scored));
                } else {
                    self.active = Some(active);
                }
                Ok(())
            }
            Err(e) => {
                active.score.end(Err(ScoreError::Failed(e.to_string())));
                if e.is_lost_device() { Err(e) } else { Ok(()) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use overfill_model::LayerSink;

    use super::*;
    use crate::compute::{ChunkOutput, PromptChunk};

    /// A model that chooses, after a token, the next number.
    #[derive(Default)]
    struct Counting(Vec<Range<usize>>);

    impl Compute for Counting {
        fn step(&mut self, _: &[PromptChunk<'_>], _: Arc<dyn LayerSink>) -> Result<Vec<ChunkOutput>, ModelError> {
            unreachable!("only scores are computed")
        }

        fn score(&mut self, chunk: &ScoreChunk<'_>, _: &Arc<BlockLease>) -> Result<Scored, ModelError> {
            self.0.push(chunk.tokens.clone());
            let token = |token, logprob| OutputToken { token, logprob, top: Vec::new() };
            let tokens = &chunk.request.tokens;
            Ok(Scored {
                choices: chunk.scored().map(|at| token(tokens[at - 1] + 1, 0.0)).collect(),
                logprobs: chunk.scored().map(|at| token(tokens[at], at as f32)).collect(),
            })
        }
    }

    fn score(tokens: Vec<u32>, generated: usize) -> (Score, oneshot::Receiver<Result<Scored, ScoreError>>) {
        let (reply, result) = oneshot::channel();
        let request = ScoreRequest {
            id: RequestId("r".into()),
            tokens,
            generated,
            sampling: SamplingParams::greedy(),
            deadline: Instant::now() + std::time::Duration::from_secs(60),
        };
        (Score { request, hashes: Vec::new(), reply }, result)
    }

    #[test]
    fn each_token_of_the_output_is_scored_once() {
        let pool = BlockPool::new(32);
        // Chunks of 128 tokens end before, at and behind the prompt's end, and there are outputs of one token.
        for (prompt, generated) in [(1, 1), (1, 300), (127, 2), (128, 1), (129, 130), (300, 1), (300, 90)] {
            let (mut scores, mut compute) = (Scores::default(), Counting::default());
            let tokens: Vec<u32> = (0..prompt + generated).collect();
            let (score, mut result) = score(tokens.clone(), generated as usize);
            scores.push(score);
            while !scores.is_empty() {
                scores.step(&mut compute, &pool).unwrap();
            }
            let scored = result.try_recv().unwrap().unwrap();
            let ids = |tokens: &[OutputToken]| tokens.iter().map(|t| t.token).collect::<Vec<_>>();
            assert_eq!(ids(&scored.choices), tokens[prompt as usize..], "{prompt} + {generated}");
            assert_eq!(ids(&scored.logprobs), tokens[prompt as usize..], "{prompt} + {generated}");
            assert!(compute.0.iter().all(|chunk| chunk.len() <= STEP_TOKENS), "{:?}", compute.0);
            assert_eq!(compute.0.iter().map(Range::len).sum::<usize>(), tokens.len() - 1);
            assert_eq!(pool.available(), 32);
        }
    }

    #[test]
    fn scores_without_room_end_and_hold_nothing() {
        let (pool, mut compute) = (BlockPool::new(20), Counting::default());
        let mut scores = Scores::default();
        let (too_long, mut first) = score((0..400).collect(), 10);
        let (evicted, mut second) = score((0..300).collect(), 10);
        scores.push(too_long);
        scores.push(evicted);
        scores.step(&mut compute, &pool).unwrap();
        assert_eq!(first.try_recv().unwrap().unwrap_err(), ScoreError::Evicted);
        scores.step(&mut compute, &pool).unwrap();
        assert_eq!(pool.available(), 1);
        assert!(scores.evict() && !scores.evict());
        assert_eq!(second.try_recv().unwrap().unwrap_err(), ScoreError::Evicted);
        assert_eq!(pool.available(), 20);
        for _ in 0..MAX_WAITING_SCORES {
            let (score, result) = score(vec![1, 2], 1);
            scores.push(score);
            drop(result);
        }
        let (refused, mut result) = score(vec![1, 2], 1);
        scores.push(refused);
        assert_eq!(result.try_recv().unwrap().unwrap_err(), ScoreError::QueueFull);
        scores.settle();
        assert!(scores.is_empty(), "the requesters have left");
    }
}
