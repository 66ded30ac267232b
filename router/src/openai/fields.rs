//! Parses a request's JSON field by field. Every error names its field, and unsupported fields are detected.

use std::collections::BTreeMap;

use axum::body::Bytes;
use overfill_kv::{Grammar, Mode, SamplingParams};
use overfill_text::GenerationDefaults;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value};
use tracing::debug;

use super::{error::ApiError, structured, whole::Whole};
use crate::{GenerateError, node::ServedModel, request};

/// Maximum number of choices per prompt.
const MAX_N: usize = 128;

/// Unsupported fields that would change the answer. The second value is the neutral one, which is accepted.
const UNSUPPORTED: &[(&str, &str)] = &[
    ("tools", "[]"),
    ("tool_choice", "\"none\""),
    ("functions", "[]"),
    ("function_call", "\"none\""),
    ("modalities", "[\"text\"]"),
    ("audio", "null"),
    ("suffix", "\"\""),
    ("best_of", "1"),
    ("use_beam_search", "false"),
    ("length_penalty", "1.0"),
    ("logits_processors", "[]"),
    ("prompt_embeds", "null"),
    ("documents", "[]"),
    ("chat_template", "null"),
    ("chat_template_kwargs", "{}"),
    ("continue_final_message", "false"),
    ("web_search_options", "null"),
    ("kv_transfer_params", "null"),
];

/// Fields of a request that have not been taken yet.
#[derive(Default)]
pub struct Fields(Map<String, Value>);

impl Fields {
    /// Parses a request's body.
    pub fn parse(body: &Bytes) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Self(map)),
            Ok(_) => Err(ApiError::bad_request("the request body must be a JSON object")),
            Err(e) => Err(ApiError::bad_request(format!("the request body is not valid JSON: {e}"))),
        }
    }

    /// Takes a field; `None` if it is absent or null.
    pub fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, GenerateError> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match serde_json::from_value(value) {
                Ok(value) => Ok(Some(value)),
                Err(e) => Err(GenerateError::invalid(name, format!("{name}: {e}"))),
            },
        }
    }

    /// Takes an integer.
    pub fn take_whole(&mut self, name: &str) -> Result<Option<i64>, GenerateError> {
        Ok(self.take(name)?.map(|Whole(value)| value))
    }

    /// Whether a field is there and not null.
    pub fn has(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|value| !value.is_null())
    }

    /// Takes an integer in the range of `u32`.
    pub fn take_count(&mut self, name: &str) -> Result<Option<u32>, GenerateError> {
        let value = self.take_whole(name)?;
        let check = |n| u32::try_from(n).map_err(|_| GenerateError::limit(name, "in [0, 4294967295]", n));
        value.map(check).transpose()
    }

    /// Takes a list of token ids.
    pub fn take_ids(&mut self, name: &str) -> Result<Option<Vec<u32>>, GenerateError> {
        let ids: Option<Vec<Whole>> = self.take(name)?;
        let check = |Whole(id)| u32::try_from(id).map_err(|_| GenerateError::limit(name, "of token ids", id));
        ids.map(|ids| ids.into_iter().map(check).collect()).transpose()
    }

    /// Checks the remaining fields of a completion or a chat completion.
    pub fn finish(self) -> Result<(), GenerateError> {
        self.finish_without(UNSUPPORTED)
    }

    /// Checks the remaining fields. A field of `unsupported` with a value other than the neutral one there is an error.
    /// Unknown fields are ignored, as in vLLM.
    pub fn finish_without(self, unsupported: &[(&str, &str)]) -> Result<(), GenerateError> {
        for (name, value) in self.0 {
            let Some((_, neutral)) = unsupported.iter().find(|(known, _)| *known == name) else {
                debug!(field = %name, "ignoring an unknown field");
                continue;
            };
            let asks_nothing = match &value {
                Value::Null | Value::Bool(false) => true,
                Value::Array(list) if list.is_empty() => true,
                // Tools are not supported, so "auto" and "none" mean the same.
                Value::String(s) if name == "tool_choice" => s == "auto" || s == "none",
                Value::Number(n) => serde_json::from_str(neutral).is_ok_and(|neutral: f64| n.as_f64() == Some(neutral)),
                value => serde_json::from_str(neutral).is_ok_and(|neutral: Value| *value == neutral),
            };
            if !asks_nothing {
                return Err(GenerateError::invalid(&name, format!("{name} is not supported")));
            }
        }
        Ok(())
    }
}

