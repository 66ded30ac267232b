//! Grammars of answers that must call functions, in llguidance's dialect of Lark.

use std::fmt::Write as _;

use serde_json::Value as Json;

use super::{
    AnswerFormat,
    formats::{ReasoningFormat, ToolFormat},
};

/// The grammar of answers in `format` that call one of `functions`, given by name and JSON schema of the arguments.
/// `has_named_form`: Mistral's form is `f[ARGS]{..}`, not a list. `special` is the id of a text that is a special token: a
/// grammar names such a token by its id.
///
/// Arguments have schemas of their own, in which references such as `#/$defs/x` stay valid. What is around them is written
/// as chat templates write it.
pub(crate) fn grammar(
    format: &AnswerFormat,
    functions: &[(&str, &Json)],
    has_named_form: bool,
    special: impl Fn(&str) -> Option<u32>,
) -> String {
    let marker = |text: &str| special(text).map_or_else(|| quoted(text), |id| format!("<[{id}]>"));
    let tools = format.tools.unwrap_or(ToolFormat::Llama3Json);
    let repeated = |between: &str| match format.only_one_call {
        true => "call".to_owned(),
        false => format!("call ({}call)*", between),
    };
    let markers: Vec<String> = tools.markers().iter().copied().map(marker).collect();
    let (calls, call) = match tools {
        ToolFormat::Hermes => (repeated("\"\\n\" "), format!("{} \"\\n\" function \"\\n\" {}", markers[0], markers[1])),
        ToolFormat::Mistral if has_named_form => (repeated(""), format!("{} function", markers[0])),
        ToolFormat::Mistral => (format!("{} \"[\" {} \"]\"", markers[0], repeated("\", \" ")), "function".into()),
        // Llama 3 makes one call at a time. Python's syntax has no grammar for JSON schemas.
        ToolFormat::Llama3Json | ToolFormat::Pythonic => ("call".into(), "function".into()),
    };
    let mut lark = format!("start: {}{calls}\ncall: {call}\n", before(format));
    if let Some(reasoning) = format.reasoning {
        // The text up to the marker, and the marker.
        let close = reasoning.markers()[1];
        let _ = match special(close) {
            Some(id) => writeln!(lark, "thoughts: /(.|\\n)*/ <[{id}]>"),
            None => writeln!(lark, "thoughts[suffix={}]: /(.|\\n)*/", quoted(close)),
        };
        let _ = writeln!(lark, "open: {}\ngap: /\\n+/", marker(reasoning.markers()[0]));
    }
    let names: Vec<String> = (0..functions.len()).map(|i| format!("function{i}")).collect();
    let _ = writeln!(lark, "function: {}", names.join(" | "));
    for (i, (name, parameters)) in functions.iter().enumerate() {
        let key = if tools == ToolFormat::Llama3Json { "parameters" } else { "arguments" };
        let _ = match tools == ToolFormat::Mistral && has_named_form {
            true => writeln!(lark, "function{i}: {} {} arguments{i}", quoted(name), markers[1]),
            false => {
                let head = format!("{{\"name\": {}, \"{key}\": ", Json::from(*name));
                writeln!(lark, "function{i}: {} arguments{i} \"}}\"", quoted(&head))
            }
        };
        let _ = writeln!(lark, "arguments{i}: %json {parameters}");
    }
    lark
}

/// What may come before the calls.
fn before(format: &AnswerFormat) -> &'static str {
    match format.reasoning {
        None => "",
        Some(_) if format.reasoning_is_open => "thoughts gap? ",
        Some(ReasoningFormat::Qwen3) => "(open thoughts gap?)? ",
        Some(ReasoningFormat::DeepseekR1) => "open? thoughts gap? ",
    }
}

/// A string literal. Lark's strings have the escapes of JSON.
fn quoted(text: &str) -> String {
    Json::from(text).to_string()
}
