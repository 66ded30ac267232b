//! Settings of requests: how the answers of chats are parsed, what the full model does, and what a request may change.

use std::collections::BTreeMap;

use overfill_cluster::ConfigError;
use overfill_kv::Mode;
use overfill_text::{ReasoningFormat, ToolFormat};

/// Flags that say what requests may change.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct RequestArgs {
    /// How models write tool calls: hermes, llama3_json, pythonic, mistral, or none to leave them as text. MODEL=PARSER is for
    /// one model. Comma-separated or repeated [default: as the chat template says]
    #[arg(
        long = "tool-call-parser",
        env = "OVERFILL_TOOL_CALL_PARSER",
        value_delimiter = ',',
        value_name = "[MODEL=]PARSER",
        help_heading = "Chats"
    )]
    pub tool_call_parser: Vec<String>,
    /// How models mark their reasoning: qwen3, deepseek_r1, or none to leave it in the text. MODEL=PARSER is for one model.
    /// Comma-separated or repeated [default: none]
    #[arg(
        long = "reasoning-parser",
        env = "OVERFILL_REASONING_PARSER",
        value_delimiter = ',',
        value_name = "[MODEL=]PARSER",
        help_heading = "Chats"
    )]
    pub reasoning_parser: Vec<String>,
    /// What the full model does after the first token of requests that do not say: draft (nothing), refresh (it computes the KV
    /// of generated tokens too), or exact (it decides on every token). MODEL=MODE is for one model. Comma-separated or
    /// repeated [default: draft]
    #[arg(
        long = "mode",
        env = "OVERFILL_MODE",
        value_delimiter = ',',
        value_name = "[MODEL=]MODE",
        help_heading = "Requests"
    )]
    pub mode: Vec<String>,
    /// Share of the answers in mode draft that the full model scores when they have ended, in [0, 1]. It does so while prefill
    /// nodes have nothing else to compute. No text is stored.
    #[arg(long, env = "OVERFILL_WATCH_SHARE", default_value_t = 0.0, value_name = "SHARE", help_heading = "Requests")]
    pub watch_share: f64,
    /// Allow requests with a chat template of their own. Templates are programs. Their time, memory and output are limited.
    #[arg(long, env = "OVERFILL_TRUST_REQUEST_CHAT_TEMPLATE", help_heading = "Chats")]
    pub trust_request_chat_template: bool,
}

impl RequestArgs {
    /// Validates the flags. Adds what is wrong to `faults`.
    pub fn validate(self, faults: &mut Vec<ConfigError>) -> RequestSettings {
        let Self { tool_call_parser, reasoning_parser, mode, watch_share, trust_request_chat_template } = self;
        ConfigError::check(faults, (0.0..=1.0).contains(&watch_share), "watch-share", "in [0, 1]", watch_share);
        let tools = ToolFormat::ALL.map(|format| (format.as_str(), format));
        let reasoning = ReasoningFormat::ALL.map(|format| (format.as_str(), format));
        RequestSettings {
            tool_parsers: ByModel::parse("tool-call-parser", &tool_call_parser, &tools, faults),
            reasoning_parsers: ByModel::parse("reasoning-parser", &reasoning_parser, &reasoning, faults),
            modes: ByModel::parse("mode", &mode, &Mode::ALL.map(|mode| (mode.as_str(), mode)), faults),
            watch_share,
            trust_request_chat_template,
        }
    }
}

/// Validated settings of requests.
#[derive(Clone, Debug, Default)]
pub struct RequestSettings {
    /// How models write tool calls. A model without an entry is asked in the format that its chat template names.
    pub tool_parsers: ByModel<ToolFormat>,
    /// How models mark their reasoning.
    pub reasoning_parsers: ByModel<ReasoningFormat>,
    /// What the full model does after the first token.
    pub modes: ByModel<Mode>,
    /// Share of the answers that the full model scores ([`crate::watch`]).
    pub watch_share: f64,
    /// Whether a request may bring a chat template of its own.
    pub trust_request_chat_template: bool,
}

/// A format for each model, or none.
#[derive(Clone, Debug)]
pub struct ByModel<T> {
    others: Option<Option<T>>,
    models: BTreeMap<String, Option<T>>,
}

impl<T> Default for ByModel<T> {
    fn default() -> Self {
        Self { others: None, models: BTreeMap::new() }
    }
}

impl<T: Copy> ByModel<T> {
    /// The setting of a model: a format, or `Some(None)` for none. `None`: nothing is set.
    pub fn of(&self, model: &str) -> Option<Option<T>> {
        self.models.get(model).copied().or(self.others)
    }

    fn parse(flag: &'static str, values: &[String], formats: &[(&str, T)], faults: &mut Vec<ConfigError>) -> Self {
        let mut all = Self::default();
        for value in values {
            let (model, name) =
                value.rsplit_once('=').map_or((None, value.as_str()), |(model, name)| (Some(model), name));
            let known = formats.iter().find(|(known, _)| *known == name).map(|(_, format)| Some(*format));
            let Some(format) = known.or((name == "none").then_some(None)) else {
                let names: Vec<&str> = formats.iter().map(|(name, _)| *name).collect();
                let limit = format!("[MODEL=]NAME with one of {} and none", names.join(", "));
                faults.push(ConfigError::new(flag, limit, value));
                continue;
            };
            match model {
                Some(model) => drop(all.models.insert(model.to_owned(), format)),
                None => all.others = Some(format),
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parsers_by_model() {
        let mut faults = Vec::new();
        let list = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        let args = RequestArgs {
            tool_call_parser: list(&["hermes", "a=mistral", "b=none", "c=qwen"]),
            reasoning_parser: list(&["x=deepseek_r1"]),
            mode: list(&["exact", "x=refresh"]),
            watch_share: 1.5,
            trust_request_chat_template: false,
        };
        let settings = args.validate(&mut faults);
        let tools = ["a", "b", "other"].map(|model| settings.tool_parsers.of(model));
        assert_eq!(tools, [Some(Some(ToolFormat::Mistral)), Some(None), Some(Some(ToolFormat::Hermes))]);
        let reasoning = ["x", "other"].map(|model| settings.reasoning_parsers.of(model));
        assert_eq!(reasoning, [Some(Some(ReasoningFormat::DeepseekR1)), None]);
        let modes = ["x", "other"].map(|model| settings.modes.of(model).flatten());
        assert_eq!(modes, [Some(Mode::Refresh), Some(Mode::Exact)]);
        let faults: Vec<String> = faults.iter().map(ToString::to_string).collect();
        let names = "hermes, llama3_json, pythonic, mistral and none";
        let parser = format!("--tool-call-parser must be [MODEL=]NAME with one of {names}, got c=qwen");
        assert_eq!(faults, ["--watch-share must be in [0, 1], got 1.5".to_owned(), parser]);
    }
}
