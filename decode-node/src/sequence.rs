//! One request: as it arrives, while its KV is on its way, while it decodes, while it has to wait again.

use std::{sync::Arc, time::Duration};

use overfill_kv::{
    BlockHash, BlockId, BlockLease, BlockPool, FinishReason, KvStore, OutputToken, RequestId, SamplingParams,
    StoreError, blocks_for,
};
use overfill_node::{LoadState, load::Counted};
use tokio::{sync::mpsc, time::Instant};
use tracing::error;

use crate::scheduler::{self, Occupancy, Seat};

/// Events that a client may leave in its channel before its sequence sits out.
pub const CLIENT_EVENTS: usize = 64;
/// Places in the channel that a step may need: a token, and the end.
const STEP_EVENTS: usize = 2;

/// A checked request.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its name.
    pub id: RequestId,
    /// The prompt; at least one token.
    pub tokens: Vec<u32>,
    /// The last of `tokens` that are earlier output: penalties count them as such.
    pub generated: usize,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Most tokens of output, the prefill node's first one included; at least 2.
    pub max_tokens: usize,
    /// Any of these ends the output, as its last token.
    pub stop_token_ids: Vec<u32>,
    /// Fingerprint of the model that computes the prompt's KV.
    pub producer: Option<String>,
    /// When it has failed.
    pub deadline: Instant,
}

/// What a client hears, in this order.
#[derive(Debug)]
pub enum SequenceEvent {
    /// The request has its blocks.
    Reserved {
        /// Those that are to be filled.
        to_fill: Arc<BlockLease>,
        /// Leading blocks of the prompt that are here already.
        held_blocks: usize,
    },
    /// The second, third, ... token of the output.
    Token(OutputToken),
    /// The last event.
    Finished(FinishReason),
    /// The engine could not go on with it. The last event.
    Failed(String),
}

/// A request in the engine's queue.
pub struct Job {
    /// Place in the order of arrival.
    pub arrival: u64,
    /// The request.
    pub request: Request,
    /// Names of the prompt's full blocks, if their producer is known.
    pub hashes: Vec<BlockHash>,
    /// To its client; closed when that one has gone.
    pub events: mpsc::Sender<SequenceEvent>,
    pub(crate) waiting: Counted,
}

/// Has a client gone, or its time? The service watches the time, too, but not while its client does not read.
fn is_over(events: &mpsc::Sender<SequenceEvent>, request: &Request) -> bool {
    events.is_closed() || Instant::now() >= request.deadline
}

impl Job {
    /// Has its client gone, or its time?
    pub fn is_over(&self) -> bool {
        is_over(&self.events, &self.request)
    }

    /// Sets blocks for the prompt aside; gives the job back if there is no room now.
    pub fn reserve(
        self: Box<Self>,
        pool: &BlockPool,
        seated: usize,
        max_seated: usize,
        load: &Arc<LoadState>,
    ) -> Result<Reserved, Box<Self>> {
        let tokens = self.request.tokens.len();
        let held = pool.lookup(&self.hashes[..scheduler::holdable_blocks(tokens).min(self.hashes.len())]);
        let missing = blocks_for(tokens) - held.len();
        let node = Occupancy { available: pool.available(), seated, max_seated };
        let to_fill = match node.admits(missing).then(|| pool.allocate(missing)) {
            Some(Ok(lease)) => Arc::new(lease),
            _ => return Err(self),
        };
        let metrics = load.metrics();
        metrics.prompt_tokens.inc_by(tokens as u64);
        metrics.prefix_cache_queries.inc_by(tokens as u64);
        metrics.prefix_cache_hits.inc_by((held.len() * overfill_kv::BLOCK_TOKENS) as u64);
        let Self { arrival, request, hashes, events, waiting } = *self;
        drop(waiting);
        let _ = events.try_send(SequenceEvent::Reserved { to_fill: to_fill.clone(), held_blocks: held.len() });
        Ok(Reserved { arrival, request, hashes, events, held, to_fill, seat: load.count_running() })
    }
}

