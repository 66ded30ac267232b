//! How a token is chosen, and what is reported of it.

use std::collections::BTreeMap;

/// How the next token is chosen. Checked at every edge by [`SamplingParams::validate`].
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy. At most 100.
    pub temperature: f64,
    /// Keep the likeliest tokens that together have this probability; in (0, 1].
    pub top_p: f64,
    /// Keep the `top_k` likeliest; 0 keeps all.
    pub top_k: u32,
    /// Keep tokens at least this fraction as likely as the likeliest; in [0, 1].
    pub min_p: f64,
    /// The random number of a token is a function of (seed, position in the sequence) alone.
    pub seed: u64,
    /// Subtracted from the logit of every token already in the output; in [-2, 2].
    pub presence_penalty: f64,
    /// The same times its count; in [-2, 2].
    pub frequency_penalty: f64,
    /// Divides (positive) or multiplies (negative) the logit of every token of prompt and output; in (0, 10], 1 is off.
    pub repetition_penalty: f64,
    /// Added to the logits of these tokens; each in [-100, 100].
    pub logit_bias: BTreeMap<u32, f32>,
    /// Alternatives to report per token; `None` reports no log-probabilities.
    pub logprobs: Option<u32>,
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
        }
    }
}

/// Most alternatives that may be asked for per token.
pub const MAX_LOGPROBS: u32 = 20;

/// A parameter outside its limits.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{field} must be {limit}, got {value}")]
pub struct InvalidSampling {
    /// Name of the parameter.
    pub field: &'static str,
    /// What it must be.
    pub limit: &'static str,
    /// What it is.
    pub value: String,
}

impl SamplingParams {
    /// Greedy, everything else off.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Refuses values outside the limits given at the fields, NaN included, and biases of tokens outside the vocabulary.
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
        check(n <= MAX_LOGPROBS, "logprobs", "at most 20", &n)
    }
}

/// A chosen token, with its log-probability under the raw logits (before penalties and temperature).
#[derive(Clone, Debug, PartialEq)]
pub struct OutputToken {
    /// Its id.
    pub token: u32,
    /// Natural logarithm; NaN where none was asked for.
    pub logprob: f32,
    /// The likeliest alternatives, best first.
    pub top: Vec<(u32, f32)>,
}
