//! How a handoff and an output end, as nodes and router both report it.

use std::fmt;

/// Why an output ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token, a stop text, or the model's own end of text.
    Stop,
    /// `max_tokens` tokens, or a full context.
    Length,
}

impl FinishReason {
    /// The name that OpenAI's API gives it: `stop` or `length`.
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

/// One handoff, as its sender or its receiver measured it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TransferStats {
    /// Bytes of KV.
    pub bytes: u64,
    /// From the first frame to the confirmed commit.
    pub seconds: f64,
    /// The part of `seconds` after the last layer was computed, which the overlap with the computation did not hide.
    pub exposed_seconds: f64,
}
