//! Which node takes a request: pure functions over what is known of the candidates.

/// A prefill node that may compute a prompt.
#[derive(Clone, Copy, Debug)]
pub struct PrefillCandidate {
    /// Prompt tokens that the node has accepted and not yet computed.
    pub queued_tokens: u64,
    /// Tokens of this prompt that the node has probably cached.
    pub matched_tokens: u64,
    /// Requests on the node, waiting ones included.
    pub requests: u32,
}

/// A decode node that may decode a request.
#[derive(Clone, Copy, Debug)]
pub struct DecodeCandidate {
    /// KV blocks free or cached.
    pub free_blocks: u32,
    /// All KV blocks of the node.
    pub total_blocks: u32,
    /// Requests on the node, waiting ones included.
    pub requests: u32,
    /// Most requests computed at once.
    pub max_running: u32,
}

/// The node on which the prompt will be computed first: the fewest tokens to compute before its own last one.
pub fn prefill(prompt_tokens: u64, candidates: &[PrefillCandidate]) -> Option<usize> {
    let cost = |c: &PrefillCandidate| (c.queued_tokens + prompt_tokens.saturating_sub(c.matched_tokens), c.requests);
    (0..candidates.len()).min_by_key(|&i| cost(&candidates[i]))
}

/// The least occupied node, by requests or by blocks, among the nodes that have room now. Without room anywhere, among
/// all.
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
        // Nobody has room: the request is sent anyway and waits there, or is refused.
        assert_eq!(decode(1000, &[DecodeCandidate { requests: 9, ..node }, full]), Some(1));
        assert_eq!(decode(1, &[]), None);
    }
}
