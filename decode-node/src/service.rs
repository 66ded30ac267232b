//! The gRPC service `overfill.v1.Decode`.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures::{Stream, StreamExt as _};
use overfill_cluster::{Drain, Load, LoadState, Shutdown};
use overfill_kv::{BLOCK_TOKENS, KvSchema, Ticket};
use overfill_proto::{InvalidField, v1};
use overfill_transport::{Committed, HandoffError, IncomingHandoff, KvReceiver, Reservation};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until},
};
use tonic::{Request, Response, Status};
use tracing::{debug, info, warn};

use crate::{
    args::MAX_DEADLINE_SECONDS,
    engine::{EngineHandle, Refused},
    request::RequestLimits,
    sequence::Event,
};

/// Load is reported at most this often.
const LOAD_INTERVAL: Duration = Duration::from_millis(50);

type EventStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The service; what it needs of the node.
pub struct DecodeService {
    /// The way into the engine.
    pub engine: EngineHandle,
    /// What requests are checked against.
    pub limits: RequestLimits,
    /// What the node is.
    pub info: v1::NodeInfo,
    /// Where KV comes in.
    pub receiver: KvReceiver,
    /// What the node is doing.
    pub load: Arc<LoadState>,
    /// Wakes the load streams.
    pub shutdown: Shutdown,
    /// Ends the node, and says when what runs must go.
    pub drain: Drain,
}

impl From<Refused> for Status {
    fn from(e: Refused) -> Self {
        match e {
            Refused::QueueFull(_) => Status::resource_exhausted(e.to_string()),
            Refused::Draining => Status::unavailable(e.to_string()),
        }
    }
}

fn wire_load(load: Load) -> v1::NodeLoad {
    let Load { free_blocks, running, waiting, queued_tokens, open_handoffs, stranded_bytes, draining, stalled } = load;
    v1::NodeLoad {
        free_blocks: free_blocks as u32,
        running_requests: running as u32,
        waiting_requests: waiting as u32,
        queued_tokens,
        stranded_bytes,
        draining,
        open_handoffs: open_handoffs as u32,
        stalled,
    }
}

fn event(event: v1::decode_event::Event) -> v1::DecodeEvent {
    v1::DecodeEvent { event: Some(event) }
}

/// Counts how a request ended: also when its stream is dropped on the way.
struct Ending {
    load: Arc<LoadState>,
    arrived: Instant,
    reason: &'static str,
}

impl Ending {
    fn because(&mut self, reason: &'static str) {
        self.reason = reason;
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.load.metrics().finished(self.reason);
        self.load.metrics().e2e_request_latency_seconds.observe(self.arrived.elapsed().as_secs_f64());
    }
}

/// What a request's stream hears next.
enum Next {
    Engine(Option<Event>),
    Handoff(Result<Committed, HandoffError>),
    Deadline,
    /// The node drains, and the request has had its time.
    Moved,
}

/// What has ended before its time: by a fault of another part, or because time is up.
fn ended_early(deadline: Instant, message: &str) -> Status {
    if Instant::now() < deadline { Status::unavailable(message) } else { Status::deadline_exceeded(message) }
}

