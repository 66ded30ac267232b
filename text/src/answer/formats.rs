//! The formats in which models write tool calls and reasoning.

/// How a model writes tool calls. The names are those of vLLM's parsers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>{"name": "f", "arguments": {..}}</tool_call>`, of Hermes and Qwen.
    Hermes,
    /// `{"name": "f", "parameters": {..}}` at the beginning of the answer or after `<|python_tag|>`, of Llama 3. Several calls
    /// are separated by `;`.
    Llama3Json,
    /// `[f(a="x", b=[1, True])]` at the beginning of the answer or after `<|python_start|>`, of Llama 3.2 and 4.
    Pythonic,
    /// `[TOOL_CALLS]` with `[{"name": "f", "arguments": {..}}]`, `f{..}` or `f[ARGS]{..}`, of Mistral.
    Mistral,
}

impl ToolFormat {
    /// All formats.
    pub const ALL: [Self; 4] = [Self::Hermes, Self::Llama3Json, Self::Pythonic, Self::Mistral];

    /// Name of the format.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hermes => "hermes",
            Self::Llama3Json => "llama3_json",
            Self::Pythonic => "pythonic",
            Self::Mistral => "mistral",
        }
    }

    /// The format that a chat template asks the model for. `None` if the template names no tools or asks for another one.
    pub fn of_template(source: &str) -> Option<Self> {
        if source.contains("[TOOL_CALLS]") {
            return Some(Self::Mistral);
        }
        // Other families write XML between the same tags.
        if source.split("<tool_call>").skip(1).any(begins_an_object) {
            return Some(Self::Hermes);
        }
        if source.contains("\"parameters\": dictionary of argument") {
            return Some(Self::Llama3Json);
        }
        let list = "[func_name1(params_name1=params_value1";
        source.contains(list).then_some(Self::Pythonic)
    }

    /// The texts that mark calls: the one before calls, the one after calls, and those within a call.
    pub(super) fn markers(self) -> &'static [&'static str] {
        match self {
            Self::Hermes => &["<tool_call>", "</tool_call>"],
            Self::Llama3Json => &["<|python_tag|>"],
            Self::Pythonic => &["<|python_start|>", "<|python_end|>"],
            Self::Mistral => &["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
        }
    }

    /// Whether calls need no marker at the beginning of an answer.
    pub(super) fn needs_no_marker(self) -> bool {
        matches!(self, Self::Llama3Json | Self::Pythonic)
    }
}

/// Whether the text of a template goes on with a JSON object. Between are only line breaks, which may be escaped, and ends
/// and beginnings of the template's own expressions, as in `"<tool_call>\n" }}{{- '{"name": '`.
fn begins_an_object(text: &str) -> bool {
    let between = |c: char| c.is_whitespace() || matches!(c, '\\' | 'n' | '"' | '\'' | '{' | '}' | '-' | '+');
    let head = text.find(|c| !between(c)).map_or(text, |at| &text[..at]);
    ["{\"", "{\\\""].iter().any(|object| head.contains(object))
}

/// How a model marks its reasoning. The names are those of vLLM's parsers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReasoningFormat {
    /// `<think>..</think>`, of Qwen 3. Without `<think>` in the prompt's end or the answer's beginning, all is content.
    Qwen3,
    /// `<think>..</think>`, of DeepSeek R1, which may leave out `<think>`: what comes before `</think>` is reasoning.
    DeepseekR1,
}

impl ReasoningFormat {
    /// All formats.
    pub const ALL: [Self; 2] = [Self::Qwen3, Self::DeepseekR1];

    /// Name of the format.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Qwen3 => "qwen3",
            Self::DeepseekR1 => "deepseek_r1",
        }
    }

    /// Where the answer to a prompt begins. `continued`: text of the message that the answer continues.
    pub fn position(self, prompt: &str, continued: Option<&str>) -> ReasoningPosition {
        let [open, close] = ["<think>", "</think>"];
        let (prompt, continued) = (prompt.trim_end(), continued.unwrap_or_default());
        let opened = continued.rfind(open).is_some_and(|at| !continued[at..].contains(close));
        if opened || prompt.ends_with(open) {
            return ReasoningPosition::Within;
        }
        match !continued.trim().is_empty() || prompt.ends_with(close) {
            true => ReasoningPosition::After,
            false => ReasoningPosition::Before,
        }
    }

    /// The texts before and after the reasoning.
    pub(super) fn markers(self) -> &'static [&'static str] {
        match self {
            Self::Qwen3 | Self::DeepseekR1 => &["<think>", "</think>"],
        }
    }
}

/// Where an answer begins, relative to its reasoning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReasoningPosition {
    /// The model may begin to reason.
    Before,
    /// The prompt has begun the reasoning.
    Within,
    /// The prompt has ended the reasoning.
    After,
}
