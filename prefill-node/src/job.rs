//! One prompt: as it arrives, while it runs, and what its requester hears.

use std::{ops::Range, sync::Arc, time::Duration};

use overfill_kv::{
    BLOCK_TOKENS, BlockHash, BlockId, BlockLease, BlockPool, KvEndpoint, KvSchema, KvStore, OutputToken, RequestId,
    SamplingParams, Ticket, TransferStats, blocks_for,
};
use overfill_node::load::{Counted, LoadState, QueuedTokens};
use overfill_transport::{HandoffError, KvLayers, KvSender, SendPlan, TransferConfig};
use tokio::{
    runtime,
    sync::{mpsc, oneshot},
    time::Instant,
};
use tracing::error;

use crate::scheduler::{self, PromptProgress};

/// Most tokens of a chunk whose every logit is wanted: at a vocabulary of 128 k, a row takes half a megabyte.
const PROMPT_LOGPROBS_CHUNK: usize = 128;

/// Events that a job can have in its channel: started, log-probabilities, first token, and one to spare. The engine
/// never waits for a requester.
pub const JOB_EVENTS: usize = 4;

/// A checked request.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its name.
    pub id: RequestId,
    /// The prompt; at least one token.
    pub tokens: Vec<u32>,
    /// The last of `tokens` that are earlier output: penalties count them as such.
    pub generated: usize,
    /// How the first token is chosen.
    pub sampling: SamplingParams,
    /// Report every prompt token's log-probability.
    pub prompt_logprobs: bool,
    /// Where the KV goes.
    pub handoff: Option<Handoff>,
    /// When it has failed.
    pub deadline: Instant,
}

/// Where a prompt's KV goes.
#[derive(Clone, Debug)]
pub struct Handoff {
    /// The right to write there.
    pub ticket: Ticket,
    /// Where the receiver takes it.
    pub endpoint: KvEndpoint,
    /// The receiver's.
    pub schema: KvSchema,
    /// Leading blocks that the receiver holds already.
    pub held_blocks: usize,
}

/// What a requester hears, in this order.
#[derive(Debug)]
pub enum JobEvent {
    /// The prompt has its blocks.
    Started {
        /// Tokens whose KV was here already.
        cached_tokens: usize,
        /// Arrival until now.
        queued: Duration,
        /// The outcome of the handoff, where there is one.
        transfer: Option<Transfer>,
    },
    /// Of prompt tokens 1, 2, ...
    PromptLogprobs(Vec<OutputToken>),
    /// The first token of the output.
    FirstToken {
        /// It.
        token: OutputToken,
        /// Start until now.
        computed_in: Duration,
    },
    /// The engine could not go on with it.
    Failed(String),
}

/// Resolves when a handoff has ended.
pub type Transfer = oneshot::Receiver<Result<TransferStats, HandoffError>>;

/// A request in the engine's queue.
pub struct Job {
    /// The request.
    pub request: Request,
    /// Names of the prompt's full blocks.
    pub hashes: Vec<BlockHash>,
    /// When it came.
    pub arrived: Instant,
    /// To its requester; closed when that one has gone.
    pub events: mpsc::Sender<JobEvent>,
    pub(crate) waiting: Counted,
    pub(crate) queued_tokens: QueuedTokens,
}

impl Job {
    /// Has the requester gone, or its time? The service watches the time, too, but not while its client does not read.
    pub fn is_over(&self) -> bool {
        self.events.is_closed() || Instant::now() >= self.request.deadline
    }

    /// Blocks for the whole prompt, the leading ones from the prefix cache where they are known; `None` if there is no
    /// room now.
    pub fn take_blocks(&self, pool: &BlockPool) -> Option<(BlockLease, usize)> {
        let total = blocks_for(self.request.tokens.len());
        // Log-probabilities need every token's logits, so every token is computed.
        let cacheable = match self.request.prompt_logprobs {
            true => 0,
            false => scheduler::cacheable_blocks(self.request.tokens.len()),
        };
        let mut lease = pool.lookup(&self.hashes[..cacheable]);
        let cached = lease.len();
        lease.append(pool.allocate(total - cached).ok()?);
        Some((lease, cached))
    }
}

