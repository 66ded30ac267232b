//! The error type of requests and its conversion to gRPC. `openai::error` converts it to HTTP.

use std::time::Duration;

use overfill_text::TextError;
use tonic::{Code, Status};

/// Why a request ended without an answer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum GenerateError {
    /// The request is invalid.
    #[error("{message}")]
    Invalid {
        /// The invalid field, if the error concerns one field.
        field: Option<String>,
        /// Message with field, limit and value.
        message: String,
    },
    /// Prompt and output don't fit the model's context.
    #[error(
        "this model's context holds {limit} tokens, but the request needs {value}: {prompt} of the prompt, {output} to generate"
    )]
    ContextLength {
        /// Tokens that the context holds.
        limit: u32,
        /// Tokens of prompt and output together.
        value: u64,
        /// Tokens of the prompt.
        prompt: u64,
        /// Tokens to generate.
        output: u64,
    },
    /// The router has no model of this name.
    #[error("the model {model:?} does not exist; served models: {served}")]
    UnknownModel {
        /// The name in the request.
        model: String,
        /// The names of the models that the router has.
        served: String,
    },
    /// The queue is full.
    #[error("the queue is full: {limit} requests are running or waiting")]
    QueueFull {
        /// Maximum number of running and waiting requests.
        limit: usize,
        /// When the client should ask again.
        retry_after: Duration,
    },
    /// The expected wait is longer than the request's time limit allows.
    #[error("too many requests are waiting: this one would start in about {:.1} s, which is too late", wait.as_secs_f64())]
    Overloaded {
        /// The expected wait.
        wait: Duration,
        /// When the client should ask again.
        retry_after: Duration,
    },
    /// The request could be admitted, but would not end before its deadline.
    #[error("this request would probably not end in the {:.1} s until its deadline", left.as_secs_f64())]
    Late {
        /// Time until the request's deadline.
        left: Duration,
        /// When the client should ask again.
        retry_after: Duration,
    },
    /// The tenant has reached one of its limits.
    #[error("this API key is limited to {what}")]
    Limited {
        /// The limit, and how much of it is used.
        what: String,
        /// When the client should ask again.
        retry_after: Duration,
    },
    /// The request has no API key, or an unknown one.
    #[error("a valid API key is needed: authorization: Bearer KEY")]
    Unauthenticated,
    /// No node had room in time.
    #[error("no node had room within {} s{detail}", waited.as_secs_f64())]
    NoRoom {
        /// How long the request waited.
        waited: Duration,
        /// The last node's message, prefixed with `: `, or empty.
        detail: String,
    },
    /// No node of a role takes requests.
    #[error("{0}")]
    Unavailable(String),
    /// The request's deadline has passed.
    #[error("the deadline of {} s has passed", .0.as_secs_f64())]
    Deadline(Duration),
    /// The last allowed attempt failed, or the retry budget was used up.
    #[error("gave up after {attempts} attempts: {last}")]
    Failed {
        /// Attempts made.
        attempts: u32,
        /// What ended the last attempt.
        last: String,
    },
    /// A bug in the router.
    #[error("internal: {0}")]
    Internal(String),
}

impl GenerateError {
    /// An invalid request, because of `field`.
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { field: Some(field.into()), message: message.into() }
    }

    /// Every [`reason`](Self::reason).
    pub const REASONS: [&str; 13] = [
        "invalid",
        "context_length",
        "unknown_model",
        "queue_full",
        "overloaded",
        "late",
        "limited",
        "unauthenticated",
        "no_room",
        "unavailable",
        "deadline",
        "failed",
        "internal",
    ];

    /// Name of the variant, for metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Invalid { .. } => "invalid",
            Self::ContextLength { .. } => "context_length",
            Self::UnknownModel { .. } => "unknown_model",
            Self::QueueFull { .. } => "queue_full",
            Self::Overloaded { .. } => "overloaded",
            Self::Late { .. } => "late",
            Self::Limited { .. } => "limited",
            Self::Unauthenticated => "unauthenticated",
            Self::NoRoom { .. } => "no_room",
            Self::Unavailable(_) => "unavailable",
            Self::Deadline(_) => "deadline",
            Self::Failed { .. } => "failed",
            Self::Internal(_) => "internal",
        }
    }

    /// Retry-after time in whole seconds. `None`: a retry would not help.
    pub fn retry_after_seconds(&self) -> Option<u64> {
        match self {
            Self::QueueFull { retry_after, .. }
            | Self::Overloaded { retry_after, .. }
            | Self::Late { retry_after, .. }
            | Self::Limited { retry_after, .. } => Some(retry_after.as_secs_f64().ceil().max(1.0) as u64),
            Self::NoRoom { .. } | Self::Unavailable(_) | Self::Failed { .. } => Some(1),
            Self::Invalid { .. }
            | Self::ContextLength { .. }
            | Self::UnknownModel { .. }
            | Self::Unauthenticated
            | Self::Deadline(_)
            | Self::Internal(_) => None,
        }
    }

    /// The same fault of a field that another API calls by another name: `from`, a part of the name, is replaced by `to`.
    pub fn renamed(self, from: &str, to: &str) -> Self {
        match self {
            Self::Invalid { field: Some(field), message } => {
                let name = field.replace(from, to);
                let message = match message.strip_prefix(&field) {
                    Some(rest) => name.clone() + rest,
                    None => message,
                };
                Self::Invalid { field: Some(name), message }
            }
            other => other,
        }
    }

    /// An invalid request with the message `{field} must be {limit}, got {value}`.
    pub fn limit(field: &str, limit: impl std::fmt::Display, value: impl std::fmt::Display) -> Self {
        Self::invalid(field, format!("{field} must be {limit}, got {value}"))
    }
}

impl From<TextError> for GenerateError {
    fn from(e: TextError) -> Self {
        match e {
            TextError::NoChatTemplate | TextError::Template(_) => Self::invalid("messages", e.to_string()),
            other => Self::Internal(other.to_string()),
        }
    }
}

impl From<GenerateError> for Status {
    fn from(e: GenerateError) -> Self {
        let code = match &e {
            GenerateError::Invalid { .. } | GenerateError::ContextLength { .. } => Code::InvalidArgument,
            GenerateError::UnknownModel { .. } => Code::NotFound,
            GenerateError::QueueFull { .. }
            | GenerateError::NoRoom { .. }
            | GenerateError::Overloaded { .. }
            | GenerateError::Late { .. }
            | GenerateError::Limited { .. } => Code::ResourceExhausted,
            GenerateError::Unauthenticated => Code::Unauthenticated,
            GenerateError::Unavailable(_) | GenerateError::Failed { .. } => Code::Unavailable,
            GenerateError::Deadline(_) => Code::DeadlineExceeded,
            GenerateError::Internal(_) => Code::Internal,
        };
        let mut status = Status::new(code, e.to_string());
        if let Some(seconds) = e.retry_after_seconds() {
            status.metadata_mut().insert("retry-after", seconds.into());
        }
        status
    }
}
