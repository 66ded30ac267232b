//! One pass of a request over one decode and one prefill node.
//!
//! [`choose`] finds the nodes, [`decode`] and [`prefill`] are their two streams, [`blame`] says who is at fault when
//! the pass fails.

mod blame;
mod choose;
mod decode;
mod prefill;
mod stream;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use overfill_kv::{FinishReason, OutputToken, Role, TransferStats};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};

use self::{
    blame::{Fault, Pair},
    decode::{DecodeEvent, DecodeStream},
    prefill::{PrefillEvent, PrefillStream},
};
use crate::{affinity::Affinity, node::View, request::Generation};

/// After the prefill node failed behind its first token, the decode node has this long to show that its KV is complete:
/// only the last confirmation may have been lost.
const GRACE: Duration = Duration::from_secs(2);

/// What happens during an attempt, in this order. Tokens may repeat.
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
    /// The next token, and the stage that chose it.
    Token(OutputToken, Role),
    /// The KV is complete on the decode node.
    Ready(Option<TransferStats>),
    /// The decode node has ended the text. (The caller sees for itself that the first token ends it.)
    Finished(FinishReason),
}

/// How an attempt failed.
#[derive(Debug)]
pub enum AttemptError {
    /// No node of this role is up, or all are to be avoided.
    NoNode(Role),
    /// A node refused for want of room, or because it is about to end.
    NoRoom {
        /// The node's key.
        node: u64,
        /// What the node said.
        message: String,
    },
    /// The request is at fault: no other node would take it.
    Refused(String),
    /// A draining node has given the request back.
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
    /// The request's own deadline has passed.
    Deadline,
}

/// What an attempt is to do.
pub struct Plan {
    /// The request.
    pub generation: Arc<Generation>,
    /// Prompt and earlier output.
    pub tokens: Arc<[u32]>,
    /// How many of `tokens` are earlier output.
    pub generated: u32,
    /// Tokens still to generate.
    pub remaining: u32,
    /// Report the prompt's log-probabilities?
    pub prompt_logprobs: bool,
    /// Keys of nodes to avoid.
    pub avoid: Vec<u64>,
    /// Longest time for a node to take the request, and between two tokens of a decode node.
    pub progress_timeout: Duration,
}

impl Plan {
    /// Tokens of the request when it is complete.
    fn length(&self) -> u32 {
        self.tokens.len() as u32 + self.remaining
    }

    /// Time that the request has left. At least 1 ms: to a node, 0 means its own default.
    fn seconds_left(&self) -> f64 {
        self.generation.deadline().saturating_duration_since(Instant::now()).as_secs_f64().max(0.001)
    }
}

/// How far an attempt has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The decode node has been asked to take the request.
    OpeningDecode,
    /// The decode node makes room for the request.
    Reserving,
    /// The prefill node has been asked to take the request.
    OpeningPrefill,
    /// The prefill node computes the only token that is wanted. No decode node takes part.
    Scoring,
    /// The prefill node computes the prompt, and its KV goes to the decode node.
    Prefilling,
    /// The first token is known, the KV on the decode node is not yet complete.
    HandingOver,
    /// The KV is complete: the decode node decodes.
    Decoding,
    /// The attempt has ended.
    Over,
}

