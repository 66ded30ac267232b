//! The blocks of a node's KV cache: who holds them, and which of them hold content worth finding again.
//!
//! A block is in one of three states:
//!
//! - **free**: nobody holds it, nothing is known of its content;
//! - **in use**: one or more leases hold it;
//! - **cached**: nobody holds it, but its content is published and can be found by hash until it is evicted.
//!
//! What always holds:
//!
//! - free + cached + in use = total, and `available()` is free + cached;
//! - a block handed out by [`BlockPool::allocate`] is in no other lease, and cannot be found until it is published;
//! - a block handed out by [`BlockPool::lookup`] has the content it was published with: published blocks are full, and
//!   a full block is not written again until it was evicted, which only happens when no lease holds it.
//!
//! One mutex guards everything; it is held for the time of the operation and never across I/O. With `n` blocks in the
//! call and `c` cached ones: allocate, publish, lookup and drop are O(n log c), without allocation beyond the lease.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::{BlockHash, BlockId};

/// Fewer blocks are available than were asked for. Nothing was allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no room: {needed} kv blocks needed, {available} available")]
pub struct NoRoom {
    /// Blocks asked for.
    pub needed: usize,
    /// Blocks that could have been had.
    pub available: usize,
}

/// All blocks of one KV cache. Cheap to clone; all clones share the pool.
#[derive(Clone)]
pub struct BlockPool {
    state: Arc<Mutex<State>>,
}

struct State {
    blocks: Vec<Block>,
    /// Blocks without holder and without published content; the last is handed out next.
    free: Vec<BlockId>,
    /// Where published content lies. At most one block per hash.
    index: HashMap<BlockHash, BlockId>,
    /// Published blocks without holder, least recently used first.
    cached: BTreeMap<u64, BlockId>,
    /// Stamp of the next block to become unused.
    clock: u64,
}

#[derive(Clone, Copy, Default)]
struct Block {
    /// Leases that hold it.
    refs: u32,
    hash: Option<BlockHash>,
    /// Key in `cached`, while it is there.
    stamp: u64,
}

impl State {
    fn available(&self) -> usize {
        self.free.len() + self.cached.len()
    }

    /// Takes a free block, or evicts the least recently used cached one.
    fn take(&mut self) -> Option<BlockId> {
        if let Some(id) = self.free.pop() {
            return Some(id);
        }
        let (_, id) = self.cached.pop_first()?;
        if let Some(hash) = self.blocks[id.0 as usize].hash.take() {
            self.index.remove(&hash);
        }
        Some(id)
    }

    fn hold(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.0 as usize];
        if block.refs == 0 && block.hash.is_some() {
            self.cached.remove(&block.stamp);
        }
        block.refs += 1;
    }

    fn release(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.0 as usize];
        debug_assert!(block.refs > 0, "block {} released twice", id.0);
        block.refs -= 1;
        if block.refs > 0 {
            return;
        }
        if block.hash.is_some() {
            block.stamp = self.clock;
            self.cached.insert(self.clock, id);
            self.clock += 1;
        } else {
            self.free.push(id);
        }
    }
}

