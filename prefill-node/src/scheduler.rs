//! The prefill scheduler: it chooses the prompt tokens of the next step. Pure functions, without model, threads or
//! clock.

use std::{ops::Range, time::Duration};

use overfill_kv::{BLOCK_TOKENS, blocks_for};

/// Progress of a running prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptProgress {
    /// Number of leading tokens whose KV is computed or cached; a multiple of the block size.
    pub computed: usize,
    /// Length of the prompt in tokens; more than `computed`.
    pub total: usize,
    /// Maximum number of tokens in one chunk; at least one block.
    pub max_chunk: usize,
}

/// The part of a prompt that the next step computes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Index of the prompt among the running ones.
    pub job: usize,
    /// Token positions in the prompt.
    pub tokens: Range<usize>,
}

/// The measured prefill speed of this node, which determines the number of tokens in a step.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    tokens_per_second: Option<f64>,
}

/// Minimum number of tokens of a step, and the number in the first step. A smaller step would be inefficient, because
/// every step reads all weights.
const LEAST_STEP_TOKENS: usize = 64;

impl Pace {
    /// Records the time of a step with `tokens` tokens. Steps below `LEAST_STEP_TOKENS` are ignored.
    pub fn observe(&mut self, tokens: usize, took: Duration) {
        // A step with few tokens costs nearly as much as a full one, so its rate would be misleadingly low.
        if tokens >= LEAST_STEP_TOKENS && !took.is_zero() {
            self.tokens_per_second = Some(tokens as f64 / took.as_secs_f64());
        }
    }

    /// Number of tokens for a step of about `target`: whole blocks, at least `LEAST_STEP_TOKENS`, and at most
    /// `max_batch_tokens`.
    pub fn step_tokens(&self, target: Duration, max_batch_tokens: usize) -> usize {
        let tokens = self.tokens_per_second.map_or(0, |rate| (rate * target.as_secs_f64()) as usize);
        (tokens / BLOCK_TOKENS * BLOCK_TOKENS).max(LEAST_STEP_TOKENS).min(max_batch_tokens)
    }
}

/// Plans a batch of at most `max_batch_tokens` tokens. `jobs` are in order of arrival, the oldest first.
///
/// Half of the batch is reserved for the oldest prompt. The rest goes to the prompts with the fewest tokens left; ties
/// go to the older prompt. So a short prompt does not wait until a long one before it is done. And a prompt that has
/// become the oldest needs at most twice the steps that it would need alone, whatever arrives later.
///
/// A chunk ends at a block boundary or at the end of the prompt. So all blocks that a batch completes are whole, and
/// may be sent and cached. If the batch has room for at least one block, the oldest prompt always makes progress.
pub fn plan(jobs: impl IntoIterator<Item = PromptProgress>, max_batch_tokens: usize) -> Vec<Chunk> {
    let jobs: Vec<PromptProgress> = jobs.into_iter().collect();
    let mut shortest_first: Vec<usize> = (0..jobs.len()).collect();
    shortest_first.sort_by_key(|&job| jobs[job].total - jobs[job].computed);
    let oldest = (0..jobs.len().min(1)).map(|job| (job, oldest_share(max_batch_tokens)));
    let turns = oldest.chain(shortest_first.into_iter().map(|job| (job, usize::MAX)));

    let mut room = max_batch_tokens;
    let mut ends: Vec<usize> = jobs.iter().map(|job| job.computed).collect();
    for (job, most) in turns {
        let PromptProgress { computed, total, max_chunk } = jobs[job];
        let start = ends[job];
        let mut end = total.min(start + room.min(most)).min(computed.saturating_add(max_chunk));
        if end < total {
            end -= end % BLOCK_TOKENS;
        }
        if end > start {
            room -= end - start;
            ends[job] = end;
        }
    }
    let chunks = jobs.iter().zip(ends).enumerate();
    chunks
        .filter(|(_, (p, end))| *end > p.computed)
        .map(|(job, (p, end))| Chunk { job, tokens: p.computed..end })
        .collect()
}

/// Number of tokens of a batch that are reserved for the oldest prompt: half of the batch, and at least one block.
fn oldest_share(max_batch_tokens: usize) -> usize {
    (max_batch_tokens / 2).max(BLOCK_TOKENS)
}

/// Indices of the blocks of a prompt of `total` tokens that become final when the chunk `tokens` is computed.
pub fn final_blocks(tokens: &Range<usize>, total: usize) -> Range<usize> {
    let end = if tokens.end == total { blocks_for(total) } else { tokens.end / BLOCK_TOKENS };
    tokens.start / BLOCK_TOKENS..end
}

