//! `generation_config.json`.

use serde::Deserialize;

use crate::TextError;

/// What a model's `generation_config.json` says, for requests that don't say otherwise. As in vLLM, its sampling values
/// replace the API's own defaults.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// 0 is greedy.
    pub temperature: Option<f64>,
    /// In (0, 1].
    pub top_p: Option<f64>,
    /// 0 keeps all.
    pub top_k: Option<u32>,
    /// In [0, 1].
    pub min_p: Option<f64>,
    /// 1 is off.
    pub repetition_penalty: Option<f64>,
    /// Most tokens to generate.
    pub max_new_tokens: Option<u32>,
}

#[derive(Deserialize)]
struct File {
    eos_token_id: Option<OneOrMany>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<u32>,
    min_p: Option<f64>,
    repetition_penalty: Option<f64>,
    max_new_tokens: Option<u32>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl GenerationDefaults {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, TextError> {
        let File { eos_token_id, temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens } =
            serde_json::from_slice(bytes)
                .map_err(|e| TextError::Invalid { file: "generation_config.json", reason: e.to_string() })?;
        let eos_token_ids = match eos_token_id {
            None => Vec::new(),
            Some(OneOrMany::One(id)) => vec![id],
            Some(OneOrMany::Many(ids)) => ids,
        };
        Ok(Self { eos_token_ids, temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_end_token_or_several() {
        assert_eq!(GenerationDefaults::parse(br#"{"eos_token_id": 7}"#).unwrap().eos_token_ids, [7]);
        let several =
            GenerationDefaults::parse(br#"{"eos_token_id": [1, 2], "temperature": 0.6, "other": {}}"#).unwrap();
        assert_eq!((several.eos_token_ids.as_slice(), several.temperature), ([1, 2].as_slice(), Some(0.6)));
        assert_eq!(GenerationDefaults::parse(b"{}").unwrap(), GenerationDefaults::default());
        assert!(GenerationDefaults::parse(br#"{"eos_token_id": "x"}"#).is_err());
    }
}
