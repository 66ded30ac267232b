//! Errors in the format of Anthropic's API.

use axum::{
    body::Body,
    http::{StatusCode, header},
    response::Response,
};
use serde_json::{Value, json};

use crate::openai::error::ApiError;

/// The JSON form `{"type": "error", "error": {...}}`, for a response body or an event of a stream.
pub fn body(error: &ApiError) -> Value {
    let kind = match error.status() {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::FORBIDDEN => "permission_error",
        StatusCode::NOT_FOUND => "not_found_error",
        StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
        StatusCode::GATEWAY_TIMEOUT => "timeout_error",
        status if status.is_client_error() => "invalid_request_error",
        _ => "api_error",
    };
    json!({"type": "error", "error": {"type": kind, "message": error.message()}})
}

/// Middleware: every response with an error gets a body in this format. Its status and headers stay.
pub async fn rewrite(mut response: Response) -> Response {
    let error: Option<&ApiError> = response.extensions().get();
    if let Some(body) = error.map(body) {
        response.headers_mut().remove(header::CONTENT_LENGTH);
        *response.body_mut() = Body::from(body.to_string());
    }
    response
}