/// Number of leading blocks of a prompt that may come from the prefix cache. The block of the last token is excluded,
/// because the logits of the last token must be computed.
pub fn cacheable_blocks(prompt_tokens: usize) -> usize {
    prompt_tokens.saturating_sub(1) / BLOCK_TOKENS
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn job(computed: usize, total: usize) -> PromptProgress {
        PromptProgress { computed, total, max_chunk: usize::MAX }
    }

    #[test]
    fn steps_are_as_long_as_they_should() {
        let (mut pace, target) = (Pace::default(), Duration::from_millis(500));
        assert_eq!(pace.step_tokens(target, 512), 64);
        assert_eq!(pace.step_tokens(target, 32), 32);
        // 400 tokens per second.
        pace.observe(64, Duration::from_millis(160));
        assert_eq!(pace.step_tokens(target, 512), 192);
        // A step with so few tokens is ignored.
        pace.observe(5, Duration::from_millis(150));
        assert_eq!(pace.step_tokens(target, 512), 192);
        pace.observe(192, Duration::from_millis(20));
        assert_eq!(pace.step_tokens(target, 512), 512);
        // The minimum applies however slow the node is.
        pace.observe(512, Duration::from_secs(100));
        assert_eq!(pace.step_tokens(target, 512), 64);
    }

    fn chunk(job: usize, tokens: Range<usize>) -> Chunk {
        Chunk { job, tokens }
    }

    #[test]
    fn the_oldest_has_half_and_the_shortest_the_rest() {
        assert_eq!(plan([job(0, 500), job(0, 400), job(16, 40)], 64), [chunk(0, 0..32), chunk(2, 16..40)]);
        // 32 for the oldest, 5 for the short one, and 16 more for the oldest, which has fewer tokens left than the
        // third.
        assert_eq!(plan([job(0, 100), job(0, 5), job(0, 500)], 64), [chunk(0, 0..48), chunk(1, 0..5)]);
        assert_eq!(plan([job(0, 100)], 64), [chunk(0, 0..64)]);
        assert_eq!(plan([], 64), []);
    }

    #[test]
    fn a_batch_of_one_block_is_the_oldests() {
        assert_eq!(plan([job(32, 500), job(0, 5)], 16), [chunk(0, 32..48)]);
    }

    #[test]
    fn chunks_end_at_block_borders_or_the_prompts_end() {
        // 60 tokens are left after the first prompt. The short one needs 9; 48 of the other 51 are whole blocks.
        assert_eq!(plan([job(0, 4), job(0, 500), job(0, 9)], 64), [chunk(0, 0..4), chunk(1, 0..48), chunk(2, 0..9)]);
        assert_eq!(plan([PromptProgress { computed: 32, total: 90, max_chunk: 40 }], 512), [chunk(0, 32..64)]);
    }

    #[test]
    fn a_short_prompt_behind_a_long_one_takes_one_step() {
        assert_eq!(plan([job(0, 8000), job(0, 200)], 512), [chunk(0, 0..304), chunk(1, 0..200)]);
    }

    /// A prompt in the property tests.
    #[derive(Clone, Debug)]
    struct Prompt {
        total: usize,
        max_chunk: usize,
        computed: usize,
        watched: bool,
    }

    fn prompt() -> impl Strategy<Value = Prompt> {
        let max_chunk = prop_oneof![4 => Just(usize::MAX), 1 => Just(128_usize)];
        // Mostly short prompts, sometimes a long one.
        let total = prop_oneof![3 => 1..100_usize, 1 => 1..5000_usize];
        (total, max_chunk).prop_map(|(total, max_chunk)| Prompt { total, max_chunk, computed: 0, watched: false })
    }

    /// Plans one step, checks its invariants, and removes the prompts that are done.
    fn step(running: &mut Vec<Prompt>, room: usize) {
        let jobs =
            running.iter().map(|p| PromptProgress { computed: p.computed, total: p.total, max_chunk: p.max_chunk });
        let chunks = plan(jobs, room);
        assert!(chunks.iter().map(|c| c.tokens.len()).sum::<usize>() <= room, "more than {room}: {chunks:?}");
        assert!(chunks.is_sorted_by(|a, b| a.job < b.job), "not in order, or two chunks of a prompt: {chunks:?}");
        for Chunk { job, tokens } in chunks {
            let p = &mut running[job];
            assert_eq!(tokens.start, p.computed, "computed twice, or left out");
            assert!(tokens.end <= p.total && tokens.len() <= p.max_chunk, "{tokens:?} of {p:?}");
            assert!(tokens.end == p.total || tokens.end % BLOCK_TOKENS == 0, "{tokens:?} of {p:?}");
            p.computed = tokens.end;
        }
        running.retain(|p| p.computed < p.total);
    }

    proptest! {
        #[test]
        fn every_token_is_computed_once(mut running in vec(prompt(), 1..20), room in BLOCK_TOKENS..1000) {
            let steps: usize = running.iter().map(|p| blocks_for(p.total)).sum();
            // In each step, the oldest prompt advances by at least one block, or ends.
            for _ in 0..steps {
                step(&mut running, room);
            }
            prop_assert!(running.is_empty(), "after {steps} steps: {running:?}");
        }

        #[test]
        fn the_oldest_does_not_starve(
            oldest in prompt(),
            arrivals in vec(vec(prompt(), 0..4), 1..50),
            room in BLOCK_TOKENS..1000,
        ) {
            let share = oldest_share(room).min(oldest.max_chunk) / BLOCK_TOKENS * BLOCK_TOKENS;
            let most = oldest.total.div_ceil(share);
            let mut running = vec![Prompt { watched: true, ..oldest }];
            for arrived in arrivals.into_iter().cycle().take(most) {
                running.extend(arrived);
                running.truncate(16);
                step(&mut running, room);
            }
            prop_assert!(running.iter().all(|p| !p.watched), "after {most} steps: {:?}", running[0]);
        }
    }

    #[test]
    fn the_last_token_is_always_computed() {
        assert_eq!([0, 1, 16, 17, 32, 33].map(cacheable_blocks), [0, 0, 0, 1, 1, 2]);
    }

    #[test]
    fn a_partial_block_is_final_only_at_the_end() {
        assert_eq!(final_blocks(&(0..32), 40), 0..2);
        assert_eq!(final_blocks(&(32..40), 40), 2..3);
        assert_eq!(final_blocks(&(0..5), 5), 0..1);
    }
}
