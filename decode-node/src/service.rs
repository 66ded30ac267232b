//! The gRPC service `overfill.v1.Decode`.

use std::{collections::HashMap, sync::Arc, time::Duration};

use overfill_kv::{BLOCK_TOKENS, KvSchema, Role, Ticket};
use overfill_node::{Constraints, Drain, Ending, EventStream, NodeCore, RequestLimits, ended_early, request_span};
use overfill_proto::v1;
use overfill_transport::{Committed, FailureReason, HandoffError, IncomingHandoff, KvReceiver, Reservation};
use parking_lot::Mutex;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tonic::{Request, Response, Status};
use tracing::{Span, debug, info_span, warn};

use crate::{
    extension::{Ask, Landing},
    handle::EngineHandle,
    request,
    sequence::SequenceEvent,
};

/// Maximum time until KV of the full model arrives in the place of an extension. Then the node asks again.
const LANDING_TIMEOUT: Duration = Duration::from_secs(60);

/// Implementation of the gRPC service `overfill.v1.Decode`.
pub struct DecodeService {
    /// Handle of the engine.
    pub engine: EngineHandle,
    /// Limits for requests.
    pub limits: RequestLimits,
    /// Constraints of outputs.
    pub constraints: Constraints,
    /// Receiver of KV from prefill nodes.
    pub receiver: KvReceiver,
    /// Shared state of the node.
    pub core: NodeCore,
    /// The requests with extensions.
    pub extended: ExtendedRequests,
}

/// Arrival numbers of the requests with extensions, by ticket.
#[derive(Clone, Debug, Default)]
pub struct ExtendedRequests(Arc<Mutex<HashMap<Ticket, u64>>>);

impl ExtendedRequests {
    fn insert(&self, ticket: Ticket, arrival: u64) -> ExtendedRequest {
        self.0.lock().insert(ticket, arrival);
        ExtendedRequest { all: self.clone(), ticket }
    }
}

/// Keeps a request in [`ExtendedRequests`].
struct ExtendedRequest {
    all: ExtendedRequests,
    ticket: Ticket,
}

impl Drop for ExtendedRequest {
    fn drop(&mut self) {
        self.all.0.lock().remove(&self.ticket);
    }
}

fn event(event: v1::decode_event::Event) -> v1::DecodeEvent {
    v1::DecodeEvent { event: Some(event) }
}

/// The next event of a response stream.
enum Next {
    Engine(Option<SequenceEvent>),
    Handoff(Result<Committed, HandoffError>),
    /// KV of the full model has arrived in the place of an extension, or not.
    Landed(Result<Committed, HandoffError>),
    Deadline,
    /// The node is draining and the drain timeout is over. The router moves the request to another node.
    Moved,
}

/// Waits until the KV of a handoff has arrived, if there is one.
async fn committed(handoff: Option<&mut IncomingHandoff>) -> Result<Committed, HandoffError> {
    match handoff {
        Some(handoff) => handoff.ready().await,
        None => std::future::pending().await,
    }
}

/// Waits for the next event. `handoff` is the handoff whose KV has not arrived yet, if any, and `landing` that of an
/// extension.
async fn next(
    events: &mut mpsc::Receiver<SequenceEvent>,
    handoff: Option<&mut IncomingHandoff>,
    landing: Option<&mut IncomingHandoff>,
    deadline: Instant,
    drain: &Drain,
) -> Next {
    tokio::select! {
        biased;
        event = events.recv() => Next::Engine(event),
        outcome = committed(handoff) => Next::Handoff(outcome),
        outcome = committed(landing) => Next::Landed(outcome),
        () = sleep_until(deadline) => Next::Deadline,
        () = drain.is_over() => Next::Moved,
    }
}

#[tonic::async_trait]
impl v1::decode_server::Decode for DecodeService {
    type DecodeStream = EventStream<v1::DecodeEvent>;

