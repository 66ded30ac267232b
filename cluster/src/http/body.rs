//! Bodies that know of their limits: a request's must come in time, a response's keeps its request in progress.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::BoxError;
use axum::body::{Body, Bytes};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

use super::places::InProgress;

/// A request's body has taken too long.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the body must be here within {} s", .0.as_secs_f64())]
pub struct SlowBody(pub Duration);

/// The body of a request, which has so long in all.
pub(super) struct Upload {
    body: Incoming,
    limit: Duration,
    end: Instant,
    /// Made when there is something to wait for.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Upload {
    pub fn new(body: Incoming, limit: Duration) -> Self {
        Self { body, limit, end: Instant::now() + limit, timer: None }
    }
}

impl HttpBody for Upload {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        let end = self.end;
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(end)));
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(Some(Err(SlowBody(self.limit).into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The body of a response. Until it has been taken, or its client has gone, the request is in progress.
pub(super) struct Download {
    body: Body,
    _request: InProgress,
}

impl Download {
    pub fn new(body: Body, request: InProgress) -> Self {
        Self { body, _request: request }
    }
}

impl HttpBody for Download {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
