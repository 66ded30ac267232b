//! Parses `generation_config.json`: default sampling, output length and end-of-text tokens.

use overfill_kv::SamplingParams;
use serde_json::{Map, Value};

use crate::TextError;

const FILE: &str = "generation_config.json";

/// Defaults of a model's `generation_config.json`. They apply to fields that a request does not set. As in vLLM, the
/// sampling values replace the API's own defaults, and `do_sample` is ignored.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// End-of-text token ids of this file. [`crate::TextModel::eos_token_ids`] lists those of all files.
    pub eos_token_ids: Vec<u32>,
    /// Validated sampling parameters. A parameter that is missing from the file is off.
    pub sampling: SamplingParams,
    /// Default maximum number of tokens to generate.
    pub max_new_tokens: Option<u32>,
}

impl GenerationDefaults {
    /// Parses the file. An invalid value is an error that names the field, so that clients don't get errors about values
    /// that they never sent.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, TextError> {
        let map: Map<String, Value> =
            serde_json::from_slice(bytes).map_err(|e| TextError::Invalid { file: FILE, reason: e.to_string() })?;
        let fields = Fields(&map);
        let off = SamplingParams::default();
        let sampling = SamplingParams {
            temperature: fields.number("temperature")?.unwrap_or(off.temperature),
            top_p: fields.number("top_p")?.unwrap_or(off.top_p),
            top_k: fields.top_k()?.unwrap_or(off.top_k),
            min_p: fields.number("min_p")?.unwrap_or(off.min_p),
            repetition_penalty: fields.number("repetition_penalty")?.unwrap_or(off.repetition_penalty),
            ..off
        };
        sampling.validate(usize::MAX).map_err(|e| TextError::Invalid { file: FILE, reason: e.to_string() })?;
        let max_new_tokens = fields.whole("max_new_tokens", "a whole number of at least 1")?;
        if max_new_tokens == Some(0) {
            return Err(fields.bad("max_new_tokens", "a whole number of at least 1"));
        }
        Ok(Self { eos_token_ids: token_ids(FILE, &map)?, sampling, max_new_tokens })
    }
}

/// Reads `eos_token_id` of a generation_config.json or config.json: a token id, a list of token ids, or null. Errors name
/// `file`.
pub fn token_ids(file: &'static str, map: &Map<String, Value>) -> Result<Vec<u32>, TextError> {
    const FIELD: &str = "eos_token_id";
    let value = map.get(FIELD).unwrap_or(&Value::Null);
    let ids = match value {
        Value::Null => Some(Vec::new()),
        Value::Array(ids) => ids.iter().map(whole_number).collect(),
        one => whole_number(one).map(|id| vec![id]),
    };
    ids.ok_or_else(|| bad(file, FIELD, "a token id, a list of token ids, or null", value))
}

/// The fields of the file. A null field counts as absent.
struct Fields<'a>(&'a Map<String, Value>);

impl Fields<'_> {
    fn present(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    fn bad(&self, field: &str, limit: &str) -> TextError {
        bad(FILE, field, limit, self.0.get(field).unwrap_or(&Value::Null))
    }

    fn number(&self, field: &str) -> Result<Option<f64>, TextError> {
        self.present(field).map(|value| value.as_f64().ok_or_else(|| self.bad(field, "a number"))).transpose()
    }

    fn whole(&self, field: &str, limit: &str) -> Result<Option<u32>, TextError> {
        self.present(field).map(|value| whole_number(value).ok_or_else(|| self.bad(field, limit))).transpose()
    }

    /// `top_k`, where 0 means off. vLLM writes -1 for off, transformers writes 0.
    fn top_k(&self) -> Result<Option<u32>, TextError> {
        if self.present("top_k").and_then(Value::as_f64) == Some(-1.0) {
            return Ok(Some(0));
        }
        self.whole("top_k", "-1 or a whole number of at least 0")
    }
}

fn bad(file: &'static str, field: &str, limit: &str, value: &Value) -> TextError {
    TextError::Invalid { file, reason: format!("{field} must be {limit}, got {value}") }
}

/// A whole number, also if it is written as a float: Python's tools write both 50 and 50.0.
fn whole_number(value: &Value) -> Option<u32> {
    match value.as_u64() {
        Some(number) => u32::try_from(number).ok(),
        None => {
            let number = value.as_f64()?;
            // Exact: every u32 is a f64.
            (number.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(&number)).then_some(number as u32)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<GenerationDefaults, String> {
        GenerationDefaults::parse(json.as_bytes()).map_err(|e| e.to_string())
    }

    #[test]
    fn one_end_token_or_several_or_none() {
        let eos = |json| parse(json).map(|defaults| defaults.eos_token_ids);
        assert_eq!(eos(r#"{"eos_token_id": 7}"#), Ok(vec![7]));
        assert_eq!(eos(r#"{"eos_token_id": [1, 2.0], "temperature": 0.6, "other": {}}"#), Ok(vec![1, 2]));
        assert_eq!(eos(r#"{"eos_token_id": null}"#), Ok(vec![]));
        assert_eq!(parse("{}"), Ok(GenerationDefaults::default()));
        assert_eq!(
            eos(r#"{"eos_token_id": "x"}"#).unwrap_err(),
            "generation_config.json: eos_token_id must be a token id, a list of token ids, or null, got \"x\""
        );
    }

    #[test]
    fn values_that_others_take_are_taken() {
        let defaults = parse(
            r#"{"top_k": -1, "top_p": 1, "temperature": 0, "min_p": null, "repetition_penalty": 1.1, "do_sample": false,
                "max_new_tokens": 256.0}"#,
        )
        .unwrap();
        assert_eq!((defaults.sampling.top_k, defaults.max_new_tokens), (0, Some(256)));
        assert_eq!((defaults.sampling.temperature, defaults.sampling.repetition_penalty), (0.0, 1.1));
        for (json, top_k) in [(r#"{"top_k": 50.0}"#, 50), (r#"{"top_k": 0}"#, 0), (r#"{"top_k": -1.0}"#, 0)] {
            assert_eq!(parse(json).unwrap().sampling.top_k, top_k, "{json}");
        }
    }

    #[test]
    fn values_that_can_not_be_served_name_the_field() {
        for (json, fault) in [
            (r#"{"top_p": 0}"#, "top_p must be in (0, 1], got 0"),
            (r#"{"top_p": "high"}"#, "top_p must be a number, got \"high\""),
            (r#"{"top_k": 1.5}"#, "top_k must be -1 or a whole number of at least 0, got 1.5"),
            (r#"{"top_k": -2}"#, "top_k must be -1 or a whole number of at least 0, got -2"),
            (r#"{"temperature": -0.5}"#, "temperature must be in [0, 100], got -0.5"),
            (r#"{"min_p": 2}"#, "min_p must be in [0, 1], got 2"),
            (r#"{"repetition_penalty": 0}"#, "repetition_penalty must be in (0, 10], got 0"),
            (r#"{"max_new_tokens": 0}"#, "max_new_tokens must be a whole number of at least 1, got 0"),
        ] {
            assert_eq!(parse(json).unwrap_err(), format!("generation_config.json: {fault}"), "{json}");
        }
        assert!(parse("[]").unwrap_err().starts_with("generation_config.json: invalid type"));
    }
}
