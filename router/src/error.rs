//! The one error type of a request, and how it looks over gRPC. (`openai::error` says how it looks over HTTP.)

use std::time::Duration;

use overfill_text::TextError;
use tonic::{Code, Status};

/// Why a request ended without an answer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum GenerateError {
    /// The request can't be served as it is.
    #[error("{message}")]
    Invalid {
        /// The field at fault, where one is.
        field: Option<String>,
        /// What is wrong: names field, limit and value.
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
    #[error("the model {model:?} does not exist; served are: {served}")]
    UnknownModel {
        /// The name in the request.
        model: String,
        /// The names of the models that the router has.
        served: String,
    },
    /// As many requests wait as may.
    #[error("the queue is full: {limit} requests are running or waiting")]
    QueueFull {
        /// Most requests that run or wait.
        limit: usize,
        /// When the client should ask again.
        retry_after: Duration,
    },
    /// The wait would be longer than the request has time.
    #[error("too much is waiting: it would be this request's turn in about {:.1} s, too late for it", wait.as_secs_f64())]
    Overloaded {
        /// The wait that is expected.
        wait: Duration,
        /// When the client should ask again.
        retry_after: Duration,
    },
    /// It is the request's turn, but it would not be done in time.
    #[error("the {:.1} s that are left would not be enough", left.as_secs_f64())]
    Late {
        /// Time until the request's deadline.
        left: Duration,
        /// When the client should ask again.
        retry_after: Duration,
    },
    /// The tenant has reached one of its limits.
    #[error("this API key may have {what}")]
    Limited {
        /// The limit, and how far it is used up.
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
        /// What a node said, after `: `; may be empty.
        detail: String,
    },
    /// No node of a role takes requests.
    #[error("{0}")]
    Unavailable(String),
    /// The request's deadline has passed.
    #[error("the deadline of {} s has passed", .0.as_secs_f64())]
    Deadline(Duration),
    /// Every attempt failed, each on other nodes.
    #[error("gave up after {attempts} attempts: {last}")]
    Failed {
        /// Attempts made.
        attempts: u32,
        /// What ended the last attempt.
        last: String,
    },
    /// The router is at fault.
    #[error("internal: {0}")]
    Internal(String),
}

impl GenerateError {
    /// The error that blames `field`.
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { field: Some(field.into()), message: message.into() }
    }

    /// Whole seconds after which the client should ask again. `None`: asking again is of no use.
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

    /// The error with the message `field must be limit, got value`.
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
