//! Prefills that stay open: after its first token, a request keeps its blocks, and the full model goes on with tokens that
//! the decode node made.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use overfill_kv::{OutputToken, RequestId, Ticket};
use overfill_node::{Constraint, GrammarError};
use tokio::{sync::oneshot, time::Instant};

use crate::job::{Handoff, Running};

/// Maximum number of tokens in one extension.
pub const MAX_EXTENSION_TOKENS: usize = 1024;

/// Maximum number of drafts in one extension. Each needs a row of logits, which takes 0.5 MB at a vocabulary of 128 k.
pub const MAX_DRAFTS: usize = 64;

/// A checked request to go on with an open prefill.
#[derive(Debug)]
pub struct Extension {
    /// Id of the request.
    pub id: RequestId,
    /// Lease of the prefill.
    pub lease: Ticket,
    /// Position of the first of `tokens`.
    pub position: usize,
    /// The next tokens of the sequence, at least one.
    pub tokens: Vec<u32>,
    /// Number of leading `tokens` that stand, at least one. The others are drafts.
    pub standing: usize,
    /// Whether to choose the tokens that follow the standing ones.
    pub choose: bool,
    /// Receiver of KV of standing tokens; `None`: none is sent.
    pub handoff: Option<Handoff>,
    /// End of the blocks to send.
    pub handoff_end_blocks: usize,
    /// Time of arrival.
    pub arrived: Instant,
    /// Time at which the extension fails if it has not ended.
    pub deadline: Instant,
    /// Receives the result.
    pub reply: ExtendReply,
}

/// The result of an extension.
#[derive(Clone, Debug, PartialEq)]
pub struct Extended {
    /// The chosen tokens, if they were requested.
    pub tokens: Vec<OutputToken>,
    /// Estimate of the seconds by which one more draft of each sequence would have prolonged the step, if there is one.
    pub seconds_per_draft: Option<f64>,
}

/// Receives the result of an extension.
pub type ExtendReply = oneshot::Sender<Result<Extended, ExtendError>>;

/// Why an extension has failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ExtendError {
    /// There is no open prefill with this lease whose tokens reach the position.
    #[error("no open prefill has this lease and reaches position {0}")]
    NotOpen(usize),
    /// The prefill was ended to make room.
    #[error("the open prefill was ended to make room")]
    Evicted,
    /// The computation failed.
    #[error("computing an extension: {0}")]
    Failed(String),
    /// The request's grammar can't be followed any further: the fault of the request.
    #[error("sampling.grammar: {0}")]
    Grammar(#[from] GrammarError),
}

/// The extension that an open prefill computes.
pub struct Extending {
    /// Number of tokens of the sequence that stand.
    pub standing_end: usize,
    /// Whether to choose the tokens that follow.
    pub choose: bool,
    /// The tokens allowed in each place behind the standing ones; empty: all.
    pub allowed: Vec<Vec<u32>>,
    /// The tokens chosen so far.
    pub choices: Vec<OutputToken>,
    /// End of the blocks to send.
    pub handoff_end_blocks: usize,
    /// Receives the result.
    pub reply: ExtendReply,
}

impl Extending {
    /// Number of drafts that stand: each is what the model has chosen in its place. `tokens` is the whole sequence.
    pub fn accepted(&self, tokens: &[u32]) -> usize {
        let drafts = &tokens[self.standing_end..];
        drafts.iter().zip(&self.choices).take_while(|(draft, choice)| **draft == choice.token).count()
    }
}

/// The grammar of an open prefill. It has followed the first tokens of the sequence.
#[derive(Clone, Debug)]
pub struct Followed {
    /// State after those tokens.
    pub constraint: Constraint,
    /// Their number.
    pub tokens: usize,
}

