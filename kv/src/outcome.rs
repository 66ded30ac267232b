//! Results of handoffs and outputs, as nodes and router report them.

use std::fmt;

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token, a stop text, or the model's end-of-text token.
    Stop,
    /// `max_tokens` was reached, or the context is full.
    Length,
}

impl FinishReason {
    /// Name in the OpenAI API: `stop` or `length`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

impl fmt::Display for FinishReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Size and duration of one handoff, as measured by its sender or its receiver.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TransferStats {
    /// Bytes of KV transferred.
    pub bytes: u64,
    /// Time from the first frame to the confirmed commit.
    pub seconds: f64,
    /// The part of `seconds` after the prefill was computed, which does not overlap with the computation.
    pub exposed_seconds: f64,
}