/// The next event; a handoff that is awaited may come first.
async fn next(
    events: &mut mpsc::Receiver<Event>,
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

impl DecodeService {
    /// The load, whenever it changes; to its end when the node drains.
    fn reports(&self) -> EventStream<v1::NodeLoad> {
        let (state, shutdown) = (self.load.clone(), self.shutdown.clone());
        let mut watch = state.watch();
        Box::pin(async_stream::stream! {
            loop {
                let load = *watch.borrow_and_update();
                yield Ok(wire_load(load));
                if load.draining && load.is_idle() {
                    return;
                }
                sleep(LOAD_INTERVAL).await;
                tokio::select! {
                    () = state.changed(&mut watch) => {}
                    () = shutdown.cancelled(), if !load.draining => {}
                }
            }
        })
    }
}

#[tonic::async_trait]
impl v1::decode_server::Decode for DecodeService {
    type WatchLoadStream = EventStream<v1::NodeLoad>;
    type DrainStream = EventStream<v1::NodeLoad>;
    type DecodeStream = EventStream<v1::DecodeEvent>;

    async fn describe(&self, _: Request<v1::DescribeRequest>) -> Result<Response<v1::DescribeResponse>, Status> {
        let load = Some(wire_load(self.load.load()));
        Ok(Response::new(v1::DescribeResponse { info: Some(self.info.clone()), load }))
    }

    async fn watch_load(&self, _: Request<v1::WatchLoadRequest>) -> Result<Response<Self::WatchLoadStream>, Status> {
        let joined = self.load.count_router();
        Ok(Response::new(Box::pin(self.reports().inspect(move |_| _ = &joined))))
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<Self::DrainStream>, Status> {
        let timeout = match request.into_inner().timeout_seconds {
            Some(seconds) if (0.0..=MAX_DEADLINE_SECONDS).contains(&seconds) => Some(Duration::from_secs_f64(seconds)),
            Some(other) => {
                let limit = format!("in [0, {MAX_DEADLINE_SECONDS}]");
                return Err(InvalidField::new("timeout_seconds", limit, other).into());
            }
            None => None,
        };
        info!(timeout_seconds = timeout.map(|timeout| timeout.as_secs_f64()), "asked to drain");
        self.drain.begin(timeout);
        Ok(Response::new(self.reports()))
    }

    async fn decode(&self, request: Request<v1::DecodeRequest>) -> Result<Response<Self::DecodeStream>, Status> {
        use v1::decode_event::Event as Wire;
        let arrived = Instant::now();
        let request = self.limits.check(request.into_inner(), arrived)?;
        let (id, deadline, prompt_tokens) = (request.id.clone(), request.deadline, request.tokens.len() as u32);
        // Named in the reservation, the producer is checked by the prefill node: what is held fits what will be sent.
        let kv_schema = KvSchema { full_model: request.producer.clone(), ..self.limits.schema.clone() };
        let (arrival, mut events) = self.engine.submit(request)?;
        let (engine, receiver, load) = (self.engine.clone(), self.receiver.clone(), self.load.clone());
        let drain = self.drain.clone();
        let kv_endpoint = self.info.kv_endpoint.clone();
        let vocab_size = self.limits.schema.vocab_size;
        let mut ending = Ending { load: load.clone(), arrived, reason: "abort" };
        // The stream owns the request: dropped, it drops `events` and the handoff, and the engine lets go.
        Ok(Response::new(Box::pin(async_stream::try_stream! {
            let mut handoff: Option<IncomingHandoff> = None;
            let mut is_here = false;
            loop {
                match next(&mut events, handoff.as_mut().filter(|_| !is_here), deadline, &drain).await {
                    Next::Engine(Some(Event::Reserved { to_fill, held_blocks })) => {
                        let ticket = Ticket(rand::random());
                        handoff = Some(receiver.reserve(Reservation {
                            ticket,
                            request_id: id.clone(),
                            lease: to_fill,
                            first_block: held_blocks as u32,
                            prompt_tokens,
                            deadline,
                        }));
                        load.publish();
                        yield event(Wire::Reserved(v1::Reserved {
                            ticket: ticket.0.to_vec(),
                            kv_endpoint: kv_endpoint.clone(),
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
                        debug!(request = %id, bytes = stats.bytes, seconds = stats.seconds, "took over");
                        engine.ready(arrival, first_token)?;
                        yield event(Wire::Ready(v1::HandoffReady { transfer: Some(stats.into()) }));
                    }
                    Next::Handoff(outcome) => {
                        let reason = match outcome {
                            Ok(committed) => format!("first token {} is not in the vocabulary", committed.first_token),
                            Err(e) => e.to_string(),
                        };
                        ending.because("error");
                        load.metrics().transfer_failures.inc();
                        warn!(request = %id, error = reason, "handoff failed");
                        Err(ended_early(deadline, &format!("taking the prompt's KV over: {reason}")))?;
                    }
                    Next::Engine(Some(Event::Token(token))) => yield event(Wire::Token(token.into())),
                    Next::Engine(Some(Event::Finished(reason))) => {
                        if let Some(handoff) = &handoff {
                            handoff.finished();
                        }
                        ending.because(reason.as_str());
                        let reason = v1::FinishReason::from(reason).into();
                        yield event(Wire::Finished(v1::DecodeFinished { reason }));
                        break;
                    }
                    Next::Engine(Some(Event::Failed(reason))) => {
                        ending.because("error");
                        Err(Status::internal(reason))?;
                    }
                    Next::Engine(None) => {
                        ending.because("error");
                        Err(ended_early(deadline, "the engine has let the request go"))?;
                    }
                    Next::Moved => {
                        debug!(request = %id, "given back");
                        Err(Status::aborted("the node is draining"))?;
                    }
                    Next::Deadline => {
                        ending.because("error");
                        Err(Status::deadline_exceeded("the request's deadline is over"))?;
                    }
                }
            }
        })))
    }
}
