//! What the full model does after the first token of an attempt, for modes refresh and exact. The decode node asks for it.
//! The prefill node computes it, and its verdict goes back to the decode node.

use std::sync::Arc;

use futures::future::BoxFuture;
use overfill_kv::{OutputToken, Role};
use overfill_proto::{MAX_SECONDS_PER_DRAFT, v1};
use parking_lot::Mutex;
use tokio::time::Instant;
use tonic::{Code, Status};

use super::{
    Attempt, AttemptError, AttemptEvent, Plan,
    blame::Fault,
    choose,
    prefill::{PrefillEvent, PrefillStream},
    stream::traced,
};
use crate::{
    affinity::Affinity,
    node::{Node, View},
};

/// Prefills that are opened in a row, without an extension, before the attempt fails.
const MOST_REOPENED: u32 = 4;

/// The extensions of an attempt. At most one is in progress.
pub(super) struct Extender {
    /// Name of the request on the prefill node.
    lease: [u8; 16],
    /// Ticket of the decode node's reservation, which names the request there.
    pub ticket: Vec<u8>,
    state: State,
    /// The extension that follows the current one.
    next: Option<v1::Extension>,
    /// Prefill nodes opened since the last extension.
    reopened: u32,
}

enum State {
    Idle,
    /// The prefill node computes.
    Computing(BoxFuture<'static, Result<v1::ExtendResponse, Status>>, v1::Extension),
    /// No prefill node has the request open. The extension that waits, unless a node has begun it: then its ticket is used up.
    Lost(Option<v1::Extension>),
    /// Another prefill node computes the sequence so far.
    Reopening(Box<PrefillStream>, Option<v1::Extension>),
    /// The decode node is told the verdict; `None`: that the extension was lost.
    Telling(BoxFuture<'static, Result<(), Status>>, Option<Verdict>),
}

/// The full model's verdict on drafts.
#[derive(Clone, Debug)]
pub(super) struct Verdict {
    /// Number of drafts.
    pub drafted: u32,
    /// The tokens that stand: the accepted drafts, then one more.
    pub tokens: Vec<OutputToken>,
}

/// The end of a step of an extension.
pub(super) enum Step {
    /// The prefill node has ended its part.
    Computed(Result<v1::ExtendResponse, Status>),
    /// Another prefill node has the request open.
    Reopened(Result<(), Fault>),
    /// The decode node knows the verdict.
    Told(Result<(), Status>),
}

impl Extender {
    pub fn new() -> Self {
        Self { lease: rand::random(), ticket: Vec::new(), state: State::Idle, next: None, reopened: 0 }
    }

    /// Name of the request on the prefill node.
    pub fn lease(&self) -> Vec<u8> {
        self.lease.to_vec()
    }

    /// Whether an extension waits for a prefill node.
    pub fn is_lost(&self) -> bool {
        matches!(self.state, State::Lost(_))
    }

    /// Whether the prefill node computes an extension.
    pub fn is_computing(&self) -> bool {
        matches!(self.state, State::Computing(..))
    }

    /// Whether a prefill node is being opened.
    pub fn is_reopening(&self) -> bool {
        matches!(self.state, State::Reopening(..))
    }

    /// Takes an extension that the decode node asks for. `open`: the prefill node that has the request open, if there is one.
    pub fn ask(&mut self, extension: v1::Extension, open: Option<&Node>, plan: &Plan) {
        match &mut self.state {
            State::Idle => self.begin(extension, open, plan),
            State::Computing(..) | State::Telling(..) => self.next = Some(extension),
            // The decode node has given up the earlier one.
            State::Lost(waiting) | State::Reopening(_, waiting) => *waiting = Some(extension),
        }
    }

    fn begin(&mut self, extension: v1::Extension, open: Option<&Node>, plan: &Plan) {
        let Some(node) = open else {
            self.state = State::Lost(Some(extension));
            return;
        };
        let v1::Extension { position, tokens, standing_tokens, choose, landing, handoff_end_tokens } =
            extension.clone();
        let handoff = landing.map(|v1::Reserved { ticket, kv_endpoint, held_tokens, kv_schema }| v1::HandoffTarget {
            ticket,
            kv_endpoint,
            kv_schema,
            held_tokens,
        });
        let request = v1::ExtendRequest {
            request_id: plan.generation.request_id.0.clone(),
            incarnation: node.info.incarnation.clone(),
            lease: self.lease(),
            position,
            tokens,
            standing_tokens,
            choose,
            handoff,
            handoff_end_tokens,
            deadline_seconds: plan.seconds_left(),
        };
        let (mut client, request) = (node.prefill_client(), traced(request));
        let call = Box::pin(async move { Ok(client.extend(request).await?.into_inner()) });
        self.state = State::Computing(call, extension);
    }

    /// Waits for the end of the current step. Pending forever if there is none. Cancel safe.
    pub async fn step(&mut self) -> Step {
        match &mut self.state {
            State::Idle | State::Lost(_) => std::future::pending().await,
            State::Computing(call, _) => Step::Computed(call.await),
            State::Telling(call, _) => Step::Told(call.await),
            State::Reopening(stream, _) => loop {
                match stream.next().await {
                    Ok(PrefillEvent::FirstToken(_)) => return Step::Reopened(Ok(())),
                    Ok(PrefillEvent::Started { .. } | PrefillEvent::PromptLogprobs(_)) => {}
                    Err(fault) => return Step::Reopened(Err(fault)),
                }
            },
        }
    }

    /// The prefill node has computed the extension. The next step tells `decode` the verdict, if it waits for one.
    pub fn computed(
        &mut self,
        response: v1::ExtendResponse,
        open: Option<&Node>,
        decode: &Node,
        plan: &Plan,
    ) -> Result<(), Fault> {
        self.reopened = 0;
        let State::Computing(_, extension) = std::mem::replace(&mut self.state, State::Idle) else { return Ok(()) };
        if !extension.choose {
            self.go_on(open, plan);
            return Ok(());
        }
        let drafted = (extension.tokens.len() as u32).saturating_sub(extension.standing_tokens);
        let tokens: Vec<OutputToken> = response.tokens.into_iter().map(Into::into).collect();
        if tokens.is_empty() || tokens.len() > drafted as usize + 1 {
            return Err(Fault::unexpected(format!("{} tokens were chosen after {drafted} drafts", tokens.len())));
        }
        let seconds_per_draft = response.seconds_per_draft;
        if let Some(seconds) = seconds_per_draft.filter(|seconds| !(0.0..=MAX_SECONDS_PER_DRAFT).contains(seconds)) {
            return Err(Fault::unexpected(format!("a draft takes {seconds} seconds")));
        }
        let position = extension.position.saturating_add(extension.standing_tokens);
        let chosen = tokens.iter().map(|token| token.token).collect();
        let call = self.tell(decode, plan, |request| {
            (request.position, request.tokens) = (position, chosen);
            request.seconds_per_draft = seconds_per_draft;
        });
        self.state = State::Telling(call, Some(Verdict { drafted, tokens }));
        Ok(())
    }

    fn tell(
        &self,
        decode: &Node,
        plan: &Plan,
        fill: impl FnOnce(&mut v1::VerdictRequest),
    ) -> BoxFuture<'static, Result<(), Status>> {
        let mut request = v1::VerdictRequest {
            request_id: plan.generation.request_id.0.clone(),
            incarnation: decode.info.incarnation.clone(),
            ticket: self.ticket.clone(),
            ..Default::default()
        };
        fill(&mut request);
        let (mut client, request) = (decode.decode_client(), traced(request));
        Box::pin(async move { client.verdict(request).await.map(drop) })
    }

    /// The decode node knows the verdict. `None` if it was not being told one.
    pub fn told(&mut self, open: Option<&Node>, plan: &Plan) -> Option<Verdict> {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Telling(_, verdict) => {
                self.go_on(open, plan);
                verdict
            }
            state => {
                self.state = state;
                None
            }
        }
    }

