//! Chooses among candidate nodes. These are pure functions of the candidates' load.

/// A prefill node that may compute a prompt.
#[derive(Clone, Copy, Debug)]
pub struct PrefillCandidate {
    /// Number of accepted prompt tokens that the node has not computed yet.
    pub queued_tokens: u64,
    /// Number of tokens of this prompt that the node has probably cached.
    pub matched_tokens: u64,
    /// Requests on the node, waiting ones included.
    pub requests: u32,
}

/// A decode node that may decode a request.
#[derive(Clone, Copy, Debug)]
pub struct DecodeCandidate {
    /// Number of free or evictable KV blocks.
    pub free_blocks: u32,
    /// Number of KV blocks of the node.
    pub total_blocks: u32,
    /// Requests on the node, waiting ones included.
    pub requests: u32,
    /// Maximum number of requests that the node computes at once.
    pub max_running: u32,
}

/// Index of the node that will finish the prompt first: the one with the fewest tokens to compute, from its queue and from
/// the uncached part of this prompt. Ties go to the node with fewer requests.
pub fn prefill(prompt_tokens: u64, candidates: &[PrefillCandidate]) -> Option<usize> {
    let cost = |c: &PrefillCandidate| (c.queued_tokens + prompt_tokens.saturating_sub(c.matched_tokens), c.requests);
    (0..candidates.len()).min_by_key(|&i| cost(&candidates[i]))
}

/// Index of the node with the lowest occupancy, which is the larger of the used shares of requests and of blocks. Nodes with
/// room for the request are preferred.
pub fn decode(needed_blocks: u32, candidates: &[DecodeCandidate]) -> Option<usize> {
    let crowded = |c: &DecodeCandidate| c.free_blocks < needed_blocks || c.requests >= c.max_running;
    let occupancy = |c: &DecodeCandidate| {
        let requests = f64::from(c.requests) / f64::from(c.max_running.max(1));
        let blocks = 1.0 - f64::from(c.free_blocks) / f64::from(c.total_blocks.max(1));
        requests.max(blocks)
    };
    (0..candidates.len()).min_by(|&a, &b| {
        let (a, b) = (&candidates[a], &candidates[b]);
        crowded(a)
            .cmp(&crowded(b))
            .then(occupancy(a).total_cmp(&occupancy(b)))
            .then(a.requests.cmp(&b.requests))
            .then(b.free_blocks.cmp(&a.free_blocks))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cached_prefix_attracts_until_the_queue_outweighs_it() {
        let idle = PrefillCandidate { queued_tokens: 0, matched_tokens: 0, requests: 0 };
        let warm = PrefillCandidate { queued_tokens: 300, matched_tokens: 512, requests: 2 };
        assert_eq!(prefill(600, &[idle, warm]), Some(1));
        assert_eq!(prefill(600, &[idle, PrefillCandidate { queued_tokens: 600, ..warm }]), Some(0));
        assert_eq!(prefill(10, &[PrefillCandidate { requests: 1, ..idle }, idle]), Some(1));
        assert_eq!(prefill(10, &[]), None);
    }

    #[test]
    fn decode_goes_where_there_is_room() {
        let node = DecodeCandidate { free_blocks: 100, total_blocks: 100, requests: 0, max_running: 4 };
        let busy = DecodeCandidate { requests: 2, ..node };
        let full = DecodeCandidate { free_blocks: 3, ..node };
        assert_eq!(decode(10, &[busy, node]), Some(1));
        assert_eq!(decode(10, &[full, busy]), Some(1));
        // No node has room. The request is sent anyway, and waits on the node or is refused.
        assert_eq!(decode(1000, &[DecodeCandidate { requests: 9, ..node }, full]), Some(1));
        assert_eq!(decode(1, &[]), None);
    }
}
