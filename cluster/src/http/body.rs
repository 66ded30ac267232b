//! Body wrappers: a request body has a time limit, and a response body keeps its request in progress.

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

/// A request body did not arrive within the time limit, which is the field.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the request body must arrive within {} s", .0.as_secs_f64())]
pub struct SlowBody(pub Duration);

/// A request body that must arrive completely within `limit`, else it fails with [`SlowBody`].
pub(super) struct Upload {
    body: Incoming,
    limit: Duration,
    end: Instant,
    /// Created at the first poll that has to wait.
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

/// A response body. The request stays in progress until this is dropped: the client has read it all or disconnected.
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