/// Fields that completions and chat completions share.
#[derive(Clone, Debug)]
pub struct Common {
    /// Priority. Requests with lower numbers go first.
    pub priority: i32,
    /// Whether to answer with server-sent events.
    pub stream: bool,
    /// Whether the stream ends with a usage chunk.
    pub include_usage: bool,
    /// Whether a stream says which stage made each token, and ends with timings.
    pub include_overfill: bool,
    /// What the full model does after the first token; `None`: the model's default.
    pub mode: Option<Mode>,
    /// Number of choices per prompt.
    pub n: usize,
    /// Seed of the first choice. `None`: every choice gets a random seed.
    pub seed: Option<u64>,
    /// Sampling parameters, except the seed and `logprobs`.
    pub sampling: SamplingParams,
    /// The field that has the grammar in `sampling`.
    pub structured: Option<&'static str>,
    /// Number of tokens at the end of the prompt that are used; -1: as many as fit the context.
    pub truncate_prompt_tokens: Option<i64>,
    /// Words that do not occur in the output.
    pub bad_words: Vec<String>,
    /// Stop strings.
    pub stop: Vec<String>,
    /// Whether the stop string is part of the output.
    pub include_stop: bool,
    /// Stop tokens in addition to the model's own.
    pub stop_token_ids: Vec<u32>,
    /// Whether to continue after the model's end-of-text tokens.
    pub ignore_eos: bool,
    /// Whether to omit special tokens from the text.
    pub skip_special: bool,
    /// Whether to return the token ids of prompt and output.
    pub return_token_ids: bool,
    /// Whether log-probabilities name tokens as `token_id:17` instead of by text.
    pub tokens_as_ids: bool,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
    include_overfill: Option<bool>,
}

impl Common {
    /// Takes the shared fields. Defaults come from the model's generation config, else from OpenAI's API.
    pub fn take(fields: &mut Fields, defaults: &GenerationDefaults) -> Result<Self, GenerateError> {
        let stream = fields.take("stream")?.unwrap_or(false);
        let options: Option<StreamOptions> = fields.take("stream_options")?;
        if options.is_some() && !stream {
            return Err(GenerateError::invalid("stream_options", "stream_options needs stream to be true"));
        }
        let n = fields.take_whole("n")?.unwrap_or(1);
        let n = usize::try_from(n)
            .ok()
            .filter(|n| (1..=MAX_N).contains(n))
            .ok_or_else(|| GenerateError::limit("n", format!("in [1, {MAX_N}]"), n))?;
        let stop = match fields.take("stop")? {
            None => Vec::new(),
            Some(OneOrMany::One(stop)) => vec![stop],
            Some(OneOrMany::Many(stops)) => stops,
        };
        request::check_stops(&stop)?;
        let top_k = match fields.take_whole("top_k")? {
            // In vLLM's API, -1 means off.
            Some(-1) => Some(0),
            Some(k) => Some(u32::try_from(k).map_err(|_| GenerateError::limit("top_k", "-1 or at least 0", k))?),
            None => None,
        };
        let seed = fields.take_whole("seed")?;
        let priority = fields.take_whole("priority")?.unwrap_or(0);
        let priority = i32::try_from(priority)
            .map_err(|_| GenerateError::limit("priority", "in [-2147483648, 2147483647]", priority))?;
        let truncate_prompt_tokens = fields.take_whole("truncate_prompt_tokens")?;
        if let Some(count) = truncate_prompt_tokens.filter(|count| *count != -1 && *count < 1) {
            return Err(GenerateError::limit("truncate_prompt_tokens", "-1 or at least 1", count));
        }
        let mode: Option<String> = fields.take("overfill_mode")?;
        let mode = mode.map(|mode| {
            mode.parse().map_err(|_| GenerateError::limit("overfill_mode", "draft, refresh or exact", &mode))
        });
        let structured = structured::take(fields)?;
        let min_tokens = fields.take_count("min_tokens")?.unwrap_or(0);
        let allowed_token_ids = fields.take_ids("allowed_token_ids")?;
        if allowed_token_ids.as_ref().is_some_and(Vec::is_empty) {
            return Err(GenerateError::limit("allowed_token_ids", "at least one token id", "an empty list"));
        }
        let unsaid = &defaults.sampling;
        let mut number =
            |name: &str, default: f64| -> Result<f64, GenerateError> { Ok(fields.take(name)?.unwrap_or(default)) };
        let mut sampling = SamplingParams {
            temperature: number("temperature", unsaid.temperature)?,
            top_p: number("top_p", unsaid.top_p)?,
            top_k: top_k.unwrap_or(unsaid.top_k),
            min_p: number("min_p", unsaid.min_p)?,
            presence_penalty: number("presence_penalty", unsaid.presence_penalty)?,
            frequency_penalty: number("frequency_penalty", unsaid.frequency_penalty)?,
            repetition_penalty: number("repetition_penalty", unsaid.repetition_penalty)?,
            grammar: structured.as_ref().map(|(_, grammar)| grammar.clone()),
            allowed_token_ids: allowed_token_ids.unwrap_or_default(),
            min_tokens,
            ..SamplingParams::default()
        };
        let bias: BTreeMap<String, f32> = fields.take("logit_bias")?.unwrap_or_default();
        for (token, bias) in bias {
            let id = token.parse().map_err(|_| GenerateError::limit("logit_bias", "of token ids", &token))?;
            sampling.logit_bias.insert(id, bias);
        }
        Ok(Self {
            priority,
            stream,
            include_usage: options.as_ref().and_then(|o| o.include_usage).unwrap_or(false),
            include_overfill: options.and_then(|o| o.include_overfill).unwrap_or(false),
            mode: mode.transpose()?,
            n,
            seed: seed.map(|seed| seed as u64),
            sampling,
            structured: structured.map(|(field, _)| field),
            truncate_prompt_tokens,
            bad_words: fields.take("bad_words")?.unwrap_or_default(),
            stop,
            include_stop: fields.take("include_stop_str_in_output")?.unwrap_or(false),
            stop_token_ids: fields.take_ids("stop_token_ids")?.unwrap_or_default(),
            ignore_eos: fields.take("ignore_eos")?.unwrap_or(false),
            skip_special: fields.take("skip_special_tokens")?.unwrap_or(true),
            return_token_ids: fields.take("return_token_ids")?.unwrap_or(false),
            tokens_as_ids: fields.take("return_tokens_as_token_ids")?.unwrap_or(false),
        })
    }
}

