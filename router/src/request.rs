//! A request that has passed all checks that need no node.

use std::{sync::Arc, time::Duration};

use overfill_kv::{FinishReason, OutputToken, RequestId, Role, SamplingParams, TransferStats};
use rand::Rng as _;
use tokio::time::Instant;

use crate::{GenerateError, legs::LegTimes, node::ServedModel};

/// Most stop strings per request.
pub const MAX_STOPS: usize = 16;
/// Longest stop string, in bytes.
pub const MAX_STOP_BYTES: usize = 1024;

/// One sequence to generate.
#[derive(Clone)]
pub struct Generation {
    /// The sequence's name, the same on every node.
    pub request_id: RequestId,
    /// The model that answers.
    pub model: Arc<ServedModel>,
    /// The prompt's token ids, at least one, all below the model's `vocab_size`.
    pub prompt: Arc<[u32]>,
    /// Valid for the model's vocabulary.
    pub sampling: SamplingParams,
    /// Most tokens to generate. 0 only with `prompt_logprobs`: the prompt is scored and nothing is generated.
    pub max_tokens: u32,
    /// Token ids that end the text: the model's own, unless the request ignores them, and the request's.
    pub stop_token_ids: Arc<[u32]>,
    /// Texts that end the text.
    pub stop: Vec<String>,
    /// Is the stop text part of the output?
    pub include_stop: bool,
    /// Leave special tokens out of the text.
    pub skip_special: bool,
    /// Report the prompt's log-probabilities.
    pub prompt_logprobs: bool,
    /// Requests with lower numbers go first.
    pub priority: i32,
    /// When the request came.
    pub arrived: Instant,
    /// How long the sequence may take from then.
    pub time: Duration,
}

/// When a request came, and how long it may take.
#[derive(Clone, Copy, Debug)]
pub struct Lifetime {
    /// When the request came.
    pub arrived: Instant,
    /// How long it may take from then.
    pub time: Duration,
}

impl Lifetime {
    /// When the request's time is over.
    pub fn deadline(self) -> Instant {
        self.arrived + self.time
    }
}

impl Generation {
    /// When the sequence's time is over.
    pub fn deadline(&self) -> Instant {
        self.arrived + self.time
    }
}

/// What comes out of a [`Generation`]: first the prompt's log-probabilities if the request asks for them, then tokens,
/// then one end.
#[derive(Clone, Debug)]
pub enum Output {
    /// The log-probabilities of prompt tokens 1, 2, ...
    PromptLogprobs(Vec<OutputToken>),
    /// The next token.
    Token {
        /// The token with its log-probabilities.
        token: OutputToken,
        /// Text that is certain now.
        text: String,
        /// The stage that chose it.
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
    /// The stop text or stop token of the request that ended it. `None`: the model ended the text, or it is full.
    pub stop: Option<StopCause>,
    /// Text held back until now.
    pub text: String,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens generated.
    pub completion_tokens: u32,
    /// Where the time went.
    pub timings: Timings,
}

/// Where the time of a sequence went, and on which nodes.
#[derive(Clone, Debug, Default)]
pub struct Timings {
    /// Seconds from the arrival until the nodes could be used.
    pub queue_seconds: f64,
    /// Seconds from the arrival to the first token.
    pub ttft_seconds: f64,
    /// Mean seconds between two tokens.
    pub mean_itl_seconds: f64,
    /// Seconds from the arrival to the end.
    pub total_seconds: f64,
    /// The last handoff, as the decode node measured it.
    pub handoff: Option<TransferStats>,
    /// Prompt tokens whose KV the last prefill node already had.
    pub prefill_cached_tokens: u32,
    /// Prompt tokens whose KV the last decode node already held.
    pub decode_held_tokens: u32,
    /// Name of the last prefill node.
    pub prefill_node: String,
    /// Name of the last decode node.
    pub decode_node: String,
    /// How often the sequence was begun anew on other nodes.
    pub migrations: u32,
    /// The time spent in each leg, added up over all attempts.
    pub legs: LegTimes,
}

/// A stop of the request that ended a text.
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

/// How many tokens may be generated: `asked`, which must fit the context; without it, as many as fit.
pub fn check_length(model: &ServedModel, prompt: usize, asked: Option<u32>) -> Result<u32, GenerateError> {
    let (limit, prompt) = (model.max_context_tokens, prompt as u64);
    let output = u64::from(asked.unwrap_or(1));
    if prompt + output > u64::from(limit) {
        return Err(GenerateError::ContextLength { limit, value: prompt + output, prompt, output });
    }
    Ok(asked.unwrap_or(limit - prompt as u32))
}

/// A random name, different from every other.
pub fn new_request_id() -> RequestId {
    RequestId(format!("{:032x}", rand::rng().random::<u128>()))
}

/// A seed for a request that names none.
pub fn random_seed() -> u64 {
    rand::rng().random()
}
