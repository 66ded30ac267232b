//! Log-probabilities in the formats of completions and chat completions.

use overfill_kv::OutputToken;
use overfill_text::TextModel;
use serde::{Serialize, Serializer, ser::SerializeMap as _};
use serde_json::Value;

/// Stands for smaller log-probabilities and NaN, because JSON has no infinity.
const LOWEST: f32 = -9999.0;

/// Names tokens by their text, or as `token_id:17`.
#[derive(Clone, Copy)]
pub struct Names<'a> {
    /// Text model of the tokens.
    pub text: &'a TextModel,
    /// Whether to write token ids instead of text.
    pub as_ids: bool,
}

impl Names<'_> {
    fn name(&self, token: u32) -> String {
        if self.as_ids { format!("token_id:{token}") } else { self.text.token_name(token) }
    }
}

/// A log-probability that JSON can hold.
pub fn finite(logprob: f32) -> f32 {
    // `max` also replaces NaN: it returns the other operand.
    logprob.max(LOWEST)
}

/// `logprobs` of a completion's choice: one entry per token in each list.
#[derive(Default, Serialize)]
pub struct CompletionLogprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<String>,
    top_logprobs: Vec<Option<Ranked>>,
}

/// A JSON object whose entries keep their order, best first.
struct Ranked(Vec<(String, f32)>);

impl Serialize for Ranked {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (token, logprob) in &self.0 {
            map.serialize_entry(token, logprob)?;
        }
        map.end()
    }
}

impl CompletionLogprobs {
    /// Adds a token that begins at character `offset` of the text. `report` is `None` for the first token of a prompt,
    /// which has no log-probability.
    pub fn push(&mut self, token: u32, report: Option<&OutputToken>, names: Names<'_>, offset: usize) {
        self.text_offset.push(offset);
        self.token_logprobs.push(report.map(|r| finite(r.logprob)));
        self.top_logprobs.push(report.map(|r| {
            // The chosen token is always listed.
            let mut listed = r.top.clone();
            if !listed.iter().any(|(id, _)| *id == r.token) {
                listed.push((r.token, r.logprob));
            }
            let mut ranked: Vec<_> = listed.into_iter().map(|(id, lp)| (names.name(id), finite(lp))).collect();
            ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
            Ranked(ranked)
        }));
        self.tokens.push(names.name(token));
    }
}

/// `logprobs` of a chat completion's choice.
#[derive(Serialize)]
pub struct ChatLogprobs {
    content: Vec<ChatToken>,
}

#[derive(Serialize)]
struct ChatToken {
    #[serde(flatten)]
    token: TokenLogprob,
    top_logprobs: Vec<TokenLogprob>,
}

#[derive(Serialize)]
struct TokenLogprob {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    /// The entry of one token.
    pub fn of_token(token: &OutputToken, names: Names<'_>) -> Value {
        let mut content = Self::new(std::slice::from_ref(token), names).content;
        // Tokens are plain data, which always becomes JSON.
        serde_json::to_value(content.pop()).unwrap_or_default()
    }

    /// The log-probabilities of `tokens`.
    pub fn new(tokens: &[OutputToken], names: Names<'_>) -> Self {
        let entry = |id: u32, logprob: f32| TokenLogprob {
            token: names.name(id),
            logprob: finite(logprob),
            bytes: names.text.token_bytes(id),
        };
        let content = tokens.iter().map(|t| ChatToken {
            token: entry(t.token, t.logprob),
            top_logprobs: t.top.iter().map(|(id, logprob)| entry(*id, *logprob)).collect(),
        });
        Self { content: content.collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chosen_token_is_always_listed() {
        let text = TextModel::from_files(&overfill_simulated::text_files()).unwrap();
        let report = OutputToken { token: 70, logprob: -3.0, top: vec![(68, -0.1), (69, f32::NEG_INFINITY)] };
        let mut logprobs = CompletionLogprobs::default();
        logprobs.push(71, None, Names { text: &text, as_ids: false }, 0);
        logprobs.push(70, Some(&report), Names { text: &text, as_ids: false }, 1);
        assert_eq!(
            serde_json::to_string(&logprobs).unwrap(),
            r#"{"text_offset":[0,1],"token_logprobs":[null,-3.0],"tokens":["D","C"],"top_logprobs":[null,{"A":-0.1,"C":-3.0,"B":-9999.0}]}"#
        );
        let chat = ChatLogprobs::new(&[report], Names { text: &text, as_ids: true });
        let json = serde_json::to_value(&chat).unwrap();
        assert_eq!(json["content"][0]["token"], "token_id:70");
        assert_eq!(json["content"][0]["bytes"], serde_json::json!([67]));
        assert_eq!(json["content"][0]["top_logprobs"].as_array().unwrap().len(), 2);
    }
}
