//! A prompt in the engine: the queued job, the running prompt, its events, and its handoff.

use std::{ops::Range, sync::Arc, time::Duration};

use overfill_kv::{
    BLOCK_TOKENS, BlockHash, BlockId, BlockLease, BlockPool, KvEndpoint, KvSchema, OutputToken, RequestId,
    SamplingParams, Ticket, TransferStats, block_hashes, blocks_for,
};
use overfill_node::{
    Constraint,
    load::{Counted, LoadState, QueuedTokens},
};
use overfill_transport::{HandoffError, KvLayers, KvSender};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use tracing::{Span, error, info_span};

use crate::{
    extension::{ExtendError, ExtendReply, Extended, Extending, Extension, Followed},
    gather::Pauses,
    handoff::HandoffContext,
    scheduler::{self, PromptProgress},
};

/// Maximum chunk length of a prompt with log-probabilities. Each token needs a row of logits, which takes 0.5 MB at a
/// vocabulary of 128 k.
const PROMPT_LOGPROBS_CHUNK: usize = 128;

/// Capacity of a job's event channel: started, log-probabilities, first token, evicted, and one spare. It holds all events of a
/// job, so the engine never waits for a requester.
pub const JOB_EVENTS: usize = 5;

/// A checked request.
#[derive(Clone, Debug)]
pub struct Request {
    /// Id of the request.
    pub id: RequestId,
    /// Token ids of the prompt; at least one.
    pub tokens: Vec<u32>,
    /// Number of tokens at the end of `tokens` that are earlier output. Penalties treat them as output.
    pub generated: usize,
    /// Sampling parameters for the first token.
    pub sampling: SamplingParams,
    /// The tokens that the first token may be; `None`: all.
    pub constraint: Option<Constraint>,
    /// Whether to report the log-probabilities of the prompt tokens.
    pub prompt_logprobs: bool,
    /// Receiver of the KV; `None`: the KV is not sent.
    pub handoff: Option<Handoff>,
    /// Name of the request in extensions; `None`: the request ends with its first token.
    pub lease: Option<Ticket>,
    /// Time at which the request fails if it has not ended.
    pub deadline: Instant,
    /// Span of the request.
    pub span: Span,
}

impl Request {
    /// The prompt, without earlier output.
    pub fn prompt(&self) -> &[u32] {
        &self.tokens[..self.tokens.len() - self.generated]
    }

    /// Earlier output.
    pub fn output(&self) -> &[u32] {
        &self.tokens[self.tokens.len() - self.generated..]
    }
}

/// The receiver of a prompt's KV.
#[derive(Clone, Debug)]
pub struct Handoff {
    /// Authorizes this sender to write the KV (KV-4).
    pub ticket: Ticket,
    /// KV address of the receiver.
    pub endpoint: KvEndpoint,
    /// KV schema of the receiver.
    pub schema: KvSchema,
    /// Number of leading blocks that the receiver holds already. They are not sent.
    pub held_blocks: usize,
}

/// An event of a job, in the order in which the requester receives them. [`Failed`](Self::Failed) may come at any
/// point.
#[derive(Debug)]
pub enum JobEvent {
    /// The prompt has its blocks and is in the batch.
    Started {
        /// Number of prompt tokens found in the prefix cache.
        cached_tokens: usize,
        /// Time from arrival to start.
        queued: Duration,
        /// Outcome of the handoff, if there is one.
        transfer: Option<Transfer>,
    },
    /// Log-probabilities of the prompt tokens from position 1 on.
    PromptLogprobs(Vec<OutputToken>),
    /// The prompt is computed.
    FirstToken {
        /// First token of the output.
        token: OutputToken,
        /// Time from start to first token.
        computed_in: Duration,
    },
    /// The computation failed, for the given reason. The last event.
    Failed(String),
    /// The open prefill was ended to make room. The last event.
    Evicted,
}

/// Resolves with the outcome when a handoff has ended.
pub type Transfer = oneshot::Receiver<Result<TransferStats, HandoffError>>;