/// What a job needs of its surroundings to hand KV over.
pub struct HandoffContext {
    /// Where transfers run.
    pub runtime: runtime::Handle,
    /// The KV.
    pub store: Arc<dyn KvStore>,
    /// How it is sent.
    pub config: TransferConfig,
    /// Where transfers are counted.
    pub load: Arc<LoadState>,
}

/// A prompt in the batch.
pub struct Running {
    /// The request.
    pub request: Request,
    /// Names of the prompt's full blocks.
    pub hashes: Vec<BlockHash>,
    /// The prompt's blocks, in order.
    pub blocks: Vec<BlockId>,
    /// Tokens whose KV is there.
    pub computed: usize,
    /// Of the prompt, so far.
    pub logprobs: Vec<OutputToken>,
    arrived: Instant,
    started: Instant,
    events: mpsc::Sender<JobEvent>,
    sender: Option<KvSender>,
    queued_tokens: QueuedTokens,
    lease: Arc<BlockLease>,
    _running: Counted,
}

impl Running {
    /// Starts a job that has its blocks, of which `cached` hold their KV already.
    pub fn start(job: Job, lease: BlockLease, cached: usize, context: &HandoffContext) -> Self {
        let Job { request, hashes, arrived, events, waiting, mut queued_tokens } = job;
        drop(waiting);
        let started = Instant::now();
        let blocks = lease.blocks().to_vec();
        let lease = Arc::new(lease);
        queued_tokens.computed(cached * BLOCK_TOKENS);
        let (sender, transfer) = match &request.handoff {
            Some(handoff) => {
                let (sender, transfer) = context.start(&request, handoff, &blocks, &lease);
                for layer in handoff.schema.layers.iter().filter(|_| handoff.held_blocks < cached) {
                    sender.layers().ready(*layer as usize, handoff.held_blocks as u32..cached as u32);
                }
                (Some(sender), Some(transfer))
            }
            None => (None, None),
        };
        let metrics = context.load.metrics();
        metrics.prompt_tokens.inc_by(request.tokens.len() as u64);
        metrics.prefix_cache_queries.inc_by(request.tokens.len() as u64);
        metrics.prefix_cache_hits.inc_by((cached * BLOCK_TOKENS) as u64);
        let running = Self {
            computed: cached * BLOCK_TOKENS,
            logprobs: Vec::new(),
            request,
            hashes,
            blocks,
            arrived,
            started,
            events,
            sender,
            queued_tokens,
            lease,
            _running: context.load.count_running(),
        };
        let cached_tokens = running.computed;
        running.tell(JobEvent::Started { cached_tokens, queued: started - arrived, transfer });
        running
    }

    /// Has the requester gone, or its time?
    pub fn is_over(&self) -> bool {
        self.events.is_closed() || Instant::now() >= self.request.deadline
    }

    /// For the scheduler.
    pub fn progress(&self) -> PromptProgress {
        let max_chunk = if self.request.prompt_logprobs { PROMPT_LOGPROBS_CHUNK } else { usize::MAX };
        PromptProgress { computed: self.computed, total: self.request.tokens.len(), max_chunk }
    }

    /// What hears of the layers of a step that computes `tokens` of the prompt.
    pub(crate) fn chunk_layers(&self, tokens: &Range<usize>) -> ChunkLayers {
        let last = scheduler::final_blocks(tokens, self.request.tokens.len());
        let full = tokens.start / BLOCK_TOKENS..tokens.end / BLOCK_TOKENS;
        ChunkLayers {
            sender: self.sender.as_ref().map(|sender| sender.layers().clone()),
            announced: last.start as u32..last.end as u32,
            blocks: self.blocks[full.clone()].to_vec(),
            hashes: self.hashes[full].to_vec(),
            _lease: self.lease.clone(),
        }
    }

    /// The prompt is computed up to `end`.
    pub fn advance(&mut self, end: usize) {
        self.queued_tokens.computed(end - self.computed);
        self.computed = end;
    }