impl Common {
    /// Makes the output match what `field` asks for.
    pub fn match_also(&mut self, field: &'static str, grammar: Grammar) -> Result<(), GenerateError> {
        if let Some(first) = self.structured.replace(field) {
            let message = format!("{first} and {field}: only one form of structured output can be asked for");
            return Err(GenerateError::invalid(field, message));
        }
        self.sampling.grammar = Some(grammar);
        Ok(())
    }

    /// The tokens of the prompt that are used: the last ones, as `truncate_prompt_tokens` says. Also returns whether it is
    /// shorter now.
    pub fn truncate(&self, model: &ServedModel, mut tokens: Vec<u32>, max_tokens: Option<u32>) -> (Vec<u32>, bool) {
        let Some(count) = self.truncate_prompt_tokens else { return (tokens, false) };
        let room = model.max_context_tokens.saturating_sub(max_tokens.unwrap_or(1).max(1));
        let count = usize::try_from(count).unwrap_or(room as usize).max(1);
        let cut = tokens.len().saturating_sub(count);
        tokens.drain(..cut);
        (tokens, cut > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(json: &str) -> Fields {
        Fields::parse(&Bytes::copy_from_slice(json.as_bytes())).unwrap()
    }

    #[test]
    fn faults_name_the_field() {
        let take =
            |json: &str| Common::take(&mut fields(json), &GenerationDefaults::default()).unwrap_err().to_string();
        assert!(take(r#"{"temperature": "hot"}"#).starts_with("temperature: invalid type"));
        assert_eq!(take(r#"{"n": 0}"#), "n must be in [1, 128], got 0");
        assert_eq!(take(r#"{"stop": [""]}"#), "stop must be texts of 1 to 1024 bytes, got 0");
        assert_eq!(take(r#"{"logit_bias": {"x": 1}}"#), "logit_bias must be of token ids, got x");
        assert_eq!(take(r#"{"n": 1.5}"#), "n: invalid type: floating point `1.5`, expected an integer");
        assert_eq!(take(r#"{"stop_token_ids": [-1]}"#), "stop_token_ids must be of token ids, got -1");
        let unknown = "overfill_mode must be draft, refresh or exact, got fast";
        assert_eq!(take(r#"{"overfill_mode": "fast"}"#), unknown);
        assert!(take(r#"{"stop": 3}"#).contains("expected a string or a list of strings"));
    }

    #[test]
    fn unsupported_fields_are_refused_only_if_they_ask_for_something() {
        fields(r#"{"tools": [], "user": "u", "tool_choice": "auto", "best_of": 1, "suffix": null}"#).finish().unwrap();
        for json in [r#"{"tools": [{}]}"#, r#"{"logits_processors": ["x"]}"#, r#"{"best_of": 2}"#] {
            assert!(fields(json).finish().unwrap_err().to_string().ends_with("is not supported"));
        }
    }

    #[test]
    fn the_model_fills_what_the_request_leaves_open() {
        let sampling = SamplingParams { temperature: 0.6, top_k: 20, ..SamplingParams::default() };
        let defaults = GenerationDefaults { sampling, ..GenerationDefaults::default() };
        let common =
            Common::take(&mut fields(r#"{"top_k": -1.0, "seed": -1, "stop": "x", "n": 2.0}"#), &defaults).unwrap();
        assert_eq!((common.sampling.temperature, common.sampling.top_k), (0.6, 0));
        assert_eq!((common.seed, common.stop.len(), common.n), (Some(u64::MAX), 1, 2));
    }
}
