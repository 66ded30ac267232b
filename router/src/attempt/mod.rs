//! One pass of a request over one decode and one prefill node.
//!
//! [`choose`] selects the nodes, [`decode`] and [`prefill`] are the streams to them, and [`blame`] decides which node is at
//! fault when the attempt fails.

mod blame;
pub(crate) mod choose;
mod decode;
mod extension;
mod prefill;
mod stream;
#[cfg(test)]
mod tests;

use std::{collections::VecDeque, sync::Arc, time::Duration};

use overfill_kv::{FinishReason, OutputToken, Role, TransferStats};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};

use self::{
    blame::{Fault, Pair},
    decode::{DecodeEvent, DecodeStream, Reservation},
    extension::Extender,
    prefill::{PrefillEvent, PrefillStream},
};
use crate::{affinity::Affinity, node::View, request::Generation};

/// If the prefill node fails after its first token, the decode node has this much time to report that its KV is complete.
/// Possibly only the prefill node's last confirmation was lost.
const GRACE: Duration = Duration::from_secs(2);

/// An event of an attempt. Events occur in the order of the variants; those between `Started` and `Finished` may repeat.
#[derive(Debug)]
pub enum AttemptEvent {
    /// The decode node has reserved room.
    Reserved {
        /// The decode node's name.
        node: String,
        /// Prompt tokens whose KV the decode node already holds.
        held_tokens: u32,
    },
    /// The prefill node has begun to compute.
    Started {
        /// The prefill node's name.
        node: String,
        /// Prompt tokens whose KV the prefill node already has.
        cached_tokens: u32,
    },
    /// The log-probabilities of prompt tokens 1, 2, ...
    PromptLogprobs(Vec<OutputToken>),
    /// The next token, and the role of the node that sampled it.
    Token(OutputToken, Role),
    /// The KV is complete on the decode node.
    Ready(Option<TransferStats>),
    /// The full model has judged drafts. The tokens that stand follow.
    Judged {
        /// Number of drafts.
        drafted: u32,
        /// Number of drafts that stand.
        accepted: u32,
    },
    /// The next token, which the full model has chosen. The role of the node that has proposed it: a draft that stands comes
    /// from the decode node.
    Chosen(OutputToken, Role),
    /// The decode node has asked the full model to go on.
    Asked,
    /// No prefill node has the request open, and the full model is to go on. The caller calls [`Attempt::reopen`].
    Closed,
    /// The decode node has ended the text. There is no such event if the first token ends it: the caller checks for that.
    Finished(FinishReason),
}

/// How an attempt failed.
#[derive(Debug)]
pub enum AttemptError {
    /// No node of this role is up, or all of them are in [`Plan::avoid`].
    NoNode(Role),
    /// A node has no room, or is shutting down.
    NoRoom {
        /// The node's key.
        node: u64,
        /// What the node said.
        message: String,
    },
    /// The request is invalid: no node would accept it.
    Refused(String),
    /// A draining node has returned the request.
    Moved {
        /// The node's key.
        node: u64,
        /// What the node said.
        message: String,
    },
    /// A node failed.
    Failed {
        /// Keys of the nodes that the next attempt should avoid.
        nodes: Vec<u64>,
        /// What happened.
        message: String,
    },
    /// The request's deadline has passed.
    Deadline,
}

/// The task of an attempt.
#[derive(Clone)]
pub struct Plan {
    /// The request.
    pub generation: Arc<Generation>,
    /// Prompt and earlier output.
    pub tokens: Arc<[u32]>,
    /// Number of `tokens` that are earlier output.
    pub generated: u32,
    /// Number of tokens still to generate.
    pub remaining: u32,
    /// Whether to report the prompt's log-probabilities.
    pub prompt_logprobs: bool,
    /// Full model that computed the prompt for the earlier output, if there is any. Its nodes are preferred, so that a
    /// sequence does not change its model during a rollout.
    pub producer: Option<String>,
    /// Keys of nodes to avoid.
    pub avoid: Vec<u64>,
    /// Maximum time for a node to accept the request, and between two tokens of a decode node.
    pub progress_timeout: Duration,
}

impl Plan {
    /// Number of tokens when the request is complete.
    fn length(&self) -> u32 {
        self.tokens.len() as u32 + self.remaining
    }

    /// Time until the request's deadline. At least 1 ms, because 0 means the node's default.
    fn seconds_left(&self) -> f64 {
        self.generation.deadline().saturating_duration_since(Instant::now()).as_secs_f64().max(0.001)
    }
}