/// A request whose KV is on its way.
pub struct Reserved {
    /// Place in the order of arrival.
    pub arrival: u64,
    request: Request,
    hashes: Vec<BlockHash>,
    events: mpsc::Sender<SequenceEvent>,
    held: BlockLease,
    to_fill: Arc<BlockLease>,
    seat: Counted,
}

impl Reserved {
    /// Has its client gone, or its time?
    pub fn is_over(&self) -> bool {
        is_over(&self.events, &self.request)
    }

    /// The request, and the blocks that its KV goes to.
    pub fn to_fill(&self) -> (&Request, &Arc<BlockLease>) {
        (&self.request, &self.to_fill)
    }

    /// The KV is here and verified: decoding begins. The prompt's full blocks become findable: they are the producer's,
    /// and what this node's model writes goes behind them.
    pub fn ready(self, first_token: u32, pool: &BlockPool) -> Sequence {
        let Self { arrival, request, hashes, events, held, to_fill, seat } = self;
        let blocks: Vec<BlockId> = held.blocks().iter().chain(to_fill.blocks()).copied().collect();
        pool.publish(&blocks, &hashes);
        let mut tokens = request.tokens.clone();
        tokens.push(first_token);
        Sequence {
            arrival,
            request,
            tokens,
            blocks,
            events,
            last_token_at: Instant::now(),
            _prompt: Some((held, to_fill)),
            grown: None,
            _seat: seat,
        }
    }
}

/// A request that decodes.
pub struct Sequence {
    /// Place in the order of arrival.
    pub arrival: u64,
    /// As it came.
    pub request: Request,
    /// Prompt and output. The KV of all but the last is in `blocks`.
    pub tokens: Vec<u32>,
    /// From position 0 on.
    pub blocks: Vec<BlockId>,
    events: mpsc::Sender<SequenceEvent>,
    last_token_at: Instant,
    /// The prompt's blocks, as reserved; none once they were swapped out.
    _prompt: Option<(BlockLease, Arc<BlockLease>)>,
    /// All others.
    grown: Option<BlockLease>,
    _seat: Counted,
}

impl Sequence {
    /// Has its client gone, or its time?
    pub fn is_over(&self) -> bool {
        is_over(&self.events, &self.request)
    }

    /// For the scheduler.
    pub fn seat(&self) -> Seat {
        Seat {
            lacks_block: self.blocks.len() < blocks_for(self.tokens.len()),
            sits_out: self.events.capacity() < STEP_EVENTS,
        }
    }

    /// Can its next token be computed now?
    pub fn steps(&self) -> bool {
        let Seat { lacks_block, sits_out } = self.seat();
        !lacks_block && !sits_out
    }

    /// Takes over more blocks.
    pub fn grow(&mut self, lease: BlockLease) {
        self.blocks.extend_from_slice(lease.blocks());
        match &mut self.grown {
            Some(grown) => grown.append(lease),
            None => self.grown = Some(lease),
        }
    }

    /// Prompt, and output so far, as penalties count them.
    pub fn prompt_and_output(&self) -> (&[u32], &[u32]) {
        self.tokens.split_at(self.request.tokens.len() - self.request.generated)
    }

    /// The end, if the output has come to it.
    pub fn finish(&self) -> Option<FinishReason> {
        let output = &self.tokens[self.request.tokens.len()..];
        match output.last() {
            Some(last) if self.request.stop_token_ids.contains(last) => Some(FinishReason::Stop),
            _ => (output.len() >= self.request.max_tokens).then_some(FinishReason::Length),
        }
    }

    /// The next token of the output; returns the time since the last one.
    pub fn push(&mut self, token: OutputToken) -> Duration {
        self.tokens.push(token.token);
        self.tell(SequenceEvent::Token(token));
        let now = Instant::now();
        now - std::mem::replace(&mut self.last_token_at, now)
    }

    /// The engine can't go on with it.
    pub fn fail(self, reason: &str) {
        error!(request = %self.request.id, reason, "the engine gives a request up");
        self.tell(SequenceEvent::Failed(reason.to_owned()));
    }