    /// The prompt is done: its requester and its receiver get the first token.
    pub fn finish(mut self, token: OutputToken, load: &LoadState) {
        if self.request.prompt_logprobs {
            let tokens = std::mem::take(&mut self.logprobs);
            self.tell(JobEvent::PromptLogprobs(tokens));
        }
        load.metrics().generation_tokens.inc();
        load.metrics().time_to_first_token_seconds.observe(self.arrived.elapsed().as_secs_f64());
        let first_token = token.token;
        // Before the commit: the outcome of the handoff is the later event.
        self.tell(JobEvent::FirstToken { token, computed_in: self.started.elapsed() });
        if let Some(sender) = &self.sender {
            sender.commit(first_token);
        }
    }

    /// The engine can't go on with it.
    pub fn fail(self, reason: &str) {
        error!(request = %self.request.id, reason, "the engine gives a prompt up");
        self.tell(JobEvent::Failed(reason.to_owned()));
    }

    fn tell(&self, event: JobEvent) {
        // The channel has room for all that a job can say; closed, nobody wants to hear it.
        let _ = self.events.try_send(event);
    }
}

/// One prompt's part of a step. It hears of the step's layers from the engine's thread or a device's, perhaps after the
/// step, and holds the prompt's blocks until the engine lets go of it.
pub(crate) struct ChunkLayers {
    sender: Option<KvLayers>,
    /// Blocks of the prompt that are final after the step, by index.
    announced: Range<u32>,
    /// Full blocks that the step completes, and their names.
    blocks: Vec<BlockId>,
    hashes: Vec<BlockHash>,
    _lease: Arc<BlockLease>,
}

impl ChunkLayers {
    /// The KV of `layer` is final: what the receiver lacks of it may leave.
    pub(crate) fn ready(&self, layer: usize) {
        if let Some(sender) = &self.sender {
            sender.ready(layer, self.announced.clone());
        }
    }

    /// The KV of all layers is final: the prompt's full blocks become findable. Not before: another prompt that finds them
    /// hands them over at once.
    pub(crate) fn publish(&self, pool: &BlockPool) {
        pool.publish(&self.blocks, &self.hashes);
    }
}

impl HandoffContext {
    /// Starts the sending side of one handoff.
    fn start(
        &self,
        request: &Request,
        handoff: &Handoff,
        blocks: &[BlockId],
        lease: &Arc<BlockLease>,
    ) -> (KvSender, Transfer) {
        let to_send = blocks.len().saturating_sub(handoff.held_blocks);
        let plan = SendPlan {
            endpoint: handoff.endpoint.clone(),
            ticket: handoff.ticket,
            request_id: request.id.clone(),
            schema: handoff.schema.clone(),
            blocks: blocks.to_vec(),
            lease: lease.clone(),
            held_blocks: handoff.held_blocks as u32,
            prompt_tokens: request.tokens.len() as u32,
            // A chunk has at least a block, and what was cached is one piece more.
            max_pieces: handoff.schema.layers.len() * (to_send + 1),
            deadline: request.deadline,
        };
        let bytes = (to_send * handoff.schema.layers.len() * handoff.schema.block_bytes()) as u64;
        let open = self.load.count_handoff();
        let load = self.load.clone();
        let _runtime = self.runtime.enter();
        let (sender, mut ended) = KvSender::start(plan, self.store.clone(), self.config.clone());
        let (mut tell, transfer) = oneshot::channel();
        self.runtime.spawn(async move {
            let outcome = tokio::select! {
                outcome = &mut ended => outcome,
                () = tell.closed() => {
                    // KV-2: the blocks stay the receiver's until it has confirmed or the deadline is over.
                    let _stranded = load.count_stranded(bytes);
                    (&mut ended).await
                }
            };
            drop(open);
            match &outcome {
                Ok(Ok(stats)) => {
                    load.metrics().transfer_bytes.inc_by(stats.bytes);
                    load.metrics().transfer_seconds.observe(stats.seconds);
                    load.metrics().transfer_exposed_seconds.observe(stats.exposed_seconds);
                }
                _ => load.metrics().transfer_failures.inc(),
            }
            if let Ok(outcome) = outcome {
                let _ = tell.send(outcome);
            }
        });
        (sender, transfer)
    }
}