/// The phase of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The request has been sent to the decode node.
    OpeningDecode,
    /// The decode node reserves room for the request.
    Reserving,
    /// The request is sent to the prefill node.
    OpeningPrefill,
    /// The prefill node computes the only token of the attempt. There is no decode node.
    Scoring,
    /// The prefill node computes the prompt, and its KV goes to the decode node.
    Prefilling,
    /// The first token is known, but the KV on the decode node is not complete yet.
    HandingOver,
    /// The KV is complete: the decode node decodes.
    Decoding,
    /// The attempt has ended.
    Over,
}

/// A running attempt. Dropping it drops the streams to both nodes, which ends the request on them.
pub struct Attempt {
    plan: Plan,
    pair: Pair,
    /// Number of prompt tokens that the prefill node has probably cached.
    matched: u64,
    phase: Phase,
    /// Time when `phase` began, or of the decode node's last message if that is later.
    last_progress: Instant,
    decode: Option<DecodeStream>,
    /// The decode node's room, from its reservation until the stream to the prefill node is opened.
    reservation: Option<Reservation>,
    prefill: Option<PrefillStream>,
    /// Set when the prefill node fails after its first token. If the KV is not complete at the given time, the attempt fails
    /// with this error.
    trouble: Option<(AttemptError, Instant)>,
    /// What the full model does after the first token.
    extender: Extender,
    /// Tokens that stand and were not returned yet.
    chosen: VecDeque<(OutputToken, Role)>,
    /// Set when the decode node has ended the text, and `chosen` was not empty.
    finished: Option<FinishReason>,
}

impl Attempt {
    /// Chooses the nodes for `plan`.
    pub fn new(view: &View, affinity: &Mutex<Affinity>, plan: Plan) -> Result<Self, AttemptError> {
        let (pair, matched) = choose::pair(view, &plan, affinity).map_err(AttemptError::NoNode)?;
        let mut attempt = Self {
            pair,
            matched,
            phase: Phase::Over,
            last_progress: Instant::now(),
            decode: None,
            reservation: None,
            prefill: None,
            trouble: None,
            extender: Extender::new(),
            chosen: VecDeque::new(),
            finished: None,
            plan,
        };
        if attempt.plan.remaining > 1 {
            attempt.decode = Some(DecodeStream::open(&attempt.pair.decode, &attempt.pair.prefill, &attempt.plan));
            attempt.enter(Phase::OpeningDecode);
        } else {
            attempt.enter(Phase::OpeningPrefill);
        }
        Ok(attempt)
    }

    /// Chooses the prefill node again, among those with the same full model. To be called after
    /// [`AttemptEvent::Reserved`]: the request may have waited long for room on the decode node, and did not count as work
    /// of any prefill node meanwhile. If no node can be chosen, the first choice stands.
    pub fn choose_prefill_again(&mut self, view: &View, affinity: &Mutex<Affinity>) {
        if let Some((prefill, matched)) = choose::prefill_again(view, &self.plan, &self.pair, affinity) {
            (self.pair.prefill, self.matched) = (prefill, matched);
        }
    }

    /// Whether the attempt needs a decode node, which is the case if more than one token is to be generated.
    pub fn hands_over(&self) -> bool {
        self.decode.is_some()
    }

    /// Fingerprint of the full model that computes the prompt. Empty if it is unknown.
    pub fn producer(&self) -> &str {
        self.pair.prefill.info.schema.full_model.as_deref().unwrap_or_default()
    }

    /// The next event. Cancel safe. After an error or the last event, both streams are dropped.
    pub async fn next(&mut self) -> Result<AttemptEvent, AttemptError> {
        let event = self.advance().await;
        if event.is_err() || self.phase == Phase::Over {
            self.phase = Phase::Over;
            (self.decode, self.prefill) = (None, None);
        }
        event
    }

