//! Which tokens of which prompts are computed next. Pure: no model, no thread, no clock.

use std::ops::Range;

use overfill_kv::{BLOCK_TOKENS, blocks_for};

/// A running prompt, as the scheduler sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
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

/// Fills a batch of at most `max_batch_tokens`, first come, first served.
///
/// A chunk ends at a block's border or at the prompt's end, so whatever a batch completes are whole blocks: those may be
/// announced and cached. With at least a block of room, the first prompt always gets on.
pub fn plan(jobs: impl IntoIterator<Item = Progress>, max_batch_tokens: usize) -> Vec<Chunk> {
    let mut room = max_batch_tokens;
    let mut chunks = Vec::new();
    for (job, progress) in jobs.into_iter().enumerate() {
        let Progress { computed, total, max_chunk } = progress;
        let mut end = total.min(computed + room.min(max_chunk));
        if end < total {
            end -= end % BLOCK_TOKENS;
        }
        if end > computed {
            room -= end - computed;
            chunks.push(Chunk { job, tokens: computed..end });
        }
    }
    chunks
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
    use super::*;

    fn job(computed: usize, total: usize) -> Progress {
        Progress { computed, total, max_chunk: usize::MAX }
    }

    fn chunk(job: usize, tokens: Range<usize>) -> Chunk {
        Chunk { job, tokens }
    }

    #[test]
    fn several_prompts_share_a_batch_and_the_first_goes_first() {
        assert_eq!(
            plan([job(0, 20), job(16, 40), job(0, 500)], 64),
            [chunk(0, 0..20), chunk(1, 16..40), chunk(2, 0..16)]
        );
        assert_eq!(plan([job(0, 100), job(0, 5)], 64), [chunk(0, 0..64)]);
        assert_eq!(plan([], 64), []);
    }

    #[test]
    fn chunks_end_at_block_borders_or_the_prompts_end() {
        // 60 left after the first prompt: 48 are whole blocks, and the 12 go to whom they suffice.
        assert_eq!(plan([job(0, 4), job(0, 500), job(0, 9)], 64), [chunk(0, 0..4), chunk(1, 0..48), chunk(2, 0..9)]);
        assert_eq!(plan([Progress { computed: 32, total: 90, max_chunk: 40 }], 512), [chunk(0, 32..64)]);
    }

    #[test]
    fn every_prompt_is_computed_once_whatever_the_room() {
        for room in [16, 17, 31, 48, 512] {
            let totals = [1, 15, 16, 17, 200, 33];
            let mut computed = [0; 6];
            let mut open: Vec<usize> = (0..6).collect();
            while !open.is_empty() {
                let chunks = plan(open.iter().map(|&j| job(computed[j], totals[j])), room);
                assert!(!chunks.is_empty(), "no progress with room for {room}");
                assert!(chunks.iter().map(|c| c.tokens.len()).sum::<usize>() <= room);
                for c in chunks {
                    assert_eq!(c.tokens.start, computed[open[c.job]]);
                    computed[open[c.job]] = c.tokens.end;
                }
                open.retain(|&j| computed[j] < totals[j]);
            }
            assert_eq!(computed, totals);
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
