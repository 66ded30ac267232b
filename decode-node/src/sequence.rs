//! A request in the engine, by stage: queued ([`Job`]), waiting for KV ([`Reserved`]), decoding ([`Sequence`]),
//! preempted ([`Swapped`]).

use std::sync::Arc;

use overfill_kv::{
    BlockHash, BlockId, BlockLease, BlockPool, FinishReason, KvStore, Mode, OutputToken, RequestId, SamplingParams,
    StoreError, Windows, blocks_for,
};
use overfill_node::{Constraint, LoadState, load::Counted};
use tokio::{sync::mpsc, time::Instant};

use crate::{
    engine::EngineLimits,
    extension::Ask,
    flow::Flow,
    scheduler::{self, Occupancy, Seat},
};

/// Capacity of the event channel to a client. A sequence skips steps while its channel is nearly full.
pub const CLIENT_EVENTS: usize = 64;

/// A checked request.
#[derive(Clone, Debug)]
pub struct Request {
    /// Id of the request.
    pub id: RequestId,
    /// Which of the node's models decodes: 0 is the node's model, the others are its variants.
    pub variant: usize,
    /// Token ids of the prompt; at least one.
    pub tokens: Vec<u32>,
    /// Number of tokens at the end of `tokens` that are earlier output. Penalties treat them as output.
    pub generated: usize,
    /// Sampling parameters.
    pub sampling: SamplingParams,
    /// The tokens that may come next in the output; `None`: all.
    pub constraint: Option<Constraint>,
    /// Maximum number of output tokens, including the first one from the prefill node; at least 2.
    pub max_tokens: usize,
    /// Token ids that end the output. The stop token is its last token.
    pub stop_token_ids: Vec<u32>,
    /// Fingerprint of the full model that computes the prompt's KV, if known. Without it, the prefix cache is not used.
    pub producer: Option<String>,
    /// Time at which the request fails if it has not ended.
    pub deadline: Instant,
    /// What the full model does after the first token.
    pub mode: Mode,
}

impl Request {
    /// Earlier output.
    pub fn output(&self) -> &[u32] {
        &self.tokens[self.tokens.len() - self.generated..]
    }
}

/// An event of a request, in the order in which the client receives them.
#[derive(Debug)]
pub enum SequenceEvent {
    /// The blocks for the prompt's KV are reserved.
    Reserved {
        /// Blocks that the prefill node must fill.
        to_fill: Arc<BlockLease>,
        /// Number of leading blocks of the prompt that are not needed: they were found in the prefix cache, or no layer
        /// attends to them.
        held_blocks: usize,
        /// Number of blocks that were found in the prefix cache.
        cached_blocks: usize,
    },
    /// The next token of the output, from the second one on. The first one comes from the prefill node.
    Token(OutputToken),
    /// The output is complete. The last event.
    Finished(FinishReason),
    /// The full model is to go on with the sequence.
    Extension {
        /// What it is to do.
        ask: Ask,
        /// The block for its KV, if that is wanted.
        place: Option<Arc<BlockLease>>,
    },
    /// The place of the last extension's KV is not needed any more.
    LandingOver,
    /// The request failed in the engine, for the given reason. The last event.
    Failed(String),
    /// The request's grammar can't be followed any further, for the given reason: the fault of the request. The last event.
    Refused(String),
}

/// A request in the engine's queue.
pub struct Job {
    /// Arrival number. It identifies the request, and a lower number has priority.
    pub arrival: u64,
    /// The request.
    pub request: Request,
    /// Hashes of the prompt's full blocks; empty if the producer is unknown.
    pub hashes: Vec<BlockHash>,
    /// Event channel to the client; closed when the client has dropped its receiver.
    pub events: mpsc::Sender<SequenceEvent>,
    pub(crate) waiting: Counted,
}

/// Whether a request is over: its client is gone or its deadline has passed. The service checks the deadline too, but
/// not while its client does not read.
pub(crate) fn is_over(events: &mpsc::Sender<SequenceEvent>, request: &Request) -> bool {
    events.is_closed() || Instant::now() >= request.deadline
}

impl Job {
    /// Whether the request is over: its client is gone or its deadline has passed.
    pub fn is_over(&self) -> bool {
        is_over(&self.events, &self.request)
    }

