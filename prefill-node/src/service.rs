//! The gRPC service `overfill.v1.Prefill`.

use std::sync::Arc;

use overfill_kv::handoff::{Failure, RefuseReason};
use overfill_kv::{Role, TransferStats};
use overfill_node::{Constraints, Ending, EventStream, NodeCore, RequestLimits, ended_early, request_span};
use overfill_proto::v1;
use overfill_text::TextFiles;
use overfill_transport::HandoffError;
use tokio::{
    sync::oneshot,
    time::{Instant, sleep_until, timeout_at},
};
use tonic::{Code, Request, Response, Status};
use tracing::{debug, warn};

use crate::{
    engine::EngineHandle,
    extension::{ExtendError, Extended},
    job::JobEvent,
    request,
    score::{ScoreError, Scored},
};

/// Implementation of the gRPC service `overfill.v1.Prefill`.
pub struct PrefillService {
    /// Handle of the engine.
    pub engine: EngineHandle,
    /// Limits for requests.
    pub limits: RequestLimits,
    /// Constraints of outputs.
    pub constraints: Constraints,
    /// Tokenizer, chat template and other text files of the model.
    pub files: Arc<TextFiles>,
    /// Shared state of the node.
    pub core: NodeCore,
}

fn event(event: v1::prefill_event::Event) -> v1::PrefillEvent {
    v1::PrefillEvent { event: Some(event) }
}

/// The next event of a response stream.
enum Next {
    Engine(Option<JobEvent>),
    Handoff(Result<TransferStats, Status>),
    Deadline,
    /// The node is draining and the drain timeout is over. The router moves the request to another node.
    Moved,
}

/// Waits for the outcome of the handoff. Pending forever if `transfer` is `None`.
async fn outcome(
    transfer: &mut Option<oneshot::Receiver<Result<TransferStats, HandoffError>>>,
    deadline: Instant,
) -> Result<TransferStats, Status> {
    let Some(receiver) = transfer else { return std::future::pending().await };
    match receiver.await {
        Ok(Ok(stats)) => Ok(stats),
        // Not an error: the client is gone, and the decode node noticed it first.
        Ok(Err(HandoffError::Failed(Failure::Refused(RefuseReason::Cancelled)))) => {
            Err(Status::cancelled("the request was cancelled on the decode node"))
        }
        Ok(Err(e)) => Err(ended_early(deadline, &format!("sending the prompt's KV: {e}"))),
        Err(_) => Err(ended_early(deadline, "the handoff ended without an outcome")),
    }
}