    async fn advance(&mut self) -> Result<AttemptEvent, AttemptError> {
        loop {
            match self.phase {
                Phase::OpeningDecode => self.opening_decode().await?,
                Phase::Reserving => return self.reserving().await,
                Phase::OpeningPrefill => self.opening_prefill().await?,
                Phase::Scoring | Phase::Prefilling => return self.prefilling().await,
                Phase::HandingOver | Phase::Decoding => return self.decoding().await,
                Phase::Over => return Err(ended()),
            }
        }
    }

    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.last_progress = Instant::now();
    }

    async fn opening_decode(&mut self) -> Result<(), AttemptError> {
        let Some(stream) = &mut self.decode else { return Err(ended()) };
        let until = self.last_progress + self.plan.progress_timeout;
        heard(&self.plan, &self.pair, Role::Decode, self.phase, Some(until), stream.opened()).await?;
        self.enter(Phase::Reserving);
        Ok(())
    }

    async fn reserving(&mut self) -> Result<AttemptEvent, AttemptError> {
        let Some(stream) = &mut self.decode else { return Err(ended()) };
        let reservation = heard(&self.plan, &self.pair, Role::Decode, self.phase, None, stream.reserved()).await?;
        let held_tokens = reservation.held_tokens;
        self.extender.ticket = reservation.ticket.0.to_vec();
        self.reservation = Some(reservation);
        self.enter(Phase::OpeningPrefill);
        Ok(AttemptEvent::Reserved { node: self.pair.decode.info.node_id.clone(), held_tokens })
    }

    async fn opening_prefill(&mut self) -> Result<(), AttemptError> {
        let reservation = self.reservation.take();
        let extends = self.decode.is_some() && self.plan.generation.mode().extends();
        let lease = if extends { self.extender.lease() } else { Vec::new() };
        let open = || PrefillStream::open(&self.pair.prefill, self.matched, &self.plan, reservation, lease);
        let stream = self.prefill.get_or_insert_with(open);
        let until = self.last_progress + self.plan.progress_timeout;
        heard(&self.plan, &self.pair, Role::Prefill, self.phase, Some(until), stream.opened()).await?;
        self.enter(if self.decode.is_some() { Phase::Prefilling } else { Phase::Scoring });
        Ok(())
    }

    /// The next event up to the first token, from the prefill node. The decode node gets the first token together with the
    /// KV, so its messages may overtake it. They are kept until the first token has been returned.
    async fn prefilling(&mut self) -> Result<AttemptEvent, AttemptError> {
        let Some(prefill) = &mut self.prefill else { return Err(ended()) };
        let with_decode = self.decode.is_some();
        let event = loop {
            break tokio::select! {
                biased;
                event = prefill.next() => event.map_err(|fault| (Role::Prefill, fault)),
                spoken = spoken(&mut self.decode) => match spoken {
                    Ok(()) => continue,
                    Err(fault) => Err((Role::Decode, fault)),
                },
                () = self.pair.prefill.left() => Err((Role::Prefill, Fault::Left)),
                () = self.pair.decode.left(), if with_decode => Err((Role::Decode, Fault::Left)),
                () = sleep_until(self.plan.generation.deadline()) => return Err(AttemptError::Deadline),
            };
        };
        match event.map_err(|(speaker, fault)| self.sentence(speaker, fault))? {
            PrefillEvent::Started { cached_tokens } => {
                Ok(AttemptEvent::Started { node: self.pair.prefill.info.node_id.clone(), cached_tokens })
            }
            PrefillEvent::PromptLogprobs(logprobs) => Ok(AttemptEvent::PromptLogprobs(logprobs)),
            PrefillEvent::FirstToken(token) => {
                if with_decode {
                    self.enter(Phase::HandingOver);
                } else {
                    // With a handoff, the prefill node has succeeded only when the KV is complete on the decode node.
                    self.pair.prefill.succeeded();
                    self.enter(Phase::Over);
                }
                Ok(AttemptEvent::Token(token, Role::Prefill))
            }
        }
    }

    /// The next event after the first token, from the decode node. Meanwhile the prefill node ends its transfer.
    async fn decoding(&mut self) -> Result<AttemptEvent, AttemptError> {
        let event = loop {
            if let Some((token, proposer)) = self.chosen.pop_front() {
                return Ok(AttemptEvent::Chosen(token, proposer));
            }
            if let Some(reason) = self.finished {
                self.enter(Phase::Over);
                return Ok(AttemptEvent::Finished(reason));
            }
            if self.extender.is_lost() {
                return Ok(AttemptEvent::Closed);
            }
            let is_reopening = self.extender.is_reopening();
            let Some(decode) = &mut self.decode else { return Err(ended()) };
            let deadline = self.plan.generation.deadline();
            let give_up = match (self.phase, &self.trouble) {
                // A prompt may wait long on a prefill node.
                (Phase::Decoding, _) if self.extender.is_reopening() => deadline,
                (Phase::Decoding, _) => self.last_progress + self.plan.progress_timeout,
                (_, Some((_, at))) => *at,
                (_, None) => deadline,
            };
            let prefill_fault = tokio::select! {
                biased;
                event = decode.next() => break event,
                () = self.pair.decode.left() => break Err(Fault::Left),
                // Before the end of the prefill's stream: a verdict that has arrived counts.
                step = self.extender.step() => {
                    self.last_progress = Instant::now();
                    match self.stepped(step)? {
                        Some(event) => return Ok(event),
                        None => continue,
                    }
                }
                end = transferred(&mut self.prefill) => match end {
                    Ok(()) => {
                        self.prefill = None;
                        continue;
                    }
                    Err(fault) => fault,
                },
                () = self.pair.prefill.left(), if self.prefill.is_some() || is_reopening => Fault::Left,
                () = sleep_until(give_up.min(deadline)) => {
                    if deadline <= give_up {
                        return Err(AttemptError::Deadline);
                    }
                    if self.phase == Phase::Decoding && self.extender.is_computing() {
                        self.last_progress = Instant::now();
                        let silent = silent(&self.plan);
                        self.prefill_failed(silent)?;
                        continue;
                    }
                    match self.trouble.take() {
                        Some((error, _)) if self.phase == Phase::HandingOver => return Err(error),
                        Some(_) | None => break Err(silent(&self.plan)),
                    }
                }
            };
            // The stream, and its slot on the node, is dropped after the sentence. A probe then counts as failed and not as
            // abandoned.
            let error = self.sentence(Role::Prefill, prefill_fault);
            self.closed();
            if let AttemptError::Failed { nodes, .. } = &error {
                self.plan.avoid.extend(nodes.iter().filter(|node| **node == self.pair.prefill.key));
            }
            self.trouble = Some((error, Instant::now() + GRACE));
        };
        let event = event.map_err(|fault| self.sentence(Role::Decode, fault))?;
        self.last_progress = Instant::now();
        match event {
            DecodeEvent::Ready(stats) => {
                self.pair.prefill.succeeded();
                self.pair.decode.succeeded();
                self.enter(Phase::Decoding);
                Ok(AttemptEvent::Ready(stats))
            }
            DecodeEvent::Token(token) => Ok(AttemptEvent::Token(token, Role::Decode)),
            DecodeEvent::Extension(extension) => {
                let open = self.prefill.is_some().then_some(&*self.pair.prefill);
                self.extender.ask(*extension, open, &self.plan);
                Ok(AttemptEvent::Asked)
            }
            DecodeEvent::Finished(reason) => match self.told() {
                // The node has ended the text because of a verdict, before it has answered the call. The tokens come first.
                Some(judged) => {
                    self.finished = Some(reason);
                    Ok(judged)
                }
                None => {
                    self.enter(Phase::Over);
                    Ok(AttemptEvent::Finished(reason))
                }
            },
        }
    }

    fn sentence(&self, speaker: Role, fault: Fault) -> AttemptError {
        blame::sentence(&self.pair, speaker, self.phase, fault)
    }
}

