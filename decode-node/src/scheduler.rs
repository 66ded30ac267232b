//! The decode scheduler: admission, block allocation and preemption. Pure functions, without model, threads or clock.
//!
//! The order of arrival is the priority. Older requests get blocks before younger ones, and the youngest request is
//! preempted when blocks run out. Preempted requests resume before new ones are admitted. So every request that fits
//! into the pool alone is completed.

/// State of a sequence in the batch. The batch is in order of arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seat {
    /// The next token needs a block that the sequence does not have.
    pub lacks_block: bool,
    /// The client has not read the last tokens, so the sequence skips this step.
    pub sits_out: bool,
    /// The sequence waits for the full model, so it skips this step.
    pub waits: bool,
}

/// An action that is needed before the next step. The value is the index of the sequence in the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Growth {
    /// The sequence gets one block.
    Grow(usize),
    /// The sequence leaves the batch: its KV is copied to host memory and its blocks are freed.
    Preempt(usize),
}

/// Returns the next action on the way to a batch in which every stepping sequence has its block; `None` if the batch is
/// ready. `room` tells whether a block is available.
///
/// Repeated calls end, because each growth supplies one missing block and each preemption removes a sequence.
pub fn next_growth(seats: &[Seat], room: bool) -> Option<Growth> {
    let oldest = seats.iter().position(|seat| seat.lacks_block && !seat.sits_out)?;
    Some(if room { Growth::Grow(oldest) } else { Growth::Preempt(seats.len() - 1) })
}

/// Occupancy of the node: blocks and requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Occupancy {
    /// Number of blocks that can be allocated.
    pub available: usize,
    /// Number of requests that hold blocks: the decoding ones, and those whose KV has not arrived yet.
    pub seated: usize,
    /// Maximum number of requests that hold blocks.
    pub max_seated: usize,
}

impl Occupancy {
    /// Whether a request that needs `blocks` blocks now may be admitted.
    ///
    /// One block is kept in reserve for each seated request. Otherwise the new request would be preempted as soon as an
    /// older one crosses a block boundary. If no request is seated, a new one may take all blocks.
    pub fn admits(&self, blocks: usize) -> bool {
        self.seated < self.max_seated && blocks + self.seated <= self.available
    }
}

/// Number of leading blocks of a prompt that need not be sent if this node holds them. The block of the last token is
/// excluded, so that every handoff sends and verifies at least one block.
pub fn holdable_blocks(prompt_tokens: usize) -> usize {
    prompt_tokens.saturating_sub(1) / overfill_kv::BLOCK_TOKENS
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    fn seat(lacks_block: bool, sits_out: bool) -> Seat {
        Seat { lacks_block, sits_out, waits: false }
    }

    #[test]
    fn the_oldest_grows_and_the_youngest_makes_room() {
        let seats = [seat(false, false), seat(true, false), seat(true, false)];
        assert_eq!(next_growth(&seats, true), Some(Growth::Grow(1)));
        assert_eq!(next_growth(&seats, false), Some(Growth::Preempt(2)));
        assert_eq!(next_growth(&seats[..2], false), Some(Growth::Preempt(1)));
        assert_eq!(next_growth(&seats[..1], false), None);
    }

    #[test]
    fn who_sits_out_needs_nothing() {
        assert_eq!(next_growth(&[seat(true, true), seat(false, false)], false), None);
    }

    #[test]
    fn a_request_alone_may_have_everything() {
        let node = |seated| Occupancy { available: 8, seated, max_seated: 3 };
        assert!(node(0).admits(8));
        assert!(!node(1).admits(8));
        assert!(node(1).admits(7));
        assert!(!node(3).admits(1));
    }

    /// A request in the property test. It holds `blocks` blocks, needs one more in each step, and ends with `total`.
    #[derive(Clone, Copy, Debug)]
    struct Sim {
        arrival: usize,
        blocks: usize,
        total: usize,
    }

    proptest! {
        /// Every request ends, and the pool is never overdrawn.
        #[test]
        fn every_request_that_fits_alone_ends(
            pool in 4_usize..20,
            max_seated in 1_usize..6,
            sizes in prop::collection::vec((1_usize..20, 0_usize..20), 1..12),
        ) {
            let mut waiting: VecDeque<Sim> = sizes.iter().enumerate().map(|(arrival, (prompt, growth))| {
                let blocks = (*prompt).min(pool);
                Sim { arrival, blocks, total: (blocks + growth).min(pool) }
            }).collect();
            let mut swapped: VecDeque<Sim> = VecDeque::new();
            let mut batch: Vec<Sim> = Vec::new();
            let mut ended = 0;
            for _ in 0..10_000 {
                if ended == sizes.len() {
                    break;
                }
                let used = |batch: &[Sim]| batch.iter().map(|s| s.blocks).sum::<usize>();
                loop {
                    let queue = if swapped.is_empty() { &mut waiting } else { &mut swapped };
                    let node = Occupancy { available: pool - used(&batch), seated: batch.len(), max_seated };
                    let Some(next) = queue.front().filter(|next| node.admits(next.blocks)) else { break };
                    batch.push(*next);
                    queue.pop_front();
                    batch.sort_by_key(|s| s.arrival);
                }
                prop_assert!(!batch.is_empty(), "no request makes progress");
                let mut grown = vec![false; sizes.len()];
                loop {
                    let seats: Vec<Seat> = batch.iter()
                        .map(|s| seat(!grown[s.arrival] && s.blocks < s.total, false)).collect();
                    match next_growth(&seats, used(&batch) < pool) {
                        Some(Growth::Grow(i)) => { batch[i].blocks += 1; grown[batch[i].arrival] = true; }
                        Some(Growth::Preempt(i)) => {
                            let out = batch.remove(i);
                            let place = swapped.partition_point(|s| s.arrival < out.arrival);
                            swapped.insert(place, out);
                        }
                        None => break,
                    }
                    prop_assert!(used(&batch) <= pool);
                }
                let before = batch.len();
                batch.retain(|s| s.blocks < s.total || grown[s.arrival]);
                ended += before - batch.len();
            }
            prop_assert_eq!(ended, sizes.len());
        }
    }
}
