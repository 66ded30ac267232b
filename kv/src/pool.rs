//! Block pool of a node's KV cache: allocation by reference-counted leases, and a prefix cache of published blocks.
//!
//! A block is in one of three states:
//!
//! - **free**: no lease holds it and its content is not published;
//! - **in use**: one or more leases hold it;
//! - **cached**: no lease holds it, but its content is published and can be found by hash until it is evicted.
//!
//! Invariants:
//!
//! - free + cached + in use = total, and `available()` is free + cached;
//! - a block handed out by [`BlockPool::allocate`] is in no other lease, and cannot be found until it is published;
//! - a block handed out by [`BlockPool::lookup`] has the content it was published with: published blocks are full, and
//!   a full block is not written again until it is evicted, which only happens when no lease holds it.
//!
//! One mutex guards the pool. It is held for the duration of an operation and never across I/O. Allocate, publish,
//! lookup and drop are O(n log c) for `n` blocks in the call and `c` cached blocks. Apart from the lease and the pool's
//! maps they allocate no memory.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::{BlockHash, BlockId};

/// Error: fewer blocks are available than requested. Nothing was allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no room: {needed} kv blocks needed, {available} available")]
pub struct NoRoom {
    /// Blocks requested.
    pub needed: usize,
    /// Blocks that were available.
    pub available: usize,
}

/// The pool of all blocks of one KV cache. Cheap to clone; clones share the pool.
#[derive(Clone)]
pub struct BlockPool {
    state: Arc<Mutex<State>>,
}

struct State {
    blocks: Vec<Block>,
    /// Free blocks. The last one is handed out next.
    free: Vec<BlockId>,
    /// Block of each published hash. At most one block per hash.
    index: HashMap<BlockHash, BlockId>,
    /// Cached blocks by stamp, least recently used first.
    cached: BTreeMap<u64, BlockId>,
    /// Stamp for the next block that becomes cached.
    clock: u64,
}

#[derive(Clone, Copy, Default)]
struct Block {
    /// Number of leases that hold the block.
    refs: u32,
    hash: Option<BlockHash>,
    /// Key in `cached`, while the block is cached.
    stamp: u64,
}

impl State {
    fn available(&self) -> usize {
        self.free.len() + self.cached.len()
    }

    /// Takes a free block. If there is none, evicts the least recently used cached block.
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
    /// A pool of `num_blocks` free blocks with ids from 0.
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

    /// Allocates `n` blocks that no other lease holds and no lookup finds, or fails without allocating any. Evicts
    /// least recently used cached blocks when no free blocks are left.
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

    /// Returns a lease of the published blocks of the longest prefix of `hashes`. Empty if the first hash is unknown.
    ///
    /// Other leases may hold the blocks too, so they must not be written. A caller that must compute the last token of
    /// a prompt should look up only the full blocks before that token.
    pub fn lookup(&self, hashes: &[BlockHash]) -> BlockLease {
        self.lookup_either(hashes, &[])
    }

    /// Like [`Self::lookup`]. Where the block of `hashes[i]` is unknown, that of `others[i]` serves as well, if there is one.
    pub fn lookup_either(&self, hashes: &[BlockHash], others: &[BlockHash]) -> BlockLease {
        let mut state = self.state.lock();
        let find = |(i, hash)| state.index.get(hash).or_else(|| state.index.get(others.get(i)?)).copied();
        let blocks: Vec<BlockId> = hashes.iter().enumerate().map_while(find).collect();
        for id in &blocks {
            state.hold(*id);
        }
        BlockLease { pool: self.clone(), blocks }
    }

    /// Publishes full blocks under their hashes, so that lookups find them. The caller must hold the blocks, and they
    /// must not be written any more.
    ///
    /// `hashes[i]` is the hash of `blocks[i]`; surplus entries of the longer list are ignored. If a hash is already
    /// published, lookups keep finding the first block. Blocks that are not held or already have a hash are skipped.
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

    /// Number of blocks that [`Self::allocate`] could hand out now: free and cached ones.
    pub fn available(&self) -> usize {
        self.state.lock().available()
    }

    /// Number of blocks in the pool.
    pub fn total(&self) -> usize {
        self.state.lock().blocks.len()
    }

    /// Number of cached blocks: published, and held by no lease.
    pub fn cached(&self) -> usize {
        self.state.lock().cached.len()
    }

    /// Number of leases that hold the block. 0 if the block does not exist.
    pub fn holders(&self, id: BlockId) -> u32 {
        self.state.lock().blocks.get(id.0 as usize).map_or(0, |block| block.refs)
    }

    /// Number of blocks held by leases.
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

/// Holds blocks of a pool; dropping it releases them. Published blocks can still be found until they are evicted.
///
/// Not `Clone`. To share a lease, put it in an `Arc`; dropping the last reference releases the blocks.
pub struct BlockLease {
    pool: BlockPool,
    blocks: Vec<BlockId>,
}

impl BlockLease {
    /// The blocks, in allocation or lookup order.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Number of blocks.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether the lease holds no blocks.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Moves the blocks of `other` to the end of this lease.
    ///
    /// # Panics
    /// If the leases belong to different pools, because their block ids are unrelated.
    pub fn append(&mut self, mut other: BlockLease) {
        assert!(Arc::ptr_eq(&self.pool.state, &other.pool.state), "leases belong to different pools");
        self.blocks.append(&mut other.blocks);
    }

    /// Another lease of the same blocks.
    pub fn share(&self) -> BlockLease {
        let mut state = self.pool.state.lock();
        for id in &self.blocks {
            state.hold(*id);
        }
        BlockLease { pool: self.pool.clone(), blocks: self.blocks.clone() }
    }

    /// Puts the blocks of `other` in the place of the blocks from index `at` on, or behind the last one. The replaced blocks
    /// are released.
    ///
    /// # Panics
    /// If the leases belong to different pools, because their block ids are unrelated.
    pub fn replace(&mut self, at: usize, mut other: BlockLease) {
        let mut rest = self.split_off(at);
        let behind = rest.split_off(other.len());
        assert!(Arc::ptr_eq(&self.pool.state, &other.pool.state), "leases belong to different pools");
        self.blocks.append(&mut other.blocks);
        self.append(behind);
    }

    /// Keeps the first `at` blocks and returns the others as a new lease, which may be empty.
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
        // Release in reverse, so that the end of a prompt is evicted first: lookups cannot reach it without the
        // beginning.
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