impl Followed {
    /// Follows `tokens` up to `position`, for good. Then returns the set of allowed tokens in each place from
    /// `standing_end` on, after each token of the sequence. There are fewer sets than places if the grammar does not allow a
    /// draft: the tokens behind it need none.
    ///
    /// # Errors
    /// The grammar does not allow a standing token, or nothing may follow the standing tokens.
    pub fn allowed(
        &mut self,
        tokens: &[u32],
        position: usize,
        standing_end: usize,
    ) -> Result<Vec<Vec<u32>>, GrammarError> {
        for token in tokens.get(self.tokens..position).unwrap_or_default() {
            self.constraint.accept(*token)?;
        }
        self.tokens = self.tokens.max(position);
        let mut ahead = self.constraint.clone();
        let mut sets = Vec::new();
        for (i, token) in tokens.iter().enumerate().skip(self.tokens) {
            let is_draft = i >= standing_end;
            let next = ahead.accept(*token).and_then(|()| if i + 1 >= standing_end { ahead.prepare() } else { Ok(()) });
            match next {
                Ok(()) if i + 1 >= standing_end => sets.push(ahead.mask().words.to_vec()),
                Ok(()) => {}
                Err(_) if is_draft => break,
                Err(e) => return Err(e),
            }
        }
        Ok(sets)
    }
}

/// Limits of idle open prefills. A prefill is idle while it waits for its next extension.
#[derive(Clone, Copy, Debug)]
pub struct OpenLimits {
    /// Maximum number of blocks that they hold.
    pub max_blocks: usize,
    /// Maximum time between two extensions.
    pub max_idle: Duration,
}

/// The idle open prefills.
pub struct OpenPrefills {
    limits: OpenLimits,
    idle: HashMap<Ticket, (Running, Instant)>,
}

impl OpenPrefills {
    /// None, with these limits.
    pub fn new(limits: OpenLimits) -> Self {
        Self { limits, idle: HashMap::new() }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.idle.is_empty()
    }

    /// Keeps a prefill until its next extension. Ends the ones that were idle for longest if too many blocks are held. One
    /// is always kept, however long it is.
    pub fn keep(&mut self, lease: Ticket, job: Running) {
        self.idle.insert(lease, (job, Instant::now()));
        while self.idle.len() > 1 && self.holds_too_many() && self.evict() {}
    }

    fn holds_too_many(&self) -> bool {
        // The first sum is cheap. It counts a block several times that prefills share.
        let distinct = || self.idle.values().flat_map(|(job, _)| &job.blocks).collect::<HashSet<_>>().len();
        self.blocks() > self.limits.max_blocks && distinct() > self.limits.max_blocks
    }

    /// Takes the prefill with this lease, for an extension that has arrived at the given time.
    pub fn take(&mut self, lease: &Ticket, arrived: Instant) -> Option<Running> {
        let (mut job, since) = self.idle.remove(lease)?;
        job.pauses.record(arrived.saturating_duration_since(since));
        Some(job)
    }

    /// Times until the next extensions are expected. A sequence that is late is not expected any more.
    pub fn due(&self) -> impl Iterator<Item = Duration> {
        self.idle.values().filter_map(|(job, since)| job.pauses.expected()?.checked_sub(since.elapsed()))
    }

    /// Ends the prefill that was idle for longest. Returns false if there is none. One whose KV is still being sent would free
    /// no block.
    pub fn evict(&mut self) -> bool {
        let free = self.idle.iter().filter(|(_, (job, _))| !job.is_being_sent());
        let oldest = free.min_by_key(|(_, (_, since))| *since).map(|(lease, _)| *lease);
        match oldest.and_then(|lease| self.idle.remove(&lease)) {
            Some((job, _)) => {
                job.evict();
                true
            }
            None => false,
        }
    }

    /// Drops prefills whose requests are over, and ends prefills that were idle for too long.
    pub fn settle(&mut self) {
        self.idle.retain(|_, (job, _)| !job.is_over());
        let max_idle = self.limits.max_idle;
        let late: Vec<Ticket> =
            self.idle.iter().filter(|(_, (_, since))| since.elapsed() > max_idle).map(|(lease, _)| *lease).collect();
        for (job, _) in late.iter().filter_map(|lease| self.idle.remove(lease)) {
            job.evict();
        }
    }

    /// Number of blocks that the idle prefills hold. A block that several hold counts several times.
    pub fn blocks(&self) -> usize {
        self.idle.values().map(|(job, _)| job.blocks.len()).sum()
    }
}
