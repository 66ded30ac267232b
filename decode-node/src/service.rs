//! The gRPC service `overfill.v1.Decode`.

use overfill_kv::{BLOCK_TOKENS, KvSchema, Role, Ticket};
use overfill_node::{Constraints, Drain, Ending, EventStream, NodeCore, RequestLimits, ended_early, request_span};
use overfill_proto::v1;
use overfill_transport::{Committed, FailureReason, HandoffError, IncomingHandoff, KvReceiver, Reservation};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tonic::{Request, Response, Status};
use tracing::{Span, debug, info_span, warn};

use crate::{engine::EngineHandle, request, sequence::SequenceEvent};

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
}

fn event(event: v1::decode_event::Event) -> v1::DecodeEvent {
    v1::DecodeEvent { event: Some(event) }
}

/// The next event of a response stream.
enum Next {
    Engine(Option<SequenceEvent>),
    Handoff(Result<Committed, HandoffError>),
    Deadline,
    /// The node is draining and the drain timeout is over. The router moves the request to another node.
    Moved,
}

/// Waits for the next event. `handoff` is the handoff whose KV has not arrived yet, if any.
async fn next(
    events: &mut mpsc::Receiver<SequenceEvent>,
    handoff: Option<&mut IncomingHandoff>,
    deadline: Instant,
    drain: &Drain,
) -> Next {
    let committed = async {
        match handoff {
            Some(handoff) => handoff.ready().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        event = events.recv() => Next::Engine(event),
        outcome = committed => Next::Handoff(outcome),
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
        let (arrival, mut events) = self.engine.submit(request)?;
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
            loop {
                match next(&mut events, handoff.as_mut().filter(|_| !is_here), deadline, &drain).await {
                    Next::Engine(Some(SequenceEvent::Reserved { to_fill, held_blocks, cached_blocks })) => {
                        let ticket = Ticket(rand::random());
                        phase = Span::none();
                        span.record("cached_tokens", cached_blocks * BLOCK_TOKENS);
                        handoff = Some(span.in_scope(|| receiver.reserve(Reservation {
                            ticket,
                            request_id: id.clone(),
                            lease: to_fill,
                            held_blocks: held_blocks as u32,
                            prompt_tokens,
                            deadline,
                        })));
                        load.publish();
                        yield event(Wire::Reserved(v1::Reserved {
                            ticket: ticket.0.to_vec(),
                            kv_endpoint: kv_endpoint.clone().map(Into::into),
                            held_tokens: (held_blocks * BLOCK_TOKENS) as u32,
                            kv_schema: Some((&kv_schema).into()),
                        }));
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
                        drop(std::mem::replace(&mut phase, Span::none()));
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
}
