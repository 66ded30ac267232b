//! Sliding windows of layers, in whole blocks: which blocks of a sequence a decode node needs.

use std::ops::Range;

use crate::{BLOCK_TOKENS, KvSchema, blocks_for};

/// The sliding windows of a model's layers.
///
/// A layer with a window of `w` tokens attends from position `p` to positions `p + 1 - w` to `p`. So the blocks before them
/// are needed neither for `p` nor for any later position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    /// The shortest one; `usize::MAX` if there is none.
    shortest: usize,
    /// The longest one; `usize::MAX` if there is none.
    longest: usize,
    /// Whether every layer has one.
    everywhere: bool,
}

impl Windows {
    /// Every layer attends to all tokens.
    pub const NONE: Self = Self { shortest: usize::MAX, longest: usize::MAX, everywhere: false };

    /// Index of the first block that any layer needs at `position` and later.
    pub fn needed_from(self, position: usize) -> usize {
        if self.everywhere { first_visible_block(self.longest, position) } else { 0 }
    }

    /// Index of the first block that a layer with a window needs at `position` and later; 0 if no layer has one. Only layers
    /// without windows need earlier blocks.
    pub fn windowed_from(self, position: usize) -> usize {
        first_visible_block(self.longest, position)
    }

    /// Index of the first block that every layer needs at `position`.
    pub fn complete_from(self, position: usize) -> usize {
        first_visible_block(self.shortest, position)
    }

    /// Number of leading blocks of a prompt that a decode node has no use for. It is less than the prompt's blocks, so that
    /// every handoff sends and verifies a block.
    pub fn unneeded_blocks(self, prompt_tokens: usize) -> usize {
        self.needed_from(prompt_tokens).min(blocks_for(prompt_tokens).saturating_sub(1))
    }

    /// Number of blocks that a decode node keeps of a sequence of `tokens` tokens.
    pub fn needed_blocks(self, tokens: usize) -> usize {
        blocks_for(tokens) - self.unneeded_blocks(tokens)
    }

    /// Number of tokens of a sequence that a decode node with `blocks` blocks can keep, as far as blocks limit it.
    pub fn max_context_tokens(self, blocks: usize) -> usize {
        // The longest window covers most blocks if it begins with the last token of a block.
        let most = self.longest.saturating_add(BLOCK_TOKENS - 2) / BLOCK_TOKENS + 1;
        if self.everywhere && most <= blocks { usize::MAX } else { blocks * BLOCK_TOKENS }
    }
}

/// Index of the block with the first token that a layer with a window of `window` tokens attends to from `position`.
fn first_visible_block(window: usize, position: usize) -> usize {
    (position + 1).saturating_sub(window) / BLOCK_TOKENS
}

impl KvSchema {
    /// The windows of the layers.
    pub fn windows(&self) -> Windows {
        let windows = || self.layer_attention.iter().filter_map(|layer| layer.window);
        Windows {
            shortest: windows().min().unwrap_or(usize::MAX),
            longest: windows().max().unwrap_or(usize::MAX),
            everywhere: !self.layer_attention.is_empty() && windows().count() == self.layer_attention.len(),
        }
    }