/// An attempt under way. Dropping it drops the streams to both nodes, which ends the request there.
pub struct Attempt {
    plan: Plan,
    pair: Pair,
    /// Prompt tokens that the prefill node has probably cached.
    matched: u64,
    phase: Phase,
    /// When `phase` began, or the decode node last spoke.
    last_progress: Instant,
    decode: Option<DecodeStream>,
    prefill: Option<PrefillStream>,
    /// Set when the prefill node fails while the KV is handed over: the attempt fails with this error at this time.
    trouble: Option<(AttemptError, Instant)>,
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
            prefill: None,
            trouble: None,
            plan,
        };
        if attempt.plan.remaining > 1 {
            attempt.decode = Some(DecodeStream::open(&attempt.pair.decode, &attempt.pair.prefill, &attempt.plan));
            attempt.enter(Phase::OpeningDecode);
        } else {
            attempt.open_prefill(None);
        }
        Ok(attempt)
    }

    /// Does a decode node take part? It does unless one token is all that is wanted.
    pub fn hands_over(&self) -> bool {
        self.decode.is_some()
    }

    /// What happens next. Cancel safe. After an error, or after the last event, both streams are gone.
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

    fn open_prefill(&mut self, reservation: Option<decode::Reservation>) {
        self.prefill = Some(PrefillStream::open(&self.pair.prefill, self.matched, &self.plan, reservation));
        self.enter(Phase::OpeningPrefill);
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
        self.open_prefill(Some(reservation));
        Ok(AttemptEvent::Reserved { node: self.pair.decode.info.node_id.clone(), held_tokens })
    }

    async fn opening_prefill(&mut self) -> Result<(), AttemptError> {
        let Some(stream) = &mut self.prefill else { return Err(ended()) };
        let until = self.last_progress + self.plan.progress_timeout;
        heard(&self.plan, &self.pair, Role::Prefill, self.phase, Some(until), stream.opened()).await?;
        self.enter(if self.decode.is_some() { Phase::Prefilling } else { Phase::Scoring });
        Ok(())
    }

    /// Until the first token the prefill node speaks. The decode node gets that token by another way, with the KV, and
    /// may be the first to say so: what it says waits until the client has seen the first token.
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
                    // With a handoff it would be too early: a prompt that is computed and does not arrive is of no use.
                    self.pair.prefill.succeeded();
                    self.enter(Phase::Over);
                }
                Ok(AttemptEvent::Token(token, Role::Prefill))
            }
        }
    }

    /// From the first token on the decode node speaks; the prefill node ends its transfer.
    async fn decoding(&mut self) -> Result<AttemptEvent, AttemptError> {
        let event = loop {
            let Some(decode) = &mut self.decode else { return Err(ended()) };
            let deadline = self.plan.generation.deadline();
            let give_up = match (self.phase, &self.trouble) {
                (Phase::Decoding, _) => self.last_progress + self.plan.progress_timeout,
                (_, Some((_, at))) => *at,
                (_, None) => deadline,
            };
            let prefill_fault = tokio::select! {
                biased;
                event = decode.next() => break event,
                () = self.pair.decode.left() => break Err(Fault::Left),
                end = transferred(&mut self.prefill) => match end {
                    Ok(()) => {
                        self.prefill = None;
                        continue;
                    }
                    Err(fault) => fault,
                },
                () = self.pair.prefill.left(), if self.prefill.is_some() => Fault::Left,
                () = sleep_until(give_up.min(deadline)) => {
                    if deadline <= give_up {
                        return Err(AttemptError::Deadline);
                    }
                    match self.trouble.take() {
                        Some((error, _)) if self.phase == Phase::HandingOver => return Err(error),
                        Some(_) | None => break Err(silent(&self.plan)),
                    }
                }
            };
            // Its place is given up after the sentence: a probe has failed then, and was not abandoned.
            let error = self.sentence(Role::Prefill, prefill_fault);
            self.prefill = None;
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
            DecodeEvent::Finished(reason) => {
                self.enter(Phase::Over);
                Ok(AttemptEvent::Finished(reason))
            }
        }
    }

    fn sentence(&self, speaker: Role, fault: Fault) -> AttemptError {
        blame::sentence(&self.pair, speaker, self.phase, fault)
    }
}

/// What `speaker` says, while the node is there and the request has time. `until`: when the node has been silent for
/// too long.
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

/// Somebody asks an attempt that is over.
fn ended() -> AttemptError {
    AttemptError::Failed { nodes: Vec::new(), message: "ended early".into() }
}

/// See [`DecodeStream::spoken`]; pending for ever where there is no decode node.
async fn spoken(stream: &mut Option<DecodeStream>) -> Result<(), Fault> {
    match stream {
        Some(stream) => stream.spoken().await,
        None => std::future::pending().await,
    }
}

/// See [`PrefillStream::transferred`]; pending for ever once the stream has ended.
async fn transferred(stream: &mut Option<PrefillStream>) -> Result<(), Fault> {
    match stream {
        Some(stream) => Ok(stream.transferred().await?),
        None => std::future::pending().await,
    }
}
