//! Who joins, who goes on, who makes room. Pure: no model, no thread, no clock.
//!
//! Requests are known by their order of arrival. The older go first: they get blocks before the younger, and the
//! youngest is taken out of the batch when blocks run out. Taken-out requests come back before anything new begins, so
//! every request that fits the pool alone ends.

/// A sequence in the batch, as the scheduler sees it; the batch is in order of arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seat {
    /// Its next token needs a block that it does not have.
    pub lacks_block: bool,
    /// Its client has not taken the last tokens: it computes nothing in this step.
    pub sits_out: bool,
}

/// What must happen before the next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Growth {
    /// The sequence gets one block.
    Grow(usize),
    /// The sequence leaves the batch, its KV goes to host memory, its blocks become free.
    Preempt(usize),
}

/// The next thing to do so that every sequence that steps has its block; `None` when nothing is.
///
/// `room`: a block is available. Each growth ends a lack and each preemption takes a sequence out, so asking again and
/// again comes to an end.
pub fn next_growth(seats: &[Seat], room: bool) -> Option<Growth> {
    let oldest = seats.iter().position(|seat| seat.lacks_block && !seat.sits_out)?;
    Some(if room { Growth::Grow(oldest) } else { Growth::Preempt(seats.len() - 1) })
}

/// How full the node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Occupancy {
    /// Blocks that could be handed out.
    pub available: usize,
    /// Requests that hold blocks: those that decode, and those whose KV is on its way.
    pub seated: usize,
    /// Most of them.
    pub max_seated: usize,
}

impl Occupancy {
    /// May a request come in that takes `blocks` blocks now?
    ///
    /// Each request that sits already keeps a block in reserve: else what came in would be taken out at the next
    /// block's border. A request alone may have everything.
    pub fn admits(&self, blocks: usize) -> bool {
        self.seated < self.max_seated && blocks + self.seated <= self.available
    }
}

/// Leading blocks of a prompt that need not be sent when they are held: not the last token's, so that every handoff has
/// something to send and to verify.
pub fn holdable_blocks(prompt_tokens: usize) -> usize {
    prompt_tokens.saturating_sub(1) / overfill_kv::BLOCK_TOKENS
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    fn seat(lacks_block: bool, sits_out: bool) -> Seat {
        Seat { lacks_block, sits_out }
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

    /// A request of the simulation: `prompt` blocks at first, `total` at the end, one more each step.
    #[derive(Clone, Copy, Debug)]
    struct Sim {
        arrival: usize,
        blocks: usize,
        total: usize,
    }

    proptest! {
        /// Whatever comes, everyone ends, and the pool is never overdrawn.
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
                prop_assert!(!batch.is_empty(), "nobody gets on");
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