#[tonic::async_trait]
impl v1::prefill_server::Prefill for PrefillService {
    type PrefillStream = EventStream<v1::PrefillEvent>;

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
        let span = request_span(Role::Prefill, &request);
        let mut request = span.in_scope(|| request::check(&self.limits, request.into_inner(), arrived))?;
        request.constraint = self.constraints.begin(&request.sampling, request.output(), request.deadline).await?;
        span.record("request", tracing::field::display(&request.id));
        span.record("prompt_tokens", request.tokens.len());
        let (id, deadline, has_handoff) = (request.id.clone(), request.deadline, request.handoff.is_some());
        let stays_open = request.lease.is_some();
        let mut events = self.engine.submit(request)?;
        let drain = self.core.drain.clone();
        let mut ending = Ending::new(self.core.load.clone(), arrived, span.clone());
        // The stream owns the request. Dropping the stream drops `events`, which cancels the request in the engine.
        Ok(Response::new(Box::pin(async_stream::try_stream! {
            let mut transfer = None;
            let mut computed = false;
            let mut handed_over = None;
            while !computed || has_handoff || stays_open {
                // `Transferred` must follow the first token. The engine sends the first token earlier, but this task
                // may see the outcome of the handoff first.
                if let Some(stats) = handed_over.take_if(|_| computed) {
                    ending.because("length");
                    yield event(Wire::Transferred(v1::TransferStats::from(stats)));
                    if !stays_open {
                        break;
                    }
                }
                let next = tokio::select! {
                    biased;
                    next = events.recv(), if !computed || stays_open => Next::Engine(next),
                    stats = outcome(&mut transfer, deadline) => Next::Handoff(stats),
                    () = sleep_until(deadline) => Next::Deadline,
                    () = drain.is_over() => Next::Moved,
                };
                match next {
                    Next::Engine(Some(JobEvent::Started { cached_tokens, queued, transfer: started })) => {
                        transfer = started;
                        span.record("cached_tokens", cached_tokens);
                        let queue_seconds = queued.as_secs_f64();
                        yield event(Wire::Started(v1::PrefillStarted {
                            cached_tokens: cached_tokens as u32,
                            queue_seconds,
                        }));
                    }
                    Next::Engine(Some(JobEvent::PromptLogprobs(tokens))) => {
                        let tokens = tokens.into_iter().map(Into::into).collect();
                        yield event(Wire::PromptLogprobs(v1::PromptLogprobs { tokens }));
                    }
                    Next::Engine(Some(JobEvent::FirstToken { token, computed_in })) => {
                        computed = true;
                        if !has_handoff || stays_open {
                            ending.because("length");
                        }
                        yield event(Wire::FirstToken(v1::FirstToken {
                            token: Some(token.into()),
                            prefill_seconds: computed_in.as_secs_f64(),
                        }));
                    }
                    Next::Engine(Some(JobEvent::Evicted)) => {
                        debug!(request = %id, "the open prefill makes room");
                        Err(Status::aborted("the open prefill has made room for others"))?;
                    }
                    Next::Engine(Some(JobEvent::Failed(reason))) => {
                        ending.because("error");
                        Err(Status::internal(reason))?;
                    }
                    Next::Handoff(Ok(stats)) => {
                        debug!(request = %id, bytes = stats.bytes, seconds = stats.seconds, "KV handed over");
                        (transfer, handed_over) = (None, Some(stats));
                    }
                    Next::Handoff(Err(status)) if status.code() == Code::Cancelled => {
                        debug!(request = %id, "the request was cancelled on the decode node");
                        Err(status)?;
                    }
                    Next::Handoff(Err(status)) => {
                        warn!(request = %id, error = status.message(), "handoff failed");
                        ending.because("error");
                        Err(status)?;
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

    async fn extend(&self, request: Request<v1::ExtendRequest>) -> Result<Response<v1::ExtendResponse>, Status> {
        let arrived = Instant::now();
        let (reply, answer) = oneshot::channel();
        let extension = request::check_extension(&self.limits, request.into_inner(), arrived, reply)?;
        let deadline = extension.deadline;
        self.engine.extend(extension)?;
        let late = |_| Status::deadline_exceeded("the deadline of the extension has passed");
        let Extended { tokens, seconds_per_draft } = match timeout_at(deadline, answer).await.map_err(late)? {
            Ok(Ok(extended)) => extended,
            Ok(Err(e @ ExtendError::NotOpen(_))) => return Err(Status::not_found(e.to_string())),
            Ok(Err(e @ ExtendError::Evicted)) => return Err(Status::aborted(e.to_string())),
            Ok(Err(e @ ExtendError::Failed(_))) => return Err(Status::internal(e.to_string())),
            Ok(Err(e @ ExtendError::Grammar(_))) => return Err(Status::invalid_argument(e.to_string())),
            // Its stream has ended.
            Err(_) => return Err(Status::not_found("the prefill was closed")),
        };
        let tokens = tokens.into_iter().map(Into::into).collect();
        let seconds = arrived.elapsed().as_secs_f64();
        Ok(Response::new(v1::ExtendResponse { tokens, seconds, seconds_per_draft }))
    }

    async fn score(&self, request: Request<v1::ScoreRequest>) -> Result<Response<v1::ScoreResponse>, Status> {
        let request = request::check_score(&self.limits, request.into_inner(), Instant::now())?;
        let (deadline, (reply, result)) = (request.deadline, oneshot::channel());
        self.engine.score(request, reply)?;
        let late = |_| Status::deadline_exceeded("the deadline of the score has passed");
        match timeout_at(deadline, result).await.map_err(late)? {
            Ok(Ok(Scored { choices, logprobs })) => Ok(Response::new(v1::ScoreResponse {
                choices: choices.into_iter().map(|choice| choice.token).collect(),
                logprobs: logprobs.into_iter().map(|given| given.logprob).collect(),
            })),
            Ok(Err(e @ ScoreError::QueueFull)) => Err(Status::resource_exhausted(e.to_string())),
            Ok(Err(e @ ScoreError::Evicted)) => Err(Status::aborted(e.to_string())),
            Ok(Err(e @ ScoreError::Failed(_))) => Err(Status::internal(e.to_string())),
            Err(_) => Err(ended_early(deadline, "the engine dropped the score")),
        }
    }
}