    async fn decode(&self, request: Request<v1::DecodeRequest>) -> Result<Response<Self::DecodeStream>, Status> {
        use v1::decode_event::Event as Wire;
        let arrived = Instant::now();
        let span = request_span(Role::Decode, &request);
        let mut request = request::check(&self.limits, request.into_inner(), arrived)?;
        request.constraint = self.constraints.begin(&request.sampling, request.output(), request.deadline).await?;
        span.record("request", tracing::field::display(&request.id));
        span.record("prompt_tokens", request.tokens.len());
        let (id, deadline, prompt_tokens) = (request.id.clone(), request.deadline, request.tokens.len() as u32);
        // The reservation's schema names the producer, and the prefill node checks it. So the blocks held here and the
        // blocks that it sends come from the same model.
        let kv_schema = KvSchema { full_model: request.producer.clone(), ..self.core.identity.schema.clone() };
        let mode = request.mode;
        let (arrival, mut events) = self.engine.submit(request)?;
        let extended = self.extended.clone();
        let (engine, receiver, load) = (self.engine.clone(), self.receiver.clone(), self.core.load.clone());
        let drain = self.core.drain.clone();
        let kv_endpoint = self.core.identity.kv_endpoint.clone();
        let vocab_size = self.core.identity.schema.vocab_size;
        let mut ending = Ending::new(load.clone(), arrived, span.clone());
        // The stream owns the request. Dropping the stream drops `events`, which cancels the request in the engine, and
        // the handoff.
        Ok(Response::new(Box::pin(async_stream::try_stream! {
            let mut phase = info_span!(parent: &span, "reserve");
            let mut handoff: Option<IncomingHandoff> = None;
            let mut is_here = false;
            let mut landing: Option<(u64, IncomingHandoff)> = None;
            let mut listed = None;
            // Reserves a place for KV, and says how it can be filled.
            let reserve = |lease, held_blocks: usize, tokens: u32, deadline| {
                let ticket = Ticket(rand::random());
                let handoff = span.in_scope(|| receiver.reserve(Reservation {
                    ticket,
                    request_id: id.clone(),
                    lease,
                    held_blocks: held_blocks as u32,
                    prompt_tokens: tokens,
                    deadline,
                }));
                let reserved = v1::Reserved {
                    ticket: ticket.0.to_vec(),
                    kv_endpoint: kv_endpoint.clone().map(Into::into),
                    held_tokens: (held_blocks * BLOCK_TOKENS) as u32,
                    kv_schema: Some((&kv_schema).into()),
                };
                (ticket, handoff, reserved)
            };
            loop {
                let waiting = handoff.as_mut().filter(|_| !is_here);
                match next(&mut events, waiting, landing.as_mut().map(|(_, landing)| landing), deadline, &drain).await {
                    Next::Engine(Some(SequenceEvent::Reserved { to_fill, held_blocks, cached_blocks })) => {
                        phase = Span::none();
                        span.record("cached_tokens", cached_blocks * BLOCK_TOKENS);
                        let (ticket, begun, reserved) = reserve(to_fill, held_blocks, prompt_tokens, deadline);
                        handoff = Some(begun);
                        listed = mode.extends().then(|| extended.insert(ticket, arrival));
                        load.publish();
                        yield event(Wire::Reserved(reserved));
                    }
                    Next::Engine(Some(SequenceEvent::Extension { ask, place })) => {
                        let Ask { position, tokens, standing, choose, landing: wanted } = ask;
                        let end = wanted.map_or(0, |Landing { block, .. }| (block + 1) * BLOCK_TOKENS) as u32;
                        let place = wanted.zip(place).map(|(Landing { block, number }, place)| {
                            let (_, begun, reserved) = reserve(place, block, end, deadline.min(Instant::now() + LANDING_TIMEOUT));
                            landing = Some((number, begun));
                            reserved
                        });
                        yield event(Wire::Extension(v1::Extension {
                            position: position as u32,
                            tokens,
                            standing_tokens: standing as u32,
                            choose,
                            landing: place,
                            handoff_end_tokens: end,
                        }));
                    }
                    Next::Engine(Some(SequenceEvent::LandingOver)) => landing = None,
                    Next::Landed(outcome) => {
                        let Some((number, ended)) = landing.take() else { continue };
                        match &outcome {
                            Ok(Committed { stats, .. }) => {
                                load.metrics().transfer_bytes.inc_by(stats.bytes);
                                ended.decode_started();
                                ended.finished();
                            }
                            Err(error) => {
                                load.metrics().transfer_failed(error.reason());
                                debug!(request = %id, %error, "an extension's KV has not arrived");
                            }
                        }
                        engine.landed(arrival, number, outcome.is_ok())?;
                    }
                    Next::Handoff(Ok(Committed { first_token, stats })) if first_token < vocab_size => {
                        is_here = true;
                        if let Some(handoff) = &handoff {
                            handoff.decode_started();
                        }
                        load.metrics().transfer_bytes.inc_by(stats.bytes);
                        load.metrics().transfer_seconds.observe(stats.seconds);
                        load.metrics().transfer_exposed_seconds.observe(stats.exposed_seconds);
                        debug!(request = %id, bytes = stats.bytes, seconds = stats.seconds, "KV received");
                        engine.ready(arrival, first_token)?;
                        phase = info_span!(parent: &span, "decode steps");
                        yield event(Wire::Ready(v1::HandoffReady { transfer: Some(stats.into()) }));
                    }
                    Next::Handoff(outcome) => {
                        let (reason, error) = match outcome {
                            Ok(Committed { first_token, .. }) => {
                                (FailureReason::Damaged, format!("first token {first_token} is not in the vocabulary"))
                            }
                            Err(e) => (e.reason(), e.to_string()),
                        };
                        ending.because("error");
                        load.metrics().transfer_failed(reason);
                        warn!(request = %id, error, "handoff failed");
                        Err(ended_early(deadline, &format!("receiving the prompt's KV: {error}")))?;
                    }
                    Next::Engine(Some(SequenceEvent::Token(token))) => yield event(Wire::Token(token.into())),
                    Next::Engine(Some(SequenceEvent::Finished(reason))) => {
                        if let Some(handoff) = &handoff {
                            handoff.finished();
                        }
                        drop((std::mem::replace(&mut phase, Span::none()), listed));
                        ending.because(reason.as_str());
                        let reason = v1::FinishReason::from(reason).into();
                        yield event(Wire::Finished(v1::DecodeFinished { reason }));
                        break;
                    }
                    Next::Engine(Some(SequenceEvent::Failed(reason))) => {
                        ending.because("error");
                        Err(Status::internal(reason))?;
                    }
                    Next::Engine(Some(SequenceEvent::Refused(reason))) => {
                        ending.because("error");
                        // No node is to blame, and no other one would go on with it.
                        Err(Status::invalid_argument(reason))?;
                    }
                    Next::Engine(None) => {
                        ending.because("error");
                        Err(ended_early(deadline, "the engine dropped the request"))?;
                    }
                    Next::Moved => {
                        debug!(request = %id, "aborted by the drain");
                        Err(Status::aborted("the node is draining"))?;
                    }
                    Next::Deadline => {
                        ending.because("error");
                        Err(Status::deadline_exceeded("the deadline of the request has passed"))?;
                    }
                }
            }
        })))
    }

    async fn verdict(&self, request: Request<v1::VerdictRequest>) -> Result<Response<v1::VerdictResponse>, Status> {
        let (ticket, verdict) = request::check_verdict(&self.limits, request.into_inner())?;
        let arrival = self.extended.0.lock().get(&ticket).copied();
        let arrival = arrival.ok_or_else(|| Status::not_found("no request with extensions has this ticket"))?;
        match verdict {
            Some(chosen) => self.engine.verdict(arrival, chosen)?,
            None => self.engine.lost(arrival)?,
        }
        Ok(Response::new(v1::VerdictResponse {}))
    }
}