    fn go_on(&mut self, open: Option<&Node>, plan: &Plan) {
        if let Some(next) = self.next.take() {
            self.begin(next, open, plan);
        }
    }

    /// No prefill node has the request open any more.
    pub fn lost(&mut self) {
        self.state = match std::mem::replace(&mut self.state, State::Idle) {
            State::Computing(..) => State::Lost(self.next.take()),
            State::Reopening(_, extension) | State::Lost(extension) => State::Lost(extension),
            state @ (State::Idle | State::Telling(..)) => state,
        };
    }

    /// Lets `node` compute the tokens of `plan`, so that it has the request open. Returns false if too many nodes were tried.
    pub fn reopen(&mut self, node: &Arc<Node>, matched: u64, plan: &Plan) -> bool {
        self.reopened += 1;
        if self.reopened > MOST_REOPENED {
            return false;
        }
        self.state = match std::mem::replace(&mut self.state, State::Idle) {
            State::Lost(extension) => {
                self.lease = rand::random();
                let stream = PrefillStream::open(node, matched, plan, None, self.lease());
                State::Reopening(Box::new(stream), extension)
            }
            state => state,
        };
        true
    }

    /// The prefill node has opened the request: begins the extension that waits, or lets the decode node ask again. Returns the
    /// stream that keeps the request open.
    pub fn reopened(&mut self, node: &Node, decode: &Node, plan: &Plan) -> Option<PrefillStream> {
        let State::Reopening(stream, extension) = std::mem::replace(&mut self.state, State::Idle) else { return None };
        match extension {
            Some(extension) => self.begin(extension, Some(node), plan),
            None => self.state = State::Telling(self.tell(decode, plan, |request| request.lost = true), None),
        }
        Some(*stream)
    }
}