/// Waits for `said`, a result of `speaker`. Fails if the node leaves, at `until`, or at the request's deadline.
async fn heard<T>(
    plan: &Plan,
    pair: &Pair,
    speaker: Role,
    phase: Phase,
    until: Option<Instant>,
    said: impl Future<Output = Result<T, Fault>>,
) -> Result<T, AttemptError> {
    let deadline = plan.generation.deadline();
    let give_up = until.map_or(deadline, |until| until.min(deadline));
    let fault = tokio::select! {
        biased;
        said = said => match said {
            Ok(said) => return Ok(said),
            Err(fault) => fault,
        },
        () = pair.of(speaker).left() => Fault::Left,
        () = sleep_until(give_up) => match give_up < deadline {
            true => silent(plan),
            false => return Err(AttemptError::Deadline),
        },
    };
    Err(blame::sentence(pair, speaker, phase, fault))
}

fn silent(plan: &Plan) -> Fault {
    Fault::unexpected(format!("no progress within {} s", plan.progress_timeout.as_secs_f64()))
}

/// The error of an attempt that is polled after its end.
fn ended() -> AttemptError {
    AttemptError::Failed { nodes: Vec::new(), message: "the attempt has already ended".into() }
}

/// Calls [`DecodeStream::spoken`]. Pending forever if there is no decode node.
async fn spoken(stream: &mut Option<DecodeStream>) -> Result<(), Fault> {
    match stream {
        Some(stream) => stream.spoken().await,
        None => std::future::pending().await,
    }
}

/// Calls [`PrefillStream::transferred`]. Pending forever if the stream has ended.
async fn transferred(stream: &mut Option<PrefillStream>) -> Result<(), Fault> {
    match stream {
        Some(stream) => Ok(stream.transferred().await?),
        None => std::future::pending().await,
    }
}
