//! Sampling parameters and output tokens.

use std::collections::BTreeMap;

/// Maximum number of token ids that end a request's output.
pub const MAX_STOP_TOKENS: usize = 256;

/// Maximum size of a grammar in bytes.
pub const MAX_GRAMMAR_BYTES: usize = 256 << 10;

/// Maximum number of [`SamplingParams::bad_words`].
pub const MAX_BAD_WORDS: usize = 256;

/// Maximum number of tokens of a bad word.
pub const MAX_BAD_WORD_TOKENS: usize = 64;

/// What the output as a whole must match. The nodes turn it into the set of tokens that may come next.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Grammar {
    /// JSON that this JSON schema allows.
    Json(String),
    /// A text that this regular expression matches from its beginning to its end.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A text that this grammar derives, in llguidance's dialect of Lark.
    Lark(String),
}

impl Grammar {
    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Json(text) | Self::Regex(text) | Self::Lark(text) => text.len(),
            // Each also costs an alternative.
            Self::Choice(texts) => texts.iter().map(|text| text.len() + 1).sum(),
        }
    }
}

/// How the next token is chosen. Router and nodes check the values with [`SamplingParams::validate`].
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; in [0, 100]. 0 is greedy.
    pub temperature: f64,
    /// Keep the most likely tokens whose probabilities add up to this; in (0, 1].
    pub top_p: f64,
    /// Keep the `top_k` most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep tokens whose probability is at least this fraction of the highest one; in [0, 1].
    pub min_p: f64,
    /// Seed. The random number for a token depends only on the seed and the token's position in the sequence.
    pub seed: u64,
    /// Subtracted from the logit of every token already in the output; in [-2, 2].
    pub presence_penalty: f64,
    /// Subtracted once per occurrence in the output from the token's logit; in [-2, 2].
    pub frequency_penalty: f64,
    /// Divides positive logits and multiplies negative logits of all tokens in prompt and output; in (0, 10], 1 is off.
    pub repetition_penalty: f64,
    /// Added to the logits of these tokens; each in [-100, 100].
    pub logit_bias: BTreeMap<u32, f32>,
    /// Number of alternatives reported per token. `None` reports no log-probabilities.
    pub logprobs: Option<u32>,
    /// What the output must match.
    pub grammar: Option<Grammar>,
    /// The only tokens that may be chosen; empty allows all.
    pub allowed_token_ids: Vec<u32>,
    /// Sequences of tokens that do not occur in the output, at least one token each.
    pub bad_words: Vec<Vec<u32>>,
    /// Until the output has this many tokens, `end_token_ids` are not chosen.
    pub min_tokens: u32,
    /// Tokens that end the output. Only `min_tokens` uses them.
    pub end_token_ids: Vec<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: 0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: BTreeMap::new(),
            logprobs: None,
            grammar: None,
            allowed_token_ids: Vec::new(),
            bad_words: Vec::new(),
            min_tokens: 0,
            end_token_ids: Vec::new(),
        }
    }
}

/// Maximum of [`SamplingParams::logprobs`].
pub const MAX_LOGPROBS: u32 = 20;

/// Error: a sampling parameter is outside its limits.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{field} must be {limit}, got {value}")]
pub struct InvalidSampling {
    /// Name of the parameter.
    pub field: &'static str,
    /// The allowed values, for the error text.
    pub limit: &'static str,
    /// The value given.
    pub value: String,
}

impl SamplingParams {
    /// Greedy sampling with all other options off.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Whether only some tokens may be chosen: services of protocol version 2 do not know such parameters.
    pub fn is_constrained(&self) -> bool {
        let Self { grammar, allowed_token_ids, bad_words, min_tokens, .. } = self;
        grammar.is_some() || !allowed_token_ids.is_empty() || !bad_words.is_empty() || *min_tokens > 0
    }

    /// Returns an error for values outside the limits documented at the fields (NaN included) and for tokens outside the
    /// vocabulary. Does not look into the grammar.
    pub fn validate(&self, vocab_size: usize) -> Result<(), InvalidSampling> {
        let Self {
            temperature,
            top_p,
            top_k: _,
            min_p,
            seed: _,
            presence_penalty,
            frequency_penalty,
            repetition_penalty,
            logit_bias,
            logprobs,
            grammar,
            allowed_token_ids,
            bad_words,
            min_tokens: _,
            end_token_ids,
        } = self;
        let check = |ok: bool, field, limit, value: &dyn ToString| {
            if ok { Ok(()) } else { Err(InvalidSampling { field, limit, value: value.to_string() }) }
        };
        check((0.0..=100.0).contains(temperature), "temperature", "in [0, 100]", temperature)?;
        check(*top_p > 0.0 && *top_p <= 1.0, "top_p", "in (0, 1]", top_p)?;
        check((0.0..=1.0).contains(min_p), "min_p", "in [0, 1]", min_p)?;
        check((-2.0..=2.0).contains(presence_penalty), "presence_penalty", "in [-2, 2]", presence_penalty)?;
        check((-2.0..=2.0).contains(frequency_penalty), "frequency_penalty", "in [-2, 2]", frequency_penalty)?;
        check(
            *repetition_penalty > 0.0 && *repetition_penalty <= 10.0,
            "repetition_penalty",
            "in (0, 10]",
            repetition_penalty,
        )?;
        for (token, bias) in logit_bias {
            check((*token as usize) < vocab_size, "logit_bias", "of token ids below the vocabulary size", token)?;
            check((-100.0..=100.0).contains(bias), "logit_bias", "in [-100, 100]", bias)?;
        }
        let n = logprobs.unwrap_or(0);
        check(n <= MAX_LOGPROBS, "logprobs", "at most 20", &n)?;
        let bytes = grammar.as_ref().map_or(0, Grammar::bytes);
        check(bytes <= MAX_GRAMMAR_BYTES, "grammar", "at most 262144 bytes", &bytes)?;
        let words = bad_words.len();
        check(words <= MAX_BAD_WORDS, "bad_words", "at most 256", &words)?;
        for word in bad_words {
            let length = word.len();
            check((1..=MAX_BAD_WORD_TOKENS).contains(&length), "bad_words", "of 1 to 64 tokens each", &length)?;
        }
        let ends = end_token_ids.len();
        check(ends <= MAX_STOP_TOKENS, "end_token_ids", "at most 256 ids", &ends)?;
        let ids = allowed_token_ids.iter().map(|id| ("allowed_token_ids", id));
        let ids = ids.chain(bad_words.iter().flatten().map(|id| ("bad_words", id)));
        for (field, id) in ids.chain(end_token_ids.iter().map(|id| ("end_token_ids", id))) {
            check((*id as usize) < vocab_size, field, "of token ids below the vocabulary size", id)?;
        }
        Ok(())
    }
}

/// A chosen token. Log-probabilities are those of the raw logits, before penalties and temperature.
#[derive(Clone, Debug, PartialEq)]
pub struct OutputToken {
    /// Token id.
    pub token: u32,
    /// Natural logarithm of its probability; NaN if log-probabilities were not requested.
    pub logprob: f32,
    /// Token ids and log-probabilities of the most likely alternatives, most likely first.
    pub top: Vec<(u32, f32)>,
}
