//! The tokens of a request that decodes: which of them stand, what may follow, and what the full model is asked for.

use std::{sync::Arc, time::Duration};

use overfill_kv::{BlockLease, FinishReason, Mode, OutputToken};
use overfill_node::{Constraint, GrammarError};
use tokio::{sync::mpsc, time::Instant};
use tracing::error;

use crate::{
    drafts::DraftRecord,
    extension::{Chosen, Extensions, MOST_CHOSEN, Verdict},
    sequence::{Request, SequenceEvent, is_over},
};

/// Free places in the channel that a sequence needs for a step: for the token, for an extension, and for the last event.
const STEP_EVENTS: usize = 3;

/// A request that decodes, in the batch or preempted.
pub struct Flow {
    /// Arrival number.
    pub arrival: u64,
    /// The request.
    pub request: Request,
    /// Token ids of prompt and output. In mode exact, the last ones may be drafts.
    pub tokens: Vec<u32>,
    /// Number of leading tokens whose KV is computed, less than all.
    pub computed: usize,
    /// What the full model does.
    pub extensions: Extensions,
    /// The grammar after the standing tokens, in mode exact. The request's own has followed the drafts.
    followed: Option<Constraint>,
    /// Nothing may follow the drafts.
    is_dead_end: bool,
    events: mpsc::Sender<SequenceEvent>,
    last_token_at: Instant,
}

impl Flow {
    /// Begins to decode after the first token.
    pub(crate) fn new(arrival: u64, request: Request, first_token: u32, events: mpsc::Sender<SequenceEvent>) -> Self {
        let mut tokens = request.tokens.clone();
        tokens.push(first_token);
        Self {
            arrival,
            computed: request.tokens.len(),
            extensions: Extensions::new(request.mode, request.tokens.len(), request.tokens.len() + request.max_tokens),
            followed: None,
            is_dead_end: false,
            request,
            tokens,
            events,
            last_token_at: Instant::now(),
        }
    }

    /// Whether the request is over: its client is gone or its deadline has passed.
    pub fn is_over(&self) -> bool {
        is_over(&self.events, &self.request)
    }

    /// Splits the tokens into prompt and output for penalties. Earlier output in the request counts as output.
    pub fn prompt_and_output(&self) -> (&[u32], &[u32]) {
        self.tokens.split_at(self.request.tokens.len() - self.request.generated)
    }

    /// Returns the finish reason if the output is complete.
    pub fn finish(&self) -> Option<FinishReason> {
        let standing = self.extensions.standing(self.tokens.len());
        let output = &self.tokens[self.request.tokens.len()..standing];
        // A verdict may add several tokens, and those behind the end do not count.
        let output = &output[..output.len().min(self.request.max_tokens)];
        let added = &output[output.len().saturating_sub(MOST_CHOSEN)..];
        match added.iter().any(|token| self.request.stop_token_ids.contains(token)) {
            true => Some(FinishReason::Stop),
            false => (output.len() >= self.request.max_tokens).then_some(FinishReason::Length),
        }
    }

    /// Whether no more tokens can be drafted: the draft has ended, or a verdict gives the last token.
    fn is_drafted(&self) -> bool {
        let drafted = self.tokens.len() - self.request.tokens.len();
        let is_full = drafted + 1 >= self.request.max_tokens;
        let is_at_end = self.tokens.last().is_some_and(|last| self.request.stop_token_ids.contains(last));
        self.is_dead_end || is_full || is_at_end
    }

    /// Whether the client has room for the events of a step.
    pub(crate) fn is_heard(&self) -> bool {
        self.events.capacity() >= STEP_EVENTS
    }

    /// Whether the sequence can't compute its next token yet, because it waits for the full model.
    pub(crate) fn waits(&self) -> bool {
        let exact = self.extensions.mode() == Mode::Exact;
        self.extensions.waits(self.tokens.len()) || (exact && self.is_drafted())
    }