    /// Says a last word.
    pub fn tell(&self, event: SequenceEvent) {
        // Room was looked for before the step; closed, nobody wants to hear it.
        let _ = self.events.try_send(event);
    }

    /// Copies the KV to host memory and gives the blocks back.
    pub fn swap_out(self, store: &dyn KvStore, load: &Arc<LoadState>) -> Result<Swapped, (Box<Self>, StoreError)> {
        let size = store.block_bytes();
        let mut layers = Vec::with_capacity(store.num_layers());
        for layer in 0..store.num_layers() {
            let mut bytes = vec![0; self.blocks.len() * size];
            let mut copy = |i: usize, block: &[u8]| bytes[i * size..][..size].copy_from_slice(block);
            if let Err(e) = store.read(layer, &self.blocks, &mut copy) {
                return Err((Box::new(self), e));
            }
            layers.push(bytes);
        }
        load.metrics().preemptions.inc();
        Ok(Swapped {
            arrival: self.arrival,
            blocks: self.blocks.len(),
            layers,
            request: self.request,
            tokens: self.tokens,
            events: self.events,
            last_token_at: self.last_token_at,
            _waiting: load.count_waiting(),
        })
    }
}

/// A request that was taken out of the batch.
pub struct Swapped {
    /// Place in the order of arrival.
    pub arrival: u64,
    /// Blocks that it had, and needs again.
    pub blocks: usize,
    /// For each layer, the bytes of its blocks.
    layers: Vec<Vec<u8>>,
    request: Request,
    tokens: Vec<u32>,
    events: mpsc::Sender<SequenceEvent>,
    last_token_at: Instant,
    _waiting: Counted,
}

impl Swapped {
    /// Has its client gone, or its time?
    pub fn is_over(&self) -> bool {
        is_over(&self.events, &self.request)
    }

    /// Copies the KV back, into the blocks of `lease`.
    pub fn swap_in(
        self,
        lease: BlockLease,
        store: &dyn KvStore,
        load: &Arc<LoadState>,
    ) -> Result<Sequence, StoreError> {
        let size = store.block_bytes();
        for (layer, bytes) in self.layers.iter().enumerate() {
            let mut copy = |i: usize, block: &mut [u8]| block.copy_from_slice(&bytes[i * size..][..size]);
            if let Err(e) = store.write(layer, lease.blocks(), &mut copy) {
                let reason = format!("copying KV back from host memory: {e}");
                error!(request = %self.request.id, reason, "the engine gives a request up");
                let _ = self.events.try_send(SequenceEvent::Failed(reason));
                return Err(e);
            }
        }
        Ok(Sequence {
            arrival: self.arrival,
            request: self.request,
            tokens: self.tokens,
            blocks: lease.blocks().to_vec(),
            events: self.events,
            last_token_at: self.last_token_at,
            _prompt: None,
            grown: Some(lease),
            _seat: load.count_running(),
        })
    }
}

#[cfg(test)]
mod tests {
    use overfill_kv::block_hashes;
    use overfill_node::NodeMetrics;
    use overfill_transport::MemoryStore;

    use super::*;

    struct Node {
        pool: BlockPool,
        load: Arc<LoadState>,
    }

    fn node(blocks: usize) -> Node {
        let pool = BlockPool::new(blocks);
        Node { load: LoadState::new(pool.clone(), NodeMetrics::new("m").unwrap(), None, Duration::MAX), pool }
    }

    fn job(node: &Node, tokens: Vec<u32>) -> (Box<Job>, mpsc::Receiver<SequenceEvent>) {
        let (events, receiver) = mpsc::channel(CLIENT_EVENTS);
        let request = Request {
            id: RequestId("r".into()),
            generated: 0,
            sampling: SamplingParams::greedy(),
            max_tokens: 200,
            stop_token_ids: vec![9],
            producer: Some("full".into()),
            deadline: Instant::now(),
            tokens,
        };
        let hashes = block_hashes(&request.tokens, "full");
        let waiting = node.load.try_wait(1).unwrap();
        (Box::new(Job { arrival: 0, request, hashes, events, waiting }), receiver)
    }

