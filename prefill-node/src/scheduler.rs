//! Which tokens of which prompts are computed next. Pure: no model, no thread, no clock.

use std::{ops::Range, time::Duration};

use overfill_kv::{BLOCK_TOKENS, blocks_for};

/// A running prompt, as the scheduler sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptProgress {
    /// Tokens whose KV is there; a multiple of the block size.
    pub computed: usize,
    /// Tokens of the prompt; more than `computed`.
    pub total: usize,
    /// Most tokens in one chunk; at least a block.
    pub max_chunk: usize,
}

/// Part of a prompt in the next batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Index of the prompt among the running ones.
    pub job: usize,
    /// Token positions.
    pub tokens: Range<usize>,
}

/// How fast this node computes prompts, and so how many tokens a step of a given length has.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    tokens_per_second: Option<f64>,
}

/// Tokens of a step, at least: with fewer, a step reads all weights for too little. Also those of a first step.
const LEAST_STEP_TOKENS: usize = 64;

impl Pace {
    /// Takes in a step's time.
    pub fn observe(&mut self, tokens: usize, took: Duration) {
        // The end of a prompt alone says little: it costs nearly what a step costs that is full.
        if tokens >= LEAST_STEP_TOKENS && !took.is_zero() {
            self.tokens_per_second = Some(tokens as f64 / took.as_secs_f64());
        }
    }

    /// Tokens of a step that takes about `target`; whole blocks, and at most `max_batch_tokens`.
    pub fn step_tokens(&self, target: Duration, max_batch_tokens: usize) -> usize {
        let tokens = self.tokens_per_second.map_or(0, |rate| (rate * target.as_secs_f64()) as usize);
        (tokens / BLOCK_TOKENS * BLOCK_TOKENS).max(LEAST_STEP_TOKENS).min(max_batch_tokens)
    }
}

/// Fills a batch of at most `max_batch_tokens`. `jobs` are in order of arrival, the oldest first.
///
/// The oldest prompt has half of the batch for itself, the other half and what is left goes to the prompts with the
/// least work left, the older first among equals. So a short prompt does not wait for all of a long one before it; and
/// whatever comes after it, a prompt that has become the oldest takes at most twice the steps that it would take alone.
///
/// A chunk ends at a block's border or at the prompt's end, so whatever a batch completes are whole blocks: those may be
/// announced and cached. With at least a block of room, the oldest prompt always gets on.
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

/// Tokens of a batch that the oldest prompt has for itself: half, and at least a block.
fn oldest_share(max_batch_tokens: usize) -> usize {
    (max_batch_tokens / 2).max(BLOCK_TOKENS)
}

/// Blocks of a prompt of `total` tokens that are final once the chunk `tokens` is computed.
pub fn final_blocks(tokens: &Range<usize>, total: usize) -> Range<usize> {
    let end = if tokens.end == total { blocks_for(total) } else { tokens.end / BLOCK_TOKENS };
    tokens.start / BLOCK_TOKENS..end
}

/// Leading blocks of a prompt that may come from the prefix cache: never the last token's, whose logits are needed.
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
        // So few say nothing.
        pace.observe(5, Duration::from_millis(150));
        assert_eq!(pace.step_tokens(target, 512), 192);
        pace.observe(192, Duration::from_millis(20));
        assert_eq!(pace.step_tokens(target, 512), 512);
        // However slow a node is.
        pace.observe(512, Duration::from_secs(100));
        assert_eq!(pace.step_tokens(target, 512), 64);
    }

    fn chunk(job: usize, tokens: Range<usize>) -> Chunk {
        Chunk { job, tokens }
    }

    #[test]
    fn the_oldest_has_half_and_the_shortest_the_rest() {
        assert_eq!(plan([job(0, 500), job(0, 400), job(16, 40)], 64), [chunk(0, 0..32), chunk(2, 16..40)]);
        // 32 for the oldest, 5 for the short one, 16 more for the oldest: it, too, has less left than the third.
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
        // 60 left after the first prompt: 9 suffice for the short one, of the other 51 are 48 whole blocks.
        assert_eq!(plan([job(0, 4), job(0, 500), job(0, 9)], 64), [chunk(0, 0..4), chunk(1, 0..48), chunk(2, 0..9)]);
        assert_eq!(plan([PromptProgress { computed: 32, total: 90, max_chunk: 40 }], 512), [chunk(0, 32..64)]);
    }

    #[test]
    fn a_short_prompt_behind_a_long_one_takes_one_step() {
        assert_eq!(plan([job(0, 8000), job(0, 200)], 512), [chunk(0, 0..304), chunk(1, 0..200)]);
    }

    /// A prompt of a simulated node.
    #[derive(Clone, Debug)]
    struct Prompt {
        total: usize,
        max_chunk: usize,
        computed: usize,
        watched: bool,
    }

    fn prompt() -> impl Strategy<Value = Prompt> {
        let max_chunk = prop_oneof![4 => Just(usize::MAX), 1 => Just(128_usize)];
        // Mostly short ones, now and then a long one.
        let total = prop_oneof![3 => 1..100_usize, 1 => 1..5000_usize];
        (total, max_chunk).prop_map(|(total, max_chunk)| Prompt { total, max_chunk, computed: 0, watched: false })
    }

    /// One step; checks what holds in each. Prompts that are done leave.
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
            // The oldest gets on by a block in each, or ends.
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
