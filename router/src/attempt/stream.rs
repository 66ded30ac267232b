//! A request's stream from a node, including the call that opens it.

use futures::future::BoxFuture;
use overfill_cluster::traces;
use tonic::{Request, Response, Status, Streaming, metadata::AsciiMetadataKey};
use tracing::Span;

/// A call to a node with this message. It carries the trace of the current span.
pub(super) fn traced<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    for (name, value) in traces::carry(&Span::current()) {
        if let (Ok(name), Ok(value)) = (AsciiMetadataKey::from_bytes(name.as_bytes()), value.parse()) {
            request.metadata_mut().insert(name, value);
        }
    }
    request
}

/// A stream that is open or being opened. Dropping it ends the request on the node.
pub(super) struct NodeStream<T> {
    state: State<T>,
}

enum State<T> {
    Opening(BoxFuture<'static, Result<Response<Streaming<T>>, Status>>),
    Open(Box<Streaming<T>>),
}

impl<T> NodeStream<T> {
    /// Creates a stream that `call` opens. Nothing is sent until the stream is first polled.
    pub fn new(call: impl Future<Output = Result<Response<Streaming<T>>, Status>> + Send + 'static) -> Self {
        Self { state: State::Opening(Box::pin(call)) }
    }

    /// Resolves when the node has accepted the request. Cancel safe.
    pub async fn opened(&mut self) -> Result<(), Status> {
        if let State::Opening(call) = &mut self.state {
            let stream = call.await?.into_inner();
            self.state = State::Open(Box::new(stream));
        }
        Ok(())
    }

    /// The next message. `None` at the end of the stream. Cancel safe.
    pub async fn message(&mut self) -> Result<Option<T>, Status> {
        loop {
            match &mut self.state {
                State::Open(stream) => return stream.message().await,
                State::Opening(_) => self.opened().await?,
            }
        }
    }
}
