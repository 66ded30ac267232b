//! Errors in the format of OpenAI's API.

use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::GenerateError;

/// An error response to an HTTP client. It is an extension of its response, for middleware.
#[derive(Clone, Debug)]
pub struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<String>,
    message: String,
    retry_after_seconds: Option<u64>,
    /// What metrics count. `None`: the sequence that failed is counted already.
    refusal: Option<Box<Refusal>>,
}

/// A request that was refused, for metrics.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// Why it was refused.
    pub reason: &'static str,
    /// The model's label. Empty if the router does not know the model.
    pub model: String,
}

impl Refusal {
    fn new(reason: &'static str) -> Box<Self> {
        Box::new(Self { reason, model: String::new() })
    }
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: String) -> Self {
        let refusal = Some(Refusal::new("invalid"));
        Self { status, kind, code, param: None, message, retry_after_seconds: None, refusal }
    }

    /// An error with status 400: the request is invalid.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", None, message.into())
    }

    /// The same error with another status.
    pub fn with_status(self, status: StatusCode) -> Self {
        Self { status, ..self }
    }

    /// The same error of a request for a model. `label`: the model's label in metrics.
    pub fn of_model(mut self, label: String) -> Self {
        if let Some(refusal) = &mut self.refusal {
            refusal.model = label;
        }
        self
    }

    /// An error that ended a sequence. Metrics have counted the sequence.
    pub fn of_sequence(e: GenerateError) -> Self {
        Self { refusal: None, ..e.into() }
    }

    /// What metrics count.
    pub fn refusal(&self) -> Option<&Refusal> {
        self.refusal.as_deref()
    }

    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// What is wrong.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The JSON form `{"error": {...}}`, for a response body or an event of a stream.
    pub fn body(&self) -> Value {
        let Self { status: _, kind, code, param, message, retry_after_seconds: _, refusal: _ } = self;
        json!({"error": {"message": message, "type": kind, "param": param, "code": code}})
    }
}

impl From<GenerateError> for ApiError {
    fn from(e: GenerateError) -> Self {
        let message = e.to_string();
        let (retry_after_seconds, refusal) = (e.retry_after_seconds(), Some(Refusal::new(e.reason())));
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
        Self { retry_after_seconds, refusal, ..error }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.body().to_string()));
        *response.status_mut() = self.status;
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after_seconds {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response.extensions_mut().insert(self);
        response
    }
}