    /// Reserves the blocks for the prompt, and uses cached ones where possible. Sends [`SequenceEvent::Reserved`].
    ///
    /// # Errors
    /// There is no room now: returns the job unchanged.
    pub fn reserve(
        self: Box<Self>,
        pool: &BlockPool,
        seated: usize,
        limits: &EngineLimits,
        load: &Arc<LoadState>,
    ) -> Result<Reserved, Box<Self>> {
        let tokens = self.request.tokens.len();
        let unneeded = limits.windows.unneeded_blocks(tokens);
        let held = self.cached(pool, limits.windows);
        let (cached_blocks, held_blocks) = (held.len(), unneeded + held.len());
        let missing = blocks_for(tokens) - held_blocks;
        let node = Occupancy { available: pool.available(), seated, max_seated: limits.max_running };
        let to_fill = match node.admits(missing).then(|| pool.allocate(missing)) {
            Some(Ok(lease)) => Arc::new(lease),
            _ => return Err(self),
        };
        let metrics = load.metrics();
        metrics.prompt_tokens.inc_by(tokens as u64);
        metrics.prefix_cache_queries.inc_by(tokens as u64);
        metrics.prefix_cache_hits.inc_by((cached_blocks * overfill_kv::BLOCK_TOKENS) as u64);
        let Self { arrival, request, hashes, events, waiting } = *self;
        drop(waiting);
        let reserved = SequenceEvent::Reserved { to_fill: to_fill.clone(), held_blocks, cached_blocks };
        let _ = events.try_send(reserved);
        Ok(Reserved { arrival, request, hashes, events, unneeded, held, to_fill, seat: load.count_running() })
    }

    /// Cached blocks of the prompt, from the first one that a layer needs.
    fn cached(&self, pool: &BlockPool, windows: Windows) -> BlockLease {
        let tokens = self.request.tokens.len();
        let end = scheduler::holdable_blocks(tokens).min(self.hashes.len());
        let start = windows.unneeded_blocks(tokens).min(end);
        let hashes = &self.hashes[start..end];
        // Layers with windows do not need the blocks before theirs, so those may lack their KV.
        let before = windows.windowed_from(tokens).saturating_sub(start);
        let partial: Vec<_> = hashes.iter().take(before).map(BlockHash::without_windows).collect();
        pool.lookup_either(hashes, &partial)
    }
}

/// A request with reserved blocks whose KV has not arrived yet.
pub struct Reserved {
    /// Arrival number.
    pub arrival: u64,
    request: Request,
    hashes: Vec<BlockHash>,
    events: mpsc::Sender<SequenceEvent>,
    /// Leading blocks of the prompt that no layer needs.
    unneeded: usize,
    held: BlockLease,
    to_fill: Arc<BlockLease>,
    seat: Counted,
}

impl Reserved {
    /// Whether the request is over: its client is gone or its deadline has passed.
    pub fn is_over(&self) -> bool {
        is_over(&self.events, &self.request)
    }

    /// Returns the request and the blocks that the prefill node must fill.
    pub fn to_fill(&self) -> (&Request, &Arc<BlockLease>) {
        (&self.request, &self.to_fill)
    }

    /// Begins decoding, after the KV has arrived and is verified (KV-5). Publishes the full blocks of the prompt in the
    /// prefix cache. They hold only KV of the full model, because this node's model writes only to later positions.
    pub fn ready(self, first_token: u32, pool: &BlockPool, windows: Windows) -> Sequence {
        let Self { arrival, request, hashes, events, unneeded, held: mut lease, to_fill, seat } = self;
        // The transport may still hold its own share of the received blocks.
        lease.append(to_fill.share());
        let blocks = block_table(unneeded, &lease);
        // Earlier blocks lack the KV of layers whose windows have left them behind. Those layers of a longer prompt do not
        // need it either.
        let complete = windows.complete_from(request.tokens.len()).min(blocks.len() - 1);
        let name = |(i, hash): (usize, &BlockHash)| if i < complete { hash.without_windows() } else { *hash };
        let names: Vec<_> = hashes.iter().enumerate().skip(unneeded).map(name).collect();
        pool.publish(lease.blocks(), &names);
        let flow = Flow::new(arrival, request, first_token, events);
        Sequence { flow, blocks, forgotten: unneeded, lease, _seat: seat }
    }
}

/// The block table of a sequence whose first blocks are not kept. Nothing reads them, but each place needs the id of some
/// block.
fn block_table(forgotten: usize, lease: &BlockLease) -> Vec<BlockId> {
    let kept = lease.blocks();
    kept.iter().take(1).cycle().take(forgotten).chain(kept).copied().collect()
}

/// A request in the decode batch.
pub struct Sequence {
    /// The request and its output.
    pub flow: Flow,
    /// KV blocks, in order of position. The first [`forgotten`](Self::forgotten) ones are other blocks.
    pub blocks: Vec<BlockId>,
    /// Number of leading blocks that are not kept, because no layer needs them.
    pub forgotten: usize,
    /// Lease of the other blocks, at least one.
    lease: BlockLease,
    _seat: Counted,
}