    /// Whether the full model's KV for a block is wanted and has no place to go to.
    pub fn wants_landing(&self) -> bool {
        self.extensions.wants_landing(self.tokens.len())
    }

    /// Asks the full model to go on, if it is time. `place`: a block for its KV. Sends [`SequenceEvent::Extension`].
    /// `step`: duration of a step; `record`: what the node knows of the model's drafts.
    pub fn ask(&mut self, place: Option<Arc<BlockLease>>, step: Duration, record: &DraftRecord, origin: Instant) {
        let is_over = self.is_drafted();
        let now = origin.elapsed();
        if let Some(ask) = self.extensions.ask(&self.tokens, is_over, place, step, record, now) {
            let place = self.extensions.landing().filter(|_| ask.landing.is_some()).cloned();
            self.tell(SequenceEvent::Extension { ask, place });
        }
    }

    /// Takes the full model's verdict. Returns its effect; `None` if the sequence does not wait for it.
    ///
    /// # Errors
    /// The grammar does not allow a token that stands, or is too complex.
    pub fn verdict(&mut self, chosen: &Chosen, origin: Instant) -> Result<Option<Verdict>, GrammarError> {
        let Some(verdict) = self.extensions.verdict(&mut self.tokens, chosen, origin.elapsed()) else {
            return Ok(None);
        };
        if verdict.is_changed {
            self.computed = self.computed.min(verdict.valid);
        }
        if let Some(followed) = self.followed.as_mut() {
            for token in &chosen.tokens {
                followed.accept(*token)?;
            }
            if verdict.is_changed {
                self.request.constraint = Some(followed.clone());
            }
        }
        if verdict.is_changed {
            self.is_dead_end = false;
            if self.finish().is_none()
                && let Some(constraint) = &mut self.request.constraint
            {
                constraint.prepare()?;
            }
        }
        Ok(Some(verdict))
    }

    /// Appends the next token. Unless it is a draft, sends it to the client. Returns the time since the last token.
    pub fn push(&mut self, token: OutputToken) -> Option<Duration> {
        self.computed = self.tokens.len();
        self.tokens.push(token.token);
        if self.extensions.mode() == Mode::Exact {
            return None;
        }
        self.tell(SequenceEvent::Token(token));
        let now = Instant::now();
        Some(now - std::mem::replace(&mut self.last_token_at, now))
    }

    /// Finds out which tokens may follow the last one.
    ///
    /// # Errors
    /// The last token was not allowed, or none may follow it, or the grammar is too complex. That is no error of a draft.
    pub fn constrain(&mut self) -> Result<(), GrammarError> {
        let (Some(constraint), Some(last)) = (&mut self.request.constraint, self.tokens.last()) else { return Ok(()) };
        let next = constraint.accept(*last).and_then(|()| constraint.prepare());
        let is_draft = self.extensions.standing(self.tokens.len()) < self.tokens.len();
        match next {
            Err(_) if is_draft => self.is_dead_end = true,
            next => next?,
        }
        if self.extensions.mode() == Mode::Exact && !is_draft {
            self.followed = Some(constraint.clone());
        }
        Ok(())
    }

    /// Ends the request because of its grammar: sends [`SequenceEvent::Refused`].
    pub fn refuse(&self, error: &GrammarError) {
        self.tell(SequenceEvent::Refused(format!("sampling.grammar: {error}")));
    }

    /// Ends the request with an error: logs it and sends [`SequenceEvent::Failed`].
    pub fn fail(&self, reason: &str) {
        error!(request = %self.request.id, reason, "the request failed in the engine");
        self.tell(SequenceEvent::Failed(reason.to_owned()));
    }

    /// Sends an event to the client.
    pub fn tell(&self, event: SequenceEvent) {
        // Never full, because the room was checked before the step. If the channel is closed, the client is gone.
        let _ = self.events.try_send(event);
    }
}