impl Attempt {
    /// Lets another prefill node go on, after [`AttemptEvent::Closed`]. `plan` has the output so far.
    pub fn reopen(&mut self, view: &View, affinity: &Mutex<Affinity>, plan: Plan) -> Result<(), AttemptError> {
        let avoid = std::mem::take(&mut self.plan.avoid);
        self.plan = Plan { avoid, ..plan };
        let mut found = choose::prefill_again(view, &self.plan, &self.pair, affinity);
        if found.is_none() {
            // A node that has failed is better than none.
            self.plan.avoid.clear();
            found = choose::prefill_again(view, &self.plan, &self.pair, affinity);
        }
        let (node, matched) = found.ok_or(AttemptError::NoNode(Role::Prefill))?;
        self.pair.prefill = node;
        // The extension begins with the last token of the output, or with earlier ones.
        let (tokens, generated) = (self.plan.tokens.len().saturating_sub(1), self.plan.generated.saturating_sub(1));
        let known = Plan { tokens: self.plan.tokens[..tokens].into(), generated, ..self.plan.clone() };
        self.last_progress = Instant::now();
        match self.extender.reopen(&self.pair.prefill, matched, &known) {
            true => Ok(()),
            // Each attempt makes progress, since the prefill node computes the first token of each.
            false => Err(AttemptError::NoRoom {
                node: self.pair.prefill.key,
                message: "no prefill node has room to keep the request open".into(),
            }),
        }
    }

    /// The end of a step of the full model's part.
    pub(super) fn stepped(&mut self, step: Step) -> Result<Option<AttemptEvent>, AttemptError> {
        let open = self.prefill.is_some().then_some(&*self.pair.prefill);
        match step {
            Step::Computed(Ok(response)) => {
                self.pair.prefill.succeeded();
                let told = self.extender.computed(response, open, &self.pair.decode, &self.plan);
                told.map(|()| None).map_err(|fault| self.sentence(Role::Prefill, fault))
            }
            Step::Computed(Err(status)) if is_closed(&status) => {
                self.closed();
                Ok(None)
            }
            Step::Computed(Err(status)) => self.prefill_failed(status.into()),
            Step::Reopened(Ok(())) => {
                self.pair.prefill.succeeded();
                self.prefill = self.extender.reopened(&self.pair.prefill, &self.pair.decode, &self.plan);
                Ok(None)
            }
            Step::Reopened(Err(fault)) => self.prefill_failed(fault),
            Step::Told(Ok(())) => Ok(self.told()),
            // The request has just ended on the decode node, and its stream says how.
            Step::Told(Err(status)) if status.code() == Code::NotFound => Ok(self.told()),
            Step::Told(Err(status)) => Err(self.sentence(Role::Decode, status.into())),
        }
    }

    /// The decode node knows the verdict, if there is one under way: its tokens are returned next.
    pub(super) fn told(&mut self) -> Option<AttemptEvent> {
        let open = self.prefill.is_some().then_some(&*self.pair.prefill);
        let Verdict { drafted, tokens } = self.extender.told(open, &self.plan)?;
        let accepted = tokens.len() - 1;
        let proposers = (0..).map(|i| if i < accepted { Role::Decode } else { Role::Prefill });
        self.chosen = tokens.into_iter().zip(proposers).collect();
        Some(AttemptEvent::Judged { drafted, accepted: accepted as u32 })
    }

    /// The prefill node has failed, and another one can go on. Some failures end the attempt.
    pub(super) fn prefill_failed(&mut self, fault: Fault) -> Result<Option<AttemptEvent>, AttemptError> {
        match self.sentence(Role::Prefill, fault) {
            error @ (AttemptError::Refused(_) | AttemptError::Deadline | AttemptError::NoNode(_)) => Err(error),
            AttemptError::Failed { .. } | AttemptError::NoRoom { .. } | AttemptError::Moved { .. } => {
                self.plan.avoid.push(self.pair.prefill.key);
                self.closed();
                Ok(None)
            }
        }
    }

    /// The prefill node does not have the request open any more.
    pub(super) fn closed(&mut self) {
        self.prefill = None;
        self.extender.lost();
    }
}

/// Whether a prefill node has only lost the open request: the node is not at fault.
fn is_closed(status: &Status) -> bool {
    matches!(status.code(), Code::NotFound | Code::Aborted)
}
