//! Content hashes of KV blocks. The same tokens after the same prefix, computed by the same model, have the same hash.

use std::fmt;

use sha2::{Digest, Sha256};

use crate::BLOCK_TOKENS;

/// Content hash of one full block. Covers its tokens, all tokens before it, and the model that computed its KV.
///
/// SHA-256, because prompts come from untrusted clients, who must not be able to construct collisions.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash([u8; 32]);

impl BlockHash {
    /// The 32 bytes of the digest.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Name of a block with the same content that may lack the KV of layers with windows, see [`crate::Windows`].
    pub fn without_windows(&self) -> Self {
        Self(Sha256::new().chain_update(b"overfill-kv-block-without-windows").chain_update(self.0).finalize().into())
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockHash({:02x}{:02x}{:02x}{:02x}..)", self.0[0], self.0[1], self.0[2], self.0[3])
    }
}

/// Hashes of the full blocks of `tokens`, in order. A partly filled last block has no hash.
///
/// `producer` is the fingerprint of the model that computes the KV; blocks of different producers never match. The hash
/// of a block covers all tokens before it, so the hashes of a prefix are a prefix of the hashes.
pub fn block_hashes(tokens: &[u32], producer: &str) -> Vec<BlockHash> {
    let mut chain: [u8; 32] = Sha256::new()
        .chain_update(b"overfill-kv-block-v1")
        .chain_update((BLOCK_TOKENS as u64).to_le_bytes())
        .chain_update((producer.len() as u64).to_le_bytes())
        .chain_update(producer.as_bytes())
        .finalize()
        .into();
    tokens
        .chunks_exact(BLOCK_TOKENS)
        .map(|block| {
            let mut hasher = Sha256::new().chain_update(chain);
            for token in block {
                hasher.update(token.to_le_bytes());
            }
            chain = hasher.finalize().into();
            BlockHash(chain)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_full_blocks_have_names() {
        let tokens: Vec<u32> = (0..47).collect();
        assert_eq!(block_hashes(&tokens, "m").len(), 2);
        assert!(block_hashes(&tokens[..15], "m").is_empty());
    }

    #[test]
    fn names_of_a_prefix_are_a_prefix_of_the_names() {
        let tokens: Vec<u32> = (0..64).collect();
        let all = block_hashes(&tokens, "m");
        assert_eq!(block_hashes(&tokens[..40], "m"), all[..2]);
    }

    #[test]
    fn an_earlier_token_changes_every_later_name() {
        let a: Vec<u32> = (0..64).collect();
        let mut b = a.clone();
        b[17] = 999;
        let (a, b) = (block_hashes(&a, "m"), block_hashes(&b, "m"));
        assert_eq!(a[0], b[0]);
        assert!((1..4).all(|i| a[i] != b[i]));
    }

    #[test]
    fn producers_never_match() {
        let tokens: Vec<u32> = (0..32).collect();
        assert_ne!(block_hashes(&tokens, "full")[0], block_hashes(&tokens, "pruned")[0]);
        let repeated = [7u32; 32];
        let names = block_hashes(&repeated, "m");
        assert_ne!(names[0], names[1], "equal blocks at different positions have different content");
        let partial = names.iter().map(BlockHash::without_windows);
        assert!(partial.zip(&names).all(|(partial, whole)| partial != *whole));
    }
}
