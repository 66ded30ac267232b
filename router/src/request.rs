//! Requests that have passed all checks that do not need a node.

use std::{sync::Arc, time::Duration};

use overfill_kv::{FinishReason, Mode, OutputToken, RequestId, Role, SamplingParams, TransferStats};
use rand::Rng as _;
use tokio::time::Instant;

use crate::{GenerateError, legs::LegTimes, node::ServedModel};

/// Maximum number of stop strings per request.
pub const MAX_STOPS: usize = 16;
/// Maximum length of a stop string, in bytes.
pub const MAX_STOP_BYTES: usize = 1024;

/// One sequence to generate.
#[derive(Clone)]
pub struct Generation {
    /// Id of the sequence, the same on every node.
    pub request_id: RequestId,
    /// The model.
    pub model: Arc<ServedModel>,
    /// The prompt's token ids, at least one, all below the model's `vocab_size`.
    pub prompt: Arc<[u32]>,
    /// Sampling parameters, valid for the model's vocabulary.
    pub sampling: SamplingParams,
    /// Maximum number of tokens to generate. 0 only with `prompt_logprobs`: the prompt is scored and nothing is generated.
    pub max_tokens: u32,
    /// Token ids that end the text: the model's own, unless the request ignores them, and the request's.
    pub stop_token_ids: Arc<[u32]>,
    /// Stop strings.
    pub stop: Vec<String>,
    /// Whether the stop string is part of the output.
    pub include_stop: bool,
    /// Whether to omit special tokens from the text.
    pub skip_special: bool,
    /// Special tokens that are part of the text even so, because they mark parts of an answer.
    pub shown_special: Arc<[u32]>,
    /// Whether to report the prompt's log-probabilities.
    pub prompt_logprobs: bool,
    /// What the full model does after the first token; `None`: the model's default.
    pub mode: Option<Mode>,
    /// Priority. Requests with lower numbers go first.
    pub priority: i32,
    /// Arrival of the request.
    pub arrived: Instant,
    /// Time limit, counted from the arrival.
    pub time: Duration,
}

/// Arrival and time limit of a request.
#[derive(Clone, Copy, Debug)]
pub struct Lifetime {
    /// Arrival of the request.
    pub arrived: Instant,
    /// Time limit, counted from the arrival.
    pub time: Duration,
}

impl Lifetime {
    /// Lifetime of a request that arrives now and may take `time`.
    pub fn now(time: Duration) -> Self {
        Self { arrived: Instant::now(), time }
    }

    /// Deadline of the request.
    pub fn deadline(self) -> Instant {
        self.arrived + self.time
    }
}

impl Generation {
    /// What the full model does after the first token.
    pub fn mode(&self) -> Mode {
        self.mode.unwrap_or_default()
    }

    /// Deadline of the sequence.
    pub fn deadline(&self) -> Instant {
        self.arrived + self.time
    }
}

/// An output of a [`Generation`]. The order is: the prompt's log-probabilities if they were requested, then tokens, then
/// one `Finished`.
#[derive(Clone, Debug)]
pub enum Output {
    /// The log-probabilities of prompt tokens 1, 2, ...
    PromptLogprobs(Vec<OutputToken>),
    /// The next token.
    Token {
        /// The token with its log-probabilities.
        token: OutputToken,
        /// Text that has become final with this token.
        text: String,
        /// Role of the node that sampled the token.
        stage: Role,
    },
    /// The end of the sequence.
    Finished(Box<Finished>),
}

/// How a sequence ended.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Why the sequence ended.
    pub reason: FinishReason,
    /// The request's stop string or stop token that ended the sequence. `None` if the model's end-of-text token or the
    /// length limit ended it.
    pub stop: Option<StopCause>,
    /// Text that was held back until the end.
    pub text: String,
    /// Number of prompt tokens.
    pub prompt_tokens: u32,
    /// Number of generated tokens.
    pub completion_tokens: u32,
    /// Times and nodes.
    pub timings: Timings,
}

/// Times and nodes of a sequence.
#[derive(Clone, Debug, Default)]
pub struct Timings {
    /// Seconds from the arrival until admission.
    pub queue_seconds: f64,
    /// Seconds from the arrival to the first token.
    pub ttft_seconds: f64,
    /// Mean seconds between two tokens.
    pub mean_itl_seconds: f64,
    /// Seconds from the arrival to the end.
    pub total_seconds: f64,
    /// Statistics of the last handoff, measured by the decode node.
    pub handoff: Option<TransferStats>,
    /// Prompt tokens whose KV the last prefill node already had.
    pub prefill_cached_tokens: u32,
    /// Prompt tokens whose KV the last decode node already held.
    pub decode_held_tokens: u32,
    /// Name of the last prefill node.
    pub prefill_node: String,
    /// Name of the last decode node.
    pub decode_node: String,
    /// Number of times that the sequence was computed again on other nodes.
    pub migrations: u32,
    /// What the full model did after the first token.
    pub mode: Mode,
    /// Drafts that the full model has judged, in mode exact.
    pub drafted_tokens: u32,
    /// Drafts that it has accepted.
    pub accepted_tokens: u32,
    /// Time spent in each leg, summed over all attempts.
    pub legs: LegTimes,
}

/// The request's stop condition that ended a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopCause {
    /// A stop string.
    Text(String),
    /// One of the request's own stop tokens.
    Token(u32),
}

/// Checks the stop strings.
pub fn check_stops(stops: &[String]) -> Result<(), GenerateError> {
    if stops.len() > MAX_STOPS {
        return Err(GenerateError::limit("stop", format!("at most {MAX_STOPS} texts"), stops.len()));
    }
    match stops.iter().find(|s| s.is_empty() || s.len() > MAX_STOP_BYTES) {
        Some(s) => Err(GenerateError::limit("stop", format!("texts of 1 to {MAX_STOP_BYTES} bytes"), s.len())),
        None => Ok(()),
    }
}

/// Checks the prompt's tokens against the model.
pub fn check_prompt(model: &ServedModel, prompt: &[u32]) -> Result<(), GenerateError> {
    if prompt.is_empty() {
        return Err(GenerateError::invalid("prompt", "prompt must have at least one token, got 0"));
    }
    match prompt.iter().find(|&&id| id >= model.vocab_size) {
        Some(id) => Err(GenerateError::limit("prompt", format!("of token ids below {}", model.vocab_size), id)),
        None => Ok(()),
    }
}

/// Number of tokens that may be generated: `asked`, which must fit the context, or as many as fit if it is `None`.
pub fn check_length(model: &ServedModel, prompt: usize, asked: Option<u32>) -> Result<u32, GenerateError> {
    let (limit, prompt) = (model.max_context_tokens, prompt as u64);
    let output = u64::from(asked.unwrap_or(1));
    if prompt + output > u64::from(limit) {
        return Err(GenerateError::ContextLength { limit, value: prompt + output, prompt, output });
    }
    Ok(asked.unwrap_or(limit - prompt as u32))
}

/// A unique random request id.
pub fn new_request_id() -> RequestId {
    RequestId(format!("{:032x}", rand::rng().random::<u128>()))
}

/// A random seed, for a request without one.
pub fn random_seed() -> u64 {
    rand::rng().random()
}
