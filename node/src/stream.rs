//! Helpers for the response streams of both roles.

use std::{pin::Pin, sync::Arc};

use futures::Stream;
use overfill_cluster::traces;
use overfill_kv::Role;
use tokio::time::Instant;
use tonic::{Request, Status};
use tracing::{Span, field::Empty, info_span};

use crate::LoadState;

/// A gRPC response stream. Dropping it cancels the request on the node.
pub type EventStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Counts how a request ended when it is dropped, also if the response stream was dropped early.
pub struct Ending {
    load: Arc<LoadState>,
    arrived: Instant,
    reason: &'static str,
    span: Span,
}

impl Ending {
    /// Creates it for a request that arrived at `arrived`. Unless [`because`](Self::because) is called, the request
    /// counts as `abort`. `span` is the span of the request.
    pub fn new(load: Arc<LoadState>, arrived: Instant, span: Span) -> Self {
        Self { load, arrived, reason: "abort", span }
    }

    /// Sets the `finished_reason` under which the request is counted.
    pub fn because(&mut self, reason: &'static str) {
        self.reason = reason;
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.span.record("finish_reason", self.reason);
        self.load.metrics().finished(self.reason);
        self.load.metrics().e2e_request_latency_seconds.observe(self.arrived.elapsed().as_secs_f64());
    }
}

/// The span of a request on a node. It continues the router's trace.
pub fn request_span<T>(role: Role, request: &Request<T>) -> Span {
    let span = info_span!(
        "request",
        otel.name = role.as_str(),
        otel.kind = "server",
        request = Empty,
        trace_id = Empty,
        prompt_tokens = Empty,
        cached_tokens = Empty,
        finish_reason = Empty
    );
    traces::continue_from(&span, &request.metadata().clone().into_headers());
    span
}

/// Status of a request that failed: UNAVAILABLE before its deadline, DEADLINE_EXCEEDED after it.
pub fn ended_early(deadline: Instant, message: &str) -> Status {
    if Instant::now() < deadline { Status::unavailable(message) } else { Status::deadline_exceeded(message) }
}
