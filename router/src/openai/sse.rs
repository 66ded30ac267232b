//! Server-sent events.

use async_stream::stream;
use axum::{
    body::{Body, Bytes},
    http::{HeaderValue, header},
    response::Response,
};
use futures::{Stream, StreamExt as _};
use serde::Serialize;
use serde_json::Value;

use super::{batch::Merged, error::ApiError};
use crate::{GenerateError, request::Output};

/// The last event of a stream of completions.
const DONE: &[u8] = b"data: [DONE]\n\n";

/// Serialises one event.
pub fn event(data: &impl Serialize) -> Result<Bytes, GenerateError> {
    let mut out = b"data: ".to_vec();
    serde_json::to_writer(&mut out, data).map_err(|e| GenerateError::Internal(e.to_string()))?;
    out.extend_from_slice(b"\n\n");
    Ok(out.into())
}

/// Serialises an event with a name, which is its field `type` as well.
fn named(data: &Value) -> Bytes {
    format!("event: {}\ndata: {data}\n\n", data["type"].as_str().unwrap_or_default()).into()
}

/// A streaming response with completions. An error is sent as the last event before `[DONE]`, so a stream never ends silently.
pub fn response(events: impl Stream<Item = Result<Bytes, GenerateError>> + Send + 'static) -> Response {
    let events = events
        .map(|event| match event {
            Ok(bytes) => bytes,
            Err(e) => Bytes::from(format!("data: {}\n\n", ApiError::from(e).body())),
        })
        .chain(futures::stream::iter([Bytes::from_static(DONE)]));
    respond(events)
}

/// An answer as named events: those of `begin`, then what `events` makes of each output. A failure is the last to make any.
pub fn answer(
    begin: [Value; 2],
    mut merged: Merged,
    mut events: impl FnMut(Result<Output, ApiError>) -> Vec<Value> + Send + 'static,
) -> Response {
    respond(stream! {
        for event in begin {
            yield named(&event);
        }
        while let Some((_, output)) = merged.next().await {
            let failed = output.is_err();
            for event in events(output.map_err(ApiError::from)) {
                yield named(&event);
            }
            if failed {
                break;
            }
        }
    })
}

/// A streaming response with these events.
pub fn respond(events: impl Stream<Item = Bytes> + Send + 'static) -> Response {
    let mut response = Response::new(Body::from_stream(events.map(Ok::<_, std::convert::Infallible>)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}
