use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::*;
use crate::block_hashes;

fn names(prompt: u32, blocks: usize) -> Vec<BlockHash> {
    let tokens: Vec<u32> = (0..(blocks * crate::BLOCK_TOKENS) as u32).map(|i| prompt * 1000 + i).collect();
    block_hashes(&tokens, "m")
}

#[test]
fn allocation_is_all_or_nothing() {
    let pool = BlockPool::new(4);
    let first = pool.allocate(3).unwrap();
    assert_eq!(first.blocks(), [BlockId(0), BlockId(1), BlockId(2)]);
    assert_eq!(pool.allocate(2).unwrap_err(), NoRoom { needed: 2, available: 1 });
    assert_eq!(pool.available(), 1);
    drop(first);
    assert_eq!((pool.available(), pool.in_use()), (4, 0));
}

#[test]
fn published_blocks_are_found_until_evicted() {
    let pool = BlockPool::new(4);
    let hashes = names(1, 2);
    let lease = pool.allocate(2).unwrap();
    assert!(pool.lookup(&hashes).is_empty(), "not published yet");
    pool.publish(lease.blocks(), &hashes);
    let blocks = lease.blocks().to_vec();
    let shared = pool.lookup(&hashes);
    assert_eq!(shared.blocks(), blocks);
    drop(lease);
    assert_eq!((pool.in_use(), pool.cached()), (2, 0), "the second lease still holds them");
    drop(shared);
    assert_eq!((pool.in_use(), pool.cached(), pool.available()), (0, 2, 4));
    assert_eq!(pool.lookup(&hashes).blocks(), blocks);

    let all = pool.allocate(3).unwrap();
    assert_eq!(pool.lookup(&hashes).len(), 1, "the end of the prompt is evicted before its beginning");
    drop(all);
    assert_eq!(pool.available(), 4);
}

#[test]
fn the_least_recently_used_prompt_goes_first() {
    let pool = BlockPool::new(3);
    for prompt in 0..3 {
        let lease = pool.allocate(1).unwrap();
        pool.publish(lease.blocks(), &names(prompt, 1));
    }
    drop(pool.lookup(&names(0, 1)));
    let _one = pool.allocate(1).unwrap();
    let found: Vec<usize> = (0..3).map(|p| pool.lookup(&names(p, 1)).len()).collect();
    assert_eq!(found, [1, 0, 1]);
}

#[test]
fn the_first_of_two_equal_blocks_stays_findable() {
    let pool = BlockPool::new(2);
    let (a, b) = (pool.allocate(1).unwrap(), pool.allocate(1).unwrap());
    pool.publish(a.blocks(), &names(1, 1));
    pool.publish(b.blocks(), &names(1, 1));
    assert_eq!(pool.lookup(&names(1, 1)).blocks(), a.blocks());
    drop(b);
    assert_eq!((pool.cached(), pool.available()), (0, 1));
}

#[test]
fn a_block_nobody_holds_is_not_published() {
    let pool = BlockPool::new(1);
    pool.publish(&[BlockId(0), BlockId(7)], &names(1, 2));
    assert!(pool.lookup(&names(1, 1)).is_empty());
}

#[test]
fn leases_join_and_part() {
    let pool = BlockPool::new(4);
    let mut lease = pool.allocate(1).unwrap();
    lease.append(pool.allocate(3).unwrap());
    assert_eq!(lease.len(), 4);
    let rest = lease.split_off(1);
    assert!(lease.split_off(9).is_empty());
    drop(lease);
    assert_eq!((rest.len(), pool.available()), (3, 1));
}

#[derive(Clone, Debug)]
enum Op {
    /// Looks up a prompt, then allocates and fills the blocks that were not found.
    Admit {
        prompt: u32,
        blocks: usize,
    },
    /// Publishes the blocks of the `i`-th lease.
    Publish(usize),
    Drop(usize),
    Split(usize, usize),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0u32..4, 0usize..7).prop_map(|(prompt, blocks)| Op::Admit { prompt, blocks }),
        2 => (0usize..8).prop_map(Op::Publish),
        2 => (0usize..8).prop_map(Op::Drop),
        1 => (0usize..8, 0usize..7).prop_map(|(i, at)| Op::Split(i, at)),
    ]
}

proptest! {
    /// Runs random operations on a pool and a model of its memory, and checks the invariants after every step.
    #[test]
    fn invariants_hold_in_any_order(ops in proptest::collection::vec(op(), 1..120)) {
        const TOTAL: usize = 12;
        let pool = BlockPool::new(TOTAL);
        // Content of each block: the hash of what its exclusive holder wrote last.
        let mut memory: HashMap<BlockId, BlockHash> = HashMap::new();
        // (lease, prompt, whether the lease starts at the prompt's first block)
        let mut held: Vec<(BlockLease, u32, bool)> = Vec::new();
        for op in ops {
            match op {
                Op::Admit { prompt, blocks } => {
                    let hashes = names(prompt, blocks);
                    let before: HashSet<BlockId> = held.iter().flat_map(|h| h.0.blocks().iter().copied()).collect();
                    let mut lease = pool.lookup(&hashes);
                    for (id, hash) in lease.blocks().iter().zip(&hashes) {
                        prop_assert_eq!(&memory[id], hash, "found content was overwritten");
                    }
                    let shared: HashSet<BlockId> = lease.blocks().iter().copied().collect();
                    let (need, available) = (blocks - lease.len(), pool.available());
                    match pool.allocate(need) {
                        Ok(fresh) => {
                            for (id, hash) in fresh.blocks().iter().zip(&hashes[lease.len()..]) {
                                prop_assert!(!before.contains(id) && !shared.contains(id), "handed out twice");
                                memory.insert(*id, *hash);
                            }
                            lease.append(fresh);
                            held.push((lease, prompt, true));
                        }
                        Err(e) => {
                            prop_assert!(need > available);
                            prop_assert_eq!(e, NoRoom { needed: need, available });
                        }
                    }
                }
                Op::Publish(i) => {
                    if let Some((lease, prompt, true)) = held.get(i) {
                        let hashes = names(*prompt, lease.len());
                        pool.publish(lease.blocks(), &hashes);
                        prop_assert_eq!(pool.lookup(&hashes).len(), lease.len());
                    }
                }
                Op::Drop(i) => {
                    if i < held.len() {
                        held.swap_remove(i);
                    }
                }
                Op::Split(i, at) => {
                    if let Some(entry) = held.get_mut(i) {
                        let (rest, prompt) = (entry.0.split_off(at), entry.1);
                        held.push((rest, prompt, false));
                    }
                }
            }
            let distinct: HashSet<BlockId> = held.iter().flat_map(|h| h.0.blocks().iter().copied()).collect();
            prop_assert_eq!(pool.in_use(), distinct.len());
            prop_assert_eq!(pool.available() + pool.in_use(), TOTAL);
            prop_assert!(pool.cached() <= pool.available());
        }
        held.clear();
        prop_assert_eq!(pool.in_use(), 0);
        prop_assert!(pool.allocate(TOTAL).is_ok());
    }
}
