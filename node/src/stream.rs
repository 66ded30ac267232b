//! Helpers for the response streams of both roles.

use std::{pin::Pin, sync::Arc};

use futures::Stream;
use tokio::time::Instant;
use tonic::Status;

use crate::LoadState;

/// A gRPC response stream. Dropping it cancels the request on the node.
pub type EventStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Counts how a request ended when it is dropped, also if the response stream was dropped early.
pub struct Ending {
    load: Arc<LoadState>,
    arrived: Instant,
    reason: &'static str,
}

impl Ending {
    /// Creates it for a request that arrived at `arrived`. Unless [`because`](Self::because) is called, the request
    /// counts as `abort`.
    pub fn new(load: Arc<LoadState>, arrived: Instant) -> Self {
        Self { load, arrived, reason: "abort" }
    }

    /// Sets the `finished_reason` under which the request is counted.
    pub fn because(&mut self, reason: &'static str) {
        self.reason = reason;
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.load.metrics().finished(self.reason);
        self.load.metrics().e2e_request_latency_seconds.observe(self.arrived.elapsed().as_secs_f64());
    }
}

/// Status of a request that failed: UNAVAILABLE before its deadline, DEADLINE_EXCEEDED after it.
pub fn ended_early(deadline: Instant, message: &str) -> Status {
    if Instant::now() < deadline { Status::unavailable(message) } else { Status::deadline_exceeded(message) }
}
