//! Remembers which prefill node has computed which prompt prefix. It approximates the nodes' prefix caches, so that the
//! prompts of a conversation go to the same node.

use std::collections::HashMap;

use overfill_kv::BlockHash;

/// Maximum number of nodes remembered per block.
const NODES_PER_BLOCK: usize = 4;

/// Bounded map from a block to the nodes that computed it.
///
/// Two generations approximate a least-recently-used order. A block that is used moves to the young generation. When
/// the young generation is full, it replaces the old one. Every operation is O(1) per block.
pub struct Affinity {
    young: HashMap<BlockHash, Vec<u64>>,
    old: HashMap<BlockHash, Vec<u64>>,
    half: usize,
}

impl Affinity {
    /// Remembers at most `capacity` blocks.
    pub fn new(capacity: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), half: (capacity / 2).max(1) }
    }

    /// Number of leading blocks of `hashes` that `node` has computed.
    pub fn matched(&self, hashes: &[BlockHash], node: u64) -> usize {
        let seen = |hash: &&BlockHash| {
            self.young.get(*hash).or_else(|| self.old.get(*hash)).is_some_and(|nodes| nodes.contains(&node))
        };
        hashes.iter().take_while(seen).count()
    }

    /// Records that `node` computes these blocks.
    pub fn record(&mut self, hashes: &[BlockHash], node: u64) {
        for hash in hashes {
            if self.young.len() >= self.half && !self.young.contains_key(hash) {
                self.old = std::mem::take(&mut self.young);
            }
            let nodes = match self.young.get_mut(hash) {
                Some(nodes) => nodes,
                None => {
                    let nodes = self.old.remove(hash).unwrap_or_default();
                    self.young.entry(*hash).or_insert(nodes)
                }
            };
            if !nodes.contains(&node) {
                if nodes.len() == NODES_PER_BLOCK {
                    nodes.remove(0);
                }
                nodes.push(node);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use overfill_kv::block_hashes;

    use super::*;

    #[test]
    fn prefixes_are_matched_per_node_and_forgotten_in_the_end() {
        let long: Vec<u32> = (0..64).collect();
        let hashes = block_hashes(&long, "m");
        let mut affinity = Affinity::new(8);
        affinity.record(&hashes[..2], 1);
        affinity.record(&hashes, 2);
        assert_eq!((affinity.matched(&hashes, 1), affinity.matched(&hashes, 2)), (2, 4));
        let others: Vec<u32> = (100..300).collect();
        affinity.record(&block_hashes(&others, "m"), 1);
        assert_eq!(affinity.matched(&hashes, 2), 0);
        assert!(affinity.young.len() + affinity.old.len() <= 8);
    }
}
