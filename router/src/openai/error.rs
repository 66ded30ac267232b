//! Errors in the format of OpenAI's API.

use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::GenerateError;

/// An error response to an HTTP client.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<String>,
    message: String,
    retry_after_seconds: Option<u64>,
    /// Why the request was refused, for metrics.
    reason: &'static str,
}

/// Response extension of an [`ApiError`]: why the request was refused.
#[derive(Clone, Copy, Debug)]
pub struct Refusal(pub &'static str);

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: String) -> Self {
        Self { status, kind, code, param: None, message, retry_after_seconds: None, reason: "invalid" }
    }

    /// An error with status 400: the request is invalid.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", None, message.into())
    }

    /// The same error with another status.
    pub fn with_status(self, status: StatusCode) -> Self {
        Self { status, ..self }
    }

    /// The JSON form `{"error": {...}}`, for a response body or an event of a stream.
    pub fn body(&self) -> Value {
        let Self { status: _, kind, code, param, message, retry_after_seconds: _, reason: _ } = self;
        json!({"error": {"message": message, "type": kind, "param": param, "code": code}})
    }
}

impl From<GenerateError> for ApiError {
    fn from(e: GenerateError) -> Self {
        let message = e.to_string();
        let (retry_after_seconds, reason) = (e.retry_after_seconds(), e.reason());
        let invalid = "invalid_request_error";
        let error = match e {
            GenerateError::Invalid { field, .. } => Self { param: field, ..Self::bad_request(message) },
            GenerateError::ContextLength { .. } => {
                Self::new(StatusCode::BAD_REQUEST, invalid, Some("context_length_exceeded"), message)
            }
            GenerateError::UnknownModel { .. } => {
                let error = Self::new(StatusCode::NOT_FOUND, invalid, Some("model_not_found"), message);
                Self { param: Some("model".into()), ..error }
            }
            GenerateError::QueueFull { .. }
            | GenerateError::NoRoom { .. }
            | GenerateError::Overloaded { .. }
            | GenerateError::Late { .. }
            | GenerateError::Limited { .. } => {
                let status = StatusCode::TOO_MANY_REQUESTS;
                Self::new(status, "rate_limit_error", Some("rate_limit_exceeded"), message)
            }
            GenerateError::Unauthenticated => {
                Self::new(StatusCode::UNAUTHORIZED, invalid, Some("invalid_api_key"), message)
            }
            GenerateError::Unavailable(_) | GenerateError::Failed { .. } => {
                let status = StatusCode::SERVICE_UNAVAILABLE;
                Self::new(status, "server_error", Some("service_unavailable"), message)
            }
            GenerateError::Deadline(_) => {
                Self::new(StatusCode::GATEWAY_TIMEOUT, "server_error", Some("deadline_exceeded"), message)
            }
            GenerateError::Internal(_) => Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", None, message),
        };
        Self { retry_after_seconds, reason, ..error }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.body().to_string()));
        *response.status_mut() = self.status;
        response.extensions_mut().insert(Refusal(self.reason));
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after_seconds {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
