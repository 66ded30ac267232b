//! What the full model does for an output after its first token.

use std::{fmt, str::FromStr};

/// What the full model does for an output after its first token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Nothing: the decode model writes the rest.
    #[default]
    Draft,
    /// It computes the KV of the generated tokens as well. Block by block, this takes the place of what the decode model
    /// computed: the step that feeds position `q` attends to the full model's KV in every block `b` of generated tokens with
    /// `q / 16 >= b + 2`.
    Refresh,
    /// It decides on every token. The decode model only drafts: the output is, token for token, the full model's.
    Exact,
}

impl Mode {
    /// All modes.
    pub const ALL: [Self; 3] = [Self::Draft, Self::Refresh, Self::Exact];

    /// Name of the mode.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Draft => "draft",
            Self::Refresh => "refresh",
            Self::Exact => "exact",
        }
    }

    /// Whether the prefill node keeps the request open after its first token.
    pub fn extends(self) -> bool {
        self != Self::Draft
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|mode| mode.as_str() == s);
        found.ok_or_else(|| format!("mode must be draft, refresh or exact, got {s:?}"))
    }
}