impl BlockPool {
    /// A pool of `num_blocks` free blocks, ids from 0.
    pub fn new(num_blocks: usize) -> Self {
        // Reversed, so that a fresh pool hands out block 0 first.
        let free = (0..num_blocks as u32).rev().map(BlockId).collect();
        let state = State {
            blocks: vec![Block::default(); num_blocks],
            free,
            index: HashMap::new(),
            cached: BTreeMap::new(),
            clock: 0,
        };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// Takes `n` blocks that nobody else holds or can find, all or none. Evicts least recently used cached blocks when
    /// no free ones are left.
    pub fn allocate(&self, n: usize) -> Result<BlockLease, NoRoom> {
        let mut state = self.state.lock();
        let available = state.available();
        if n > available {
            return Err(NoRoom { needed: n, available });
        }
        let mut blocks = Vec::with_capacity(n);
        for _ in 0..n {
            let Some(id) = state.take() else { break };
            state.hold(id);
            blocks.push(id);
        }
        Ok(BlockLease { pool: self.clone(), blocks })
    }

    /// Shares the blocks of the longest known prefix of `hashes`; empty if the first is unknown.
    ///
    /// The blocks may be in other leases too: read them, never write them. A caller that must compute the last token
    /// of a prompt looks up no more than the full blocks before that token.
    pub fn lookup(&self, hashes: &[BlockHash]) -> BlockLease {
        let mut state = self.state.lock();
        let blocks: Vec<BlockId> = hashes.iter().map_while(|hash| state.index.get(hash).copied()).collect();
        for id in &blocks {
            state.hold(*id);
        }
        BlockLease { pool: self.clone(), blocks }
    }

    /// Makes full blocks findable. The caller holds them, and nobody writes to them from here on.
    ///
    /// `hashes[i]` names `blocks[i]`; surplus entries of the longer list are ignored. Where a hash is published already
    /// the first block stays the one that is found. Blocks that nobody holds, or that have a name, are left alone.
    pub fn publish(&self, blocks: &[BlockId], hashes: &[BlockHash]) {
        let mut state = self.state.lock();
        for (id, hash) in blocks.iter().zip(hashes) {
            let Some(block) = state.blocks.get(id.0 as usize) else { continue };
            if block.refs == 0 || block.hash.is_some() || state.index.contains_key(hash) {
                continue;
            }
            state.blocks[id.0 as usize].hash = Some(*hash);
            state.index.insert(*hash, *id);
        }
    }

    /// Blocks that [`Self::allocate`] could hand out now: free and cached ones.
    pub fn available(&self) -> usize {
        self.state.lock().available()
    }

    /// All blocks.
    pub fn total(&self) -> usize {
        self.state.lock().blocks.len()
    }

    /// Published blocks that no lease holds.
    pub fn cached(&self) -> usize {
        self.state.lock().cached.len()
    }

    /// Leases that hold a block; 0 also for one that does not exist.
    pub fn holders(&self, id: BlockId) -> u32 {
        self.state.lock().blocks.get(id.0 as usize).map_or(0, |block| block.refs)
    }

    /// Blocks that leases hold.
    pub fn in_use(&self) -> usize {
        let state = self.state.lock();
        state.blocks.len() - state.available()
    }
}

impl fmt::Debug for BlockPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (total, available) = (self.total(), self.available());
        write!(f, "BlockPool({available} of {total} available)")
    }
}

/// The right to use blocks; dropping it gives them back. Published ones stay findable until they are evicted.
///
/// Not `Clone`: share it in an `Arc`, and the last holder gives the blocks back.
pub struct BlockLease {
    pool: BlockPool,
    blocks: Vec<BlockId>,
}

impl BlockLease {
    /// The blocks, in the order they were handed out.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Takes over the blocks of `other`, behind its own.
    ///
    /// # Panics
    /// If the leases are of different pools: their block ids have nothing to do with each other.
    pub fn append(&mut self, mut other: BlockLease) {
        assert!(Arc::ptr_eq(&self.pool.state, &other.pool.state), "leases of different pools");
        self.blocks.append(&mut other.blocks);
    }

    /// Keeps the first `at` blocks and returns the rest as a lease of its own; an empty one if there is no rest.
    pub fn split_off(&mut self, at: usize) -> BlockLease {
        let blocks = if at < self.blocks.len() { self.blocks.split_off(at) } else { Vec::new() };
        BlockLease { pool: self.pool.clone(), blocks }
    }
}

impl Drop for BlockLease {
    fn drop(&mut self) {
        if self.blocks.is_empty() {
            return;
        }
        let mut state = self.pool.state.lock();
        // The end of a prompt becomes the least recently used: without its beginning it could not be found anyway.
        for id in self.blocks.iter().rev() {
            state.release(*id);
        }
    }
}

impl fmt::Debug for BlockLease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("BlockLease").field(&self.blocks).finish()
    }
}

#[cfg(test)]
mod tests;