    /// For each layer, the blocks of a prompt that are due in a handoff, as indices in the prompt. Not due are the first
    /// `held_blocks`, and those that the layer's window has left behind when the first decode step feeds position
    /// `prompt_tokens`. The prompt's last block is always due.
    pub fn due_blocks(&self, held_blocks: u32, prompt_tokens: u32) -> Vec<Range<u32>> {
        let end = blocks_for(prompt_tokens as usize);
        let due = |window: Option<usize>| {
            let visible = window.map_or(0, |window| first_visible_block(window, prompt_tokens as usize));
            let start = visible.max(held_blocks as usize).min(end.saturating_sub(1));
            start as u32..end as u32
        };
        let window = |layer: usize| self.layer_attention.get(layer).and_then(|layer| layer.window);
        (0..self.layers.len()).map(|layer| due(window(layer))).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::schema::tests::schema_with_windows as schema;

    #[test]
    fn blocks_behind_the_window_are_not_due() {
        // The first step feeds position 100: it sees positions 61 to 100, 85 to 100, and all.
        let schema = schema(&[Some(40), Some(16), None]);
        assert_eq!(schema.due_blocks(0, 100), [3..7, 5..7, 0..7]);
        assert_eq!(schema.due_blocks(4, 100), [4..7, 5..7, 4..7]);
        // Position 48 is in the fourth block.
        assert_eq!(schema.due_blocks(0, 48), [0..3, 2..3, 0..3]);
        assert_eq!(schema.due_blocks(0, 1), [0..1, 0..1, 0..1]);
        assert_eq!(schema.windows().unneeded_blocks(100), 0);
    }

    #[test]
    fn a_few_blocks_are_enough_for_windows() {
        let windows = schema(&[Some(40), Some(16)]).windows();
        let most = (0..200).map(|position| position / BLOCK_TOKENS + 1 - windows.needed_from(position)).max();
        assert_eq!(most, Some(4));
        assert_eq!([3, 4].map(|blocks| windows.max_context_tokens(blocks)), [48, usize::MAX]);
        assert_eq!([17, 100].map(|tokens| windows.needed_blocks(tokens)), [2, 4]);
        let [mixed, none] = [schema(&[Some(40), None]).windows(), Windows::NONE];
        assert_eq!(
            [mixed, none].map(|windows| (windows.max_context_tokens(4), windows.needed_blocks(100))),
            [(64, 7); 2]
        );
    }

    #[test]
    fn the_last_block_is_always_due() {
        let schema = schema(&[Some(1), Some(1)]);
        assert_eq!(schema.due_blocks(0, 48), [2..3, 2..3]);
        assert_eq!((schema.windows().needed_from(48), schema.windows().unneeded_blocks(48)), (3, 2));
    }

    #[test]
    fn without_windows_all_is_due() {
        let schema = schema(&[]);
        assert_eq!(schema.windows(), Windows::NONE);
        assert_eq!(schema.due_blocks(2, 100), [2..7, 2..7, 2..7]);
        assert_eq!([Windows::NONE.windowed_from(999), Windows::NONE.complete_from(999)], [0, 0]);
    }

    proptest! {
        /// What is due is what some decode step attends to, block by block, and the last block.
        #[test]
        fn due_is_what_decode_attends_to(
            windows in prop::collection::vec(prop::option::of(1_usize..200), 3),
            prompt in 1_usize..400,
            held in 0_usize..25,
        ) {
            let schema = schema(&windows);
            let blocks = blocks_for(prompt);
            let held = held.min(blocks - 1);
            let due = schema.due_blocks(held as u32, prompt as u32);
            let is_seen = |window: Option<usize>, position: usize| window.is_none_or(|w| position + w > prompt);
            for (window, due) in windows.iter().zip(&due) {
                for block in held..blocks {
                    let seen = (block * BLOCK_TOKENS..(block + 1) * BLOCK_TOKENS).any(|p| p < prompt && is_seen(*window, p));
                    prop_assert_eq!(due.contains(&(block as u32)), seen || block + 1 == blocks);
                }
            }
            let least = schema.due_blocks(0, prompt as u32).iter().map(|due| due.start).min();
            prop_assert_eq!(least, Some(schema.windows().unneeded_blocks(prompt) as u32));
            // Every layer has what is complete, and layers with windows need nothing before theirs.
            let complete = schema.windows().complete_from(prompt).min(blocks - 1);
            prop_assert!(schema.due_blocks(0, prompt as u32).iter().all(|due| due.start as usize <= complete));
            let windowed = windows.iter().zip(&due).filter(|(window, _)| window.is_some());
            prop_assert!(windowed.into_iter().all(|(_, due)| due.start as usize >= schema.windows().windowed_from(prompt).min(blocks - 1)));
        }
    }
}