/// A request in the engine's queue.
pub struct Job {
    /// The request.
    pub request: Request,
    /// Hashes of the prompt's full blocks.
    pub hashes: Vec<BlockHash>,
    /// Time of arrival.
    pub arrived: Instant,
    /// Event channel to the requester; closed when the requester has dropped its receiver.
    pub events: mpsc::Sender<JobEvent>,
    pub(crate) waiting: Counted,
    pub(crate) queued_tokens: QueuedTokens,
    /// Span of the wait.
    pub(crate) queued: Span,
}

impl Job {
    /// Whether the request is over: its requester is gone or its deadline has passed. The service checks the deadline
    /// too, but not while its client does not read.
    pub fn is_over(&self) -> bool {
        self.events.is_closed() || Instant::now() >= self.request.deadline
    }

    /// Takes the blocks for the whole prompt. Leading blocks come from the prefix cache if they are found there.
    /// Returns the lease and the number of cached blocks, or `None` if too few blocks are available now.
    pub fn take_blocks(&self, pool: &BlockPool) -> Option<(BlockLease, usize)> {
        let total = blocks_for(self.request.tokens.len());
        // Log-probabilities need the logits of every token, so every token must be computed.
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

/// A prompt in the batch.
pub struct Running {
    /// The request.
    pub request: Request,
    /// Hashes of the prompt's full blocks.
    pub hashes: Vec<BlockHash>,
    /// Blocks of the prompt, in order of position.
    pub blocks: Vec<BlockId>,
    /// Number of leading tokens whose KV is computed or cached.
    pub computed: usize,
    /// Log-probabilities of the prompt tokens, so far.
    pub logprobs: Vec<OutputToken>,
    /// The extension that is computed; `None` while the prompt is.
    pub extending: Option<Extending>,
    /// The times between its extensions.
    pub pauses: Pauses,
    /// The grammar, in an open prefill that has one.
    followed: Option<Followed>,
    arrived: Instant,
    started: Instant,
    events: mpsc::Sender<JobEvent>,
    sender: Option<KvSender>,
    queued_tokens: QueuedTokens,
    lease: Arc<BlockLease>,
    /// `None` while the prefill is open and idle.
    running: Option<Counted>,
    /// Span of the computation.
    computing: Span,
}

impl Running {
    /// Starts a job with its blocks in `lease`. The KV of the first `cached` blocks is already computed. Starts the
    /// handoff and sends the cached blocks that the receiver lacks.
    pub fn start(job: Job, lease: BlockLease, cached: usize, context: &HandoffContext) -> Self {
        let Job { request, hashes, arrived, events, waiting, mut queued_tokens, queued } = job;
        drop((waiting, queued));
        let _in_span = request.span.clone().entered();
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
            extending: None,
            pauses: Pauses::default(),
            followed: None,
            request,
            hashes,
            blocks,
            arrived,
            started,
            events,
            sender,
            queued_tokens,
            lease,
            running: Some(context.load.count_running()),
            computing: info_span!("compute", cached_tokens = cached * BLOCK_TOKENS),
        };
        let cached_tokens = running.computed;
        running.tell(JobEvent::Started { cached_tokens, queued: started - arrived, transfer });
        running
    }

    /// Whether the request is over: its requester is gone or its deadline has passed.
    pub fn is_over(&self) -> bool {
        self.events.is_closed() || Instant::now() >= self.request.deadline
    }

    /// Progress of the prompt, as input of the scheduler.
    pub fn progress(&self) -> PromptProgress {
        let max_chunk = if self.request.prompt_logprobs { PROMPT_LOGPROBS_CHUNK } else { usize::MAX };
        PromptProgress { computed: self.computed, total: self.request.tokens.len(), max_chunk }
    }

    /// Creates the receiver of layer announcements for a step that computes `tokens` of the prompt.
    pub(crate) fn chunk_layers(&self, tokens: &Range<usize>) -> ChunkLayers {
        let mut last = scheduler::final_blocks(tokens, self.request.tokens.len());
        let mut full = tokens.start / BLOCK_TOKENS..tokens.end / BLOCK_TOKENS;
        if let Some(extending) = &self.extending {
            // Which tokens stand is known only after the step, so the next extension publishes blocks.
            full = 0..0;
            last.end = last.end.min(extending.handoff_end_blocks);
            last.start = last.start.min(last.end);
        }
        ChunkLayers {
            sender: self.sender.as_ref().map(|sender| sender.layers().clone()),
            announced: last.start as u32..last.end as u32,
            blocks: self.blocks[full.clone()].to_vec(),
            hashes: self.hashes[full].to_vec(),
            _lease: self.lease.clone(),
        }
    }

    /// Records that the prompt is computed up to position `end`.
    pub fn advance(&mut self, end: usize) {
        self.queued_tokens.computed(end - self.computed);
        self.computed = end;
    }

    /// Ends the prompt: sends the first token to the requester and commits the handoff with it. Returns the request if it
    /// stays open.
    pub fn finish(mut self, token: OutputToken, load: &LoadState) -> Option<(Ticket, Self)> {
        if self.request.prompt_logprobs {
            let tokens = std::mem::take(&mut self.logprobs);
            self.tell(JobEvent::PromptLogprobs(tokens));
        }
        load.metrics().generation_tokens.inc();
        load.metrics().time_to_first_token_seconds.observe(self.arrived.elapsed().as_secs_f64());
        let first_token = token.token;
        // Sent before the commit, so that the outcome of the handoff comes after this event.
        self.tell(JobEvent::FirstToken { token, computed_in: self.started.elapsed() });
        if let Some(sender) = &self.sender {
            sender.commit(first_token);
        }
        let lease = self.request.lease?;
        let tokens = self.request.tokens.len();
        self.followed = self.request.constraint.take().map(|constraint| Followed { constraint, tokens });
        self.rest();
        Some((lease, self))
    }

    /// Gives up what only a computed request has.
    fn rest(&mut self) {
        (self.sender, self.running, self.computing) = (None, None, Span::none());
    }

    /// Begins an extension of an open prefill. Sends those of its blocks that are computed already.
    ///
    /// # Errors
    /// The extension does not continue the sequence, or there is no room for its tokens: returns the prefill, which can't go
    /// on.
    pub fn extend(
        mut self,
        extension: Extension,
        producer: &str,
        allocate: impl FnOnce(usize) -> Option<BlockLease>,
        context: &HandoffContext,
    ) -> Result<Self, Box<Self>> {
        let Extension { position, tokens, standing, choose, handoff, handoff_end_blocks, reply, .. } = extension;
        let known = self.request.tokens.len();
        let is_behind = self.followed.as_ref().is_some_and(|followed| choose && position < followed.tokens);
        let prompt = known - self.request.generated;
        if !(prompt..=known).contains(&position) || is_behind {
            return self.refuse(ExtendError::NotOpen(position), reply);
        }
        let _in_span = self.request.span.clone().entered();
        self.publish(position, producer, &context.pool);
        let same = self.request.tokens[position..].iter().zip(&tokens).take_while(|(a, b)| a == b).count();
        // The last standing token is computed even if it is known: what follows it is wanted.
        let kept = position + if choose { same.min(standing - 1) } else { same };
        self.request.tokens.truncate(position);
        self.request.tokens.extend(tokens);
        let standing_end = position + standing;
        let mut allowed = Vec::new();
        if let Some(followed) = self.followed.as_mut().filter(|_| choose) {
            match followed.allowed(&self.request.tokens, position, standing_end) {
                Ok(sets) => allowed = sets,
                Err(e) => return self.refuse(e.into(), reply),
            }
            self.request.tokens.truncate(standing_end + allowed.len() - 1);
        }
        self.computed = self.computed.min(kept);
        self.request.generated = self.request.tokens.len() - prompt;
        let missing = blocks_for(self.request.tokens.len()).saturating_sub(self.blocks.len());
        if missing > 0 {
            let Some(grown) = allocate(missing) else { return self.refuse(ExtendError::Evicted, reply) };
            self.blocks.extend_from_slice(grown.blocks());
            let mut lease = self.lease.share();
            lease.append(grown);
            self.lease = Arc::new(lease);
        }
        if let Some(handoff) = handoff {
            let computed = (self.computed / BLOCK_TOKENS).min(handoff_end_blocks);
            let sender = context.extend(&self.request, &handoff, &self.blocks[..handoff_end_blocks], &self.lease);
            for layer in handoff.schema.layers.iter().filter(|_| handoff.held_blocks < computed) {
                sender.layers().ready(*layer as usize, handoff.held_blocks as u32..computed as u32);
            }
            self.sender = Some(sender);
        }
        self.queued_tokens = context.load.count_tokens(self.request.tokens.len() - self.computed);
        self.running = Some(context.load.count_running());
        self.computing = info_span!("extend", tokens = self.request.tokens.len() - self.computed);
        let choices = Vec::new();
        self.extending = Some(Extending { standing_end, choose, allowed, choices, handoff_end_blocks, reply });
        Ok(self)
    }

    fn refuse(self, error: ExtendError, reply: ExtendReply) -> Result<Self, Box<Self>> {
        let _ = reply.send(Err(error));
        Err(Box::new(self))
    }

    /// Whether a transfer still holds the blocks. Dropping the prefill would then free none of them.
    pub fn is_being_sent(&self) -> bool {
        Arc::strong_count(&self.lease) > 1
    }

    /// Whether all tokens are computed.
    pub fn is_computed(&self) -> bool {
        self.computed == self.request.tokens.len()
    }

    /// Publishes the full blocks before `position`, whose tokens stand.
    fn publish(&mut self, position: usize, producer: &str, pool: &BlockPool) {
        let full = position.min(self.computed) / BLOCK_TOKENS;
        if full > self.hashes.len() {
            self.hashes = block_hashes(&self.request.tokens[..full * BLOCK_TOKENS], producer);
            pool.publish(&self.blocks[..full], &self.hashes);
        }
    }

    /// Ends an extension: replies, commits its handoff, and drops the drafts that do not stand. `seconds_per_draft`: see
    /// [`Extended`].
    pub fn extended(mut self, seconds_per_draft: Option<f64>, load: &LoadState) -> Option<(Ticket, Self)> {
        let extending = self.extending.take()?;
        if let Some(sender) = &self.sender {
            sender.commit(0);
        }
        if extending.choose {
            let accepted = extending.accepted(&self.request.tokens);
            let end = extending.standing_end + accepted;
            self.request.generated -= self.request.tokens.len() - end;
            self.request.tokens.truncate(end);
            self.computed = self.computed.min(end);
            let mut tokens = extending.choices;
            tokens.truncate(accepted + 1);
            load.metrics().generation_tokens.inc_by(tokens.len() as u64);
            let _ = extending.reply.send(Ok(Extended { tokens, seconds_per_draft }));
        } else {
            let _ = extending.reply.send(Ok(Extended { tokens: Vec::new(), seconds_per_draft }));
        }
        self.rest();
        Some((self.request.lease?, self))
    }

    /// Ends an open prefill to make room.
    pub fn evict(self) {
        self.tell(JobEvent::Evicted);
    }

    /// Ends the prompt with an error: logs it and sends [`JobEvent::Failed`].
    pub fn fail(self, reason: &str) {
        error!(request = %self.request.id, reason, "the prompt failed in the engine");
        self.tell(JobEvent::Failed(reason.to_owned()));
        if let Some(extending) = self.extending {
            let _ = extending.reply.send(Err(ExtendError::Failed(reason.to_owned())));
        }
    }

    fn tell(&self, event: JobEvent) {
        // Never full, because the channel has room for all events of a job. If it is closed, the requester is gone.
        let _ = self.events.try_send(event);
    }
}

/// The part of a step that computes one prompt. The engine's thread or a device thread announces the layers to it,
/// possibly after the step has returned. It holds the prompt's blocks, so they outlive every write of the step (KV-1).
pub(crate) struct ChunkLayers {
    sender: Option<KvLayers>,
    /// Indices in the prompt of the blocks that are final after the step.
    announced: Range<u32>,
    /// Full blocks that the step completes.
    blocks: Vec<BlockId>,
    /// Hashes of `blocks`.
    hashes: Vec<BlockHash>,
    _lease: Arc<BlockLease>,
}

impl ChunkLayers {
    /// The KV of `layer` is final: sends the blocks that the receiver lacks.
    pub(crate) fn ready(&self, layer: usize) {
        if let Some(sender) = &self.sender {
            sender.ready(layer, self.announced.clone());
        }
    }

    /// The KV of all layers is final: publishes the completed blocks in the prefix cache. They must not be published
    /// earlier, because another prompt that finds them hands them over at once.
    pub(crate) fn publish(&self, pool: &BlockPool) {
        pool.publish(&self.blocks, &self.hashes);
    }
}