    fn decoding(node: &Node, tokens: Vec<u32>) -> (Sequence, mpsc::Receiver<SequenceEvent>) {
        let (job, mut receiver) = job(node, tokens);
        let Ok(reserved) = job.reserve(&node.pool, 0, 4, &node.load) else { panic!("no room") };
        assert!(matches!(receiver.try_recv(), Ok(SequenceEvent::Reserved { .. })));
        (reserved.ready(5, &node.pool), receiver)
    }

    fn token(token: u32) -> OutputToken {
        OutputToken { token, logprob: f32::NAN, top: Vec::new() }
    }

    #[test]
    fn a_request_waits_for_room_and_gives_all_back() {
        let node = node(3);
        let (first, _first_client) = decoding(&node, vec![1; 32]);
        let (second, second_client) = job(&node, vec![2; 32]);
        let Err(second) = second.reserve(&node.pool, 1, 4, &node.load) else { panic!("there is no room") };
        assert_eq!((node.load.load().running, node.load.load().waiting), (1, 1));
        drop(first);
        let Ok(second) = second.reserve(&node.pool, 0, 4, &node.load) else { panic!("there is room") };
        assert_eq!((node.pool.in_use(), node.load.load().running), (2, 1));
        drop((second, second_client));
        assert_eq!(node.pool.in_use(), 0);
        assert_eq!((node.load.load().running, node.load.load().waiting), (0, 0));
    }

    #[test]
    fn a_prompt_is_found_again_but_not_what_was_decoded_behind_it() {
        let node = node(8);
        let (mut sequence, _client) = decoding(&node, vec![1; 40]);
        for _ in 0..30 {
            sequence.push(token(1));
        }
        drop(sequence);
        let hashes = block_hashes(&[1; 70], "full");
        assert_eq!(node.pool.lookup(&hashes).len(), 2);
        assert!(node.pool.lookup(&block_hashes(&[1; 70], "another")).is_empty());
    }

    #[test]
    fn a_client_that_does_not_read_makes_its_sequence_sit_out() {
        let node = node(8);
        let (mut sequence, mut client) = decoding(&node, vec![1; 3]);
        while sequence.steps() {
            sequence.push(token(2));
            if sequence.seat().lacks_block {
                sequence.grow(node.pool.allocate(1).unwrap());
            }
        }
        assert!(sequence.seat().sits_out);
        for _ in 0..2 {
            client.try_recv().unwrap();
        }
        assert!(sequence.steps());
        sequence.push(token(9));
        assert_eq!(sequence.finish(), Some(FinishReason::Stop));
        sequence.tell(SequenceEvent::Finished(FinishReason::Stop));
        let heard = std::iter::from_fn(|| client.try_recv().ok()).last();
        assert!(matches!(heard, Some(SequenceEvent::Finished(FinishReason::Stop))), "{heard:?}");
    }

    #[test]
    fn kv_survives_host_memory() {
        let node = node(6);
        let store = MemoryStore::new(2, 6, 64);
        let (sequence, _client) = decoding(&node, vec![1; 40]);
        for layer in 0..2 {
            let fill = &mut |i: usize, block: &mut [u8]| block.fill((layer * 10 + i) as u8);
            store.write(layer, &sequence.blocks, fill).unwrap();
        }
        let tokens = sequence.tokens.clone();
        let Ok(swapped) = sequence.swap_out(&store, &node.load) else { panic!("reading failed") };
        assert_eq!((node.pool.in_use(), node.load.load().running, node.load.load().waiting), (0, 0, 1));
        let elsewhere = node.pool.allocate(2).unwrap();
        let lease = node.pool.allocate(swapped.blocks).unwrap();
        let sequence = swapped.swap_in(lease, &store, &node.load).unwrap();
        drop(elsewhere);
        assert_eq!(sequence.tokens, tokens);
        assert_eq!((node.load.load().running, node.load.load().waiting), (1, 0));
        for layer in 0..2 {
            let check = &mut |i: usize, block: &[u8]| assert!(block.iter().all(|b| *b == (layer * 10 + i) as u8));
            store.read(layer, &sequence.blocks, check).unwrap();
        }
    }
}
