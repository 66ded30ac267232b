//! What the response streams of both roles have in common.

use std::{pin::Pin, sync::Arc};

use futures::Stream;
use tokio::time::Instant;
use tonic::Status;

use crate::LoadState;

/// A stream of one response. Its life is the life of the request on the node.
pub type EventStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Counts how a request ended, also when its stream is dropped on the way.
pub struct Ending {
    load: Arc<LoadState>,
    arrived: Instant,
    reason: &'static str,
}

impl Ending {
    /// The request arrived at `arrived`. Until something else is said, it ends as `abort`.
    pub fn new(load: Arc<LoadState>, arrived: Instant) -> Self {
        Self { load, arrived, reason: "abort" }
    }

    /// The request ends for this `finished_reason`.
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

/// The status of a request that ends before its time: UNAVAILABLE, or DEADLINE_EXCEEDED once its deadline is over.
pub fn ended_early(deadline: Instant, message: &str) -> Status {
    if Instant::now() < deadline { Status::unavailable(message) } else { Status::deadline_exceeded(message) }
}