impl Sequence {
    /// State of the sequence, as input of the scheduler.
    pub fn seat(&self) -> Seat {
        let flow = &self.flow;
        let waits = flow.waits();
        Seat {
            // A sequence that waits does not grow: the full model's KV may need the block.
            lacks_block: self.lacks_landing() || (!waits && self.blocks.len() < blocks_for(flow.tokens.len())),
            sits_out: !flow.is_heard(),
            waits,
        }
    }

    /// Whether the next token can be computed now.
    pub fn steps(&self) -> bool {
        let Seat { lacks_block, sits_out, waits } = self.seat();
        !lacks_block && !sits_out && !waits
    }

    /// Whether the sequence needs a block for KV of the full model. In mode refresh, it can't go on without that. In mode
    /// exact, it only drafts better with it.
    pub fn lacks_landing(&self) -> bool {
        self.flow.extensions.mode() == Mode::Refresh && self.flow.wants_landing()
    }

    /// Appends the blocks of `lease` to the sequence.
    pub fn grow(&mut self, lease: BlockLease) {
        self.blocks.extend_from_slice(lease.blocks());
        self.lease.append(lease);
    }

    /// Gives back the blocks that no layer needs any more.
    pub fn forget(&mut self, windows: Windows) {
        let Flow { tokens, computed, extensions, .. } = &self.flow;
        // A verdict may drop drafts. Then the last standing token is the first one that is fed again.
        let next = (*computed).min(extensions.standing(tokens.len()) - 1);
        let needed = windows.needed_from(next).min(self.blocks.len() - 1);
        if needed > self.forgotten {
            self.lease = self.lease.split_off(needed - self.forgotten);
            self.forgotten = needed;
            self.blocks = block_table(needed, &self.lease);
        }
    }

    /// Uses the KV of the full model that has arrived, if it is time.
    pub fn refresh(&mut self) {
        let flow = &mut self.flow;
        while let Some((index, place)) = flow.extensions.take_landed(flow.tokens.len()) {
            // If a window has left the block behind, nothing attends to it.
            if let Some(index) = index.checked_sub(self.forgotten) {
                // The prompt's blocks are there, and blocks follow one another. So the block exists, or is the next one.
                self.lease.replace(index, place.share());
                self.blocks = block_table(self.forgotten, &self.lease);
            }
            let known = flow.extensions.refreshed_tokens().min(flow.tokens.len() - 1);
            flow.computed = flow.computed.max(known);
        }
    }

    /// Preempts the sequence: copies its KV to host memory and frees its blocks.
    ///
    /// # Errors
    /// Reading the KV failed: returns the sequence unchanged.
    pub fn swap_out(mut self, store: &dyn KvStore, load: &Arc<LoadState>) -> Result<Swapped, (Box<Self>, StoreError)> {
        let size = store.block_bytes();
        let mut layers = Vec::with_capacity(store.num_layers());
        for layer in 0..store.num_layers() {
            let mut bytes = vec![0; self.lease.len() * size];
            let mut copy = |i: usize, block: &[u8]| bytes[i * size..][..size].copy_from_slice(block);
            if let Err(e) = store.read(layer, self.lease.blocks(), &mut copy) {
                return Err((Box::new(self), e));
            }
            layers.push(bytes);
        }
        load.metrics().preemptions.inc();
        self.flow.extensions.give_up_landed();
        let (blocks, forgotten) = (self.lease.len(), self.forgotten);
        Ok(Swapped { blocks, forgotten, layers, flow: self.flow, _waiting: load.count_waiting() })
    }
}

/// A preempted request. Its KV is in host memory.
pub struct Swapped {
    /// The request and its output.
    pub flow: Flow,
    /// Number of blocks that the request had and needs to resume.
    pub blocks: usize,
    forgotten: usize,
    /// Bytes of the blocks, for each layer.
    layers: Vec<Vec<u8>>,
    _waiting: Counted,
}

impl Swapped {
    /// Resumes the request: copies its KV into the blocks of `lease`, which must have [`blocks`](Self::blocks) blocks.
    ///
    /// # Errors
    /// Writing the KV failed. The error has been logged and sent to the client.
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
                self.flow.fail(&format!("copying KV back from host memory: {e}"));
                return Err(e);
            }
        }
        let blocks = block_table(self.forgotten, &lease);
        Ok(Sequence { flow: self.flow, blocks, forgotten: self.forgotten, lease, _seat: load.count_running() })
    }
}

#[cfg(test)]
mod tests;
