//! The gRPC service `overfill.v1.Prefill`.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures::{Stream, StreamExt as _};
use overfill_cluster::{Drain, Load, LoadState, Shutdown};
use overfill_kv::TransferStats;
use overfill_kv::handoff::{Failure, RefuseReason};
use overfill_proto::{InvalidField, v1};
use overfill_text::TextFiles;
use overfill_transport::HandoffError;
use tokio::{
    sync::oneshot,
    time::{Instant, sleep, sleep_until},
};
use tonic::{Code, Request, Response, Status};
use tracing::{debug, info, warn};

use crate::{
    args::MAX_DEADLINE_SECONDS,
    engine::{EngineHandle, Refused},
    job::Event,
    request::RequestLimits,
};

/// Load is reported at most this often.
const LOAD_INTERVAL: Duration = Duration::from_millis(50);

type EventStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The service; what it needs of the node.
pub struct PrefillService {
    /// The way into the engine.
    pub engine: EngineHandle,
    /// What requests are checked against.
    pub limits: RequestLimits,
    /// What the node is.
    pub info: v1::NodeInfo,
    /// The model's text files.
    pub files: Arc<TextFiles>,
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

fn event(event: v1::prefill_event::Event) -> v1::PrefillEvent {
    v1::PrefillEvent { event: Some(event) }
}

/// What a request's stream hears next.
enum Next {
    Engine(Option<Event>),
    Handoff(Result<TransferStats, Status>),
    Deadline,
    /// The node drains, and the request has had its time.
    Moved,
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

/// What has ended before its time: by a fault of another part, or because time is up.
fn ended_early(deadline: Instant, message: &str) -> Status {
    if Instant::now() < deadline { Status::unavailable(message) } else { Status::deadline_exceeded(message) }
}

/// The outcome of a handoff, once there is one; never, while there is no handoff.
async fn outcome(
    transfer: &mut Option<oneshot::Receiver<Result<TransferStats, HandoffError>>>,
    deadline: Instant,
) -> Result<TransferStats, Status> {
    let Some(receiver) = transfer else { return std::future::pending().await };
    match receiver.await {
        Ok(Ok(stats)) => Ok(stats),
        // The client has gone, and the decode node heard of it first: nobody's fault.
        Ok(Err(HandoffError::Failed(Failure::Refused(RefuseReason::Cancelled)))) => {
            Err(Status::cancelled("the decode node's side of the request was cancelled"))
        }
        Ok(Err(e)) => Err(ended_early(deadline, &format!("handing the prompt's KV over: {e}"))),
        Err(_) => Err(ended_early(deadline, "the handoff ended without an outcome")),
    }
}

impl PrefillService {
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
impl v1::prefill_server::Prefill for PrefillService {
    type WatchLoadStream = EventStream<v1::NodeLoad>;
    type DrainStream = EventStream<v1::NodeLoad>;
    type PrefillStream = EventStream<v1::PrefillEvent>;

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

    async fn model_files(&self, _: Request<v1::ModelFilesRequest>) -> Result<Response<v1::ModelFilesResponse>, Status> {
        let TextFiles {
            tokenizer_json,
            tokenizer_config_json,
            chat_template,
            generation_config_json,
            special_tokens_map_json,
        } = (*self.files).clone();
        Ok(Response::new(v1::ModelFilesResponse {
            tokenizer_json,
            tokenizer_config_json: tokenizer_config_json.unwrap_or_default(),
            chat_template: chat_template.unwrap_or_default(),
            generation_config_json: generation_config_json.unwrap_or_default(),
            special_tokens_map_json: special_tokens_map_json.unwrap_or_default(),
        }))
    }

    async fn prefill(&self, request: Request<v1::PrefillRequest>) -> Result<Response<Self::PrefillStream>, Status> {
        use v1::prefill_event::Event as Wire;
        let arrived = Instant::now();
        let request = self.limits.check(request.into_inner(), arrived)?;
        let (id, deadline, has_handoff) = (request.id.clone(), request.deadline, request.handoff.is_some());
        let mut events = self.engine.submit(request)?;
        let drain = self.drain.clone();
        let mut ending = Ending { load: self.load.clone(), arrived, reason: "abort" };
        // The stream owns the request: dropped, it drops `events`, and the engine lets go.
        Ok(Response::new(Box::pin(async_stream::try_stream! {
            let mut transfer = None;
            let mut computed = false;
            let mut handed_over = None;
            while !computed || has_handoff {
                // Never before the first token: that was said first, but this thread may have been kept from hearing it.
                if let Some(stats) = handed_over.take_if(|_| computed) {
                    ending.because("length");
                    yield event(Wire::Transferred(v1::TransferStats::from(stats)));
                    break;
                }
                let next = tokio::select! {
                    biased;
                    next = events.recv(), if !computed => Next::Engine(next),
                    stats = outcome(&mut transfer, deadline) => Next::Handoff(stats),
                    () = sleep_until(deadline) => Next::Deadline,
                    () = drain.is_over() => Next::Moved,
                };
                match next {
                    Next::Engine(Some(Event::Started { cached_tokens, queued, transfer: started })) => {
                        transfer = started;
                        let queue_seconds = queued.as_secs_f64();
                        yield event(Wire::Started(v1::PrefillStarted {
                            cached_tokens: cached_tokens as u32,
                            queue_seconds,
                        }));
                    }
                    Next::Engine(Some(Event::PromptLogprobs(tokens))) => {
                        let tokens = tokens.into_iter().map(Into::into).collect();
                        yield event(Wire::PromptLogprobs(v1::PromptLogprobs { tokens }));
                    }
                    Next::Engine(Some(Event::FirstToken { token, computed_in })) => {
                        computed = true;
                        if !has_handoff {
                            ending.because("length");
                        }
                        yield event(Wire::FirstToken(v1::FirstToken {
                            token: Some(token.into()),
                            prefill_seconds: computed_in.as_secs_f64(),
                        }));
                    }
                    Next::Engine(Some(Event::Failed(reason))) => {
                        ending.because("error");
                        Err(Status::internal(reason))?;
                    }
                    Next::Handoff(Ok(stats)) => {
                        debug!(request = %id, bytes = stats.bytes, seconds = stats.seconds, "handed over");
                        (transfer, handed_over) = (None, Some(stats));
                    }
                    Next::Handoff(Err(status)) if status.code() == Code::Cancelled => {
                        debug!(request = %id, "the decode node's side was cancelled");
                        Err(status)?;
                    }
                    Next::Handoff(Err(status)) => {
                        warn!(request = %id, error = status.message(), "handoff failed");
                        ending.because("error");
                        Err(status)?;
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
