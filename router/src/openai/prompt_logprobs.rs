//! vLLM's `prompt_logprobs`: the log-probability of each token of the prompt, and of its alternatives.

use overfill_kv::{OutputToken, sampling::MAX_LOGPROBS};
use overfill_text::TextModel;
use serde_json::{Map, Value, json};

use super::{fields::Fields, logprobs::finite};
use crate::GenerateError;

/// Takes the field: the number of alternatives. `of_output`: the number of alternatives of each token of the output.
pub fn take(fields: &mut Fields, stream: bool, of_output: Option<u32>) -> Result<Option<u32>, GenerateError> {
    const FIELD: &str = "prompt_logprobs";
    let Some(count) = fields.take_count(FIELD)? else { return Ok(None) };
    if count > MAX_LOGPROBS {
        return Err(GenerateError::limit(FIELD, format!("at most {MAX_LOGPROBS}"), count));
    }
    if stream {
        return Err(GenerateError::invalid(FIELD, "prompt_logprobs needs stream to be false"));
    }
    if let Some(of_output) = of_output.filter(|of_output| *of_output != count) {
        let limit = format!("the number of alternatives of the output's tokens ({of_output}), if both are given");
        return Err(GenerateError::limit(FIELD, limit, count));
    }
    Ok(Some(count))
}

/// One entry per token of the prompt: null for the first, then an object by token id. `scores`: those of tokens 1, 2, ... An
/// entry has a `rank` if the token is among the alternatives.
pub fn entries(scores: &[OutputToken], text: &TextModel) -> Value {
    let entry = |rank: Option<usize>, token: u32, logprob: f32| {
        let decoded = String::from_utf8_lossy(&text.token_bytes(token)).into_owned();
        (token.to_string(), json!({"logprob": finite(logprob), "rank": rank, "decoded_token": decoded}))
    };
    let of_token = |score: &OutputToken| {
        let top = score.top.iter().enumerate().map(|(i, (token, logprob))| entry(Some(i + 1), *token, *logprob));
        let is_listed = score.top.iter().any(|(token, _)| *token == score.token);
        let own = (!is_listed).then(|| entry(None, score.token, score.logprob));
        Value::Object(own.into_iter().chain(top).collect::<Map<_, _>>())
    };
    std::iter::once(Value::Null).chain(scores.iter().map(of_token)).collect()
}
