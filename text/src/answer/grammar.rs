//! Grammars of answers: those that must call functions, and those with reasoning. They are in llguidance's dialect of Lark.

use std::fmt::Write as _;

use llguidance::regex_to_lark;
use overfill_kv::Grammar;
use serde_json::{Value as Json, json};

use crate::grammar::with_short_gaps;

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
pub(crate) fn of_calls(
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
    reasoning_rules(&mut lark, format, &special);
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
        let _ = writeln!(lark, "arguments{i}: %json {}", with_layout(parameters));
    }
    lark
}

/// The grammar of answers whose text after the reasoning matches `grammar`.
pub(crate) fn after_reasoning(
    format: &AnswerFormat,
    grammar: &Grammar,
    special: impl Fn(&str) -> Option<u32>,
) -> Grammar {
    if format.reasoning.is_none() {
        return grammar.clone();
    }
    let answer = match grammar {
        Grammar::Json(schema) => match serde_json::from_str::<Json>(schema) {
            Ok(schema @ Json::Object(_)) => format!("%json {}", with_short_gaps(schema)),
            // True or false.
            _ => format!("%json {{\"allOf\": [{schema}]}}"),
        },
        Grammar::Regex(regex) => format!("/{}/", regex_to_lark(regex, "")),
        Grammar::Choice(texts) => texts.iter().map(|text| quoted(text)).collect::<Vec<_>>().join(" | "),
        Grammar::Lark(lark) => format!("%lark {{\n{lark}\n}}"),
    };
    let mut lark = format!("start: {}answer\nanswer: {answer}\n", before(format));
    reasoning_rules(&mut lark, format, &special);
    Grammar::Lark(lark)
}

/// The rules that [`before`] refers to.
fn reasoning_rules(lark: &mut String, format: &AnswerFormat, special: &impl Fn(&str) -> Option<u32>) {
    let Some(reasoning) = format.reasoning else { return };
    let [open, close] = [reasoning.markers()[0], reasoning.markers()[1]];
    // The text up to the marker, and the marker.
    let _ = match special(close) {
        Some(id) => writeln!(lark, "thoughts: /(.|\\n)*/ <[{id}]>"),
        None => writeln!(lark, "thoughts[suffix={}]: /(.|\\n)*/", quoted(close)),
    };
    let open = special(open).map_or_else(|| quoted(open), |id| format!("<[{id}]>"));
    let _ = writeln!(lark, "open: {open}\ngap: /\\n{{1,4}}/");
}

/// The schema with a layout: a space after commas and colons, as templates write it, or none, and no other white space. Without
/// that, a model may write white space without end.
fn with_layout(parameters: &Json) -> Json {
    let mut schema = parameters.clone();
    if let Json::Object(fields) = &mut schema {
        let layout = json!({"item_separator": ", ?", "key_separator": ": ?", "whitespace_flexible": false});
        fields.insert("x-guidance".into(), layout);
    }
    schema
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
