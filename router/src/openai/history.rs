//! Earlier turns of a chat that an API describes piece by piece: texts, reasoning, calls and their results. The pieces become
//! messages in the form that chat templates take, the same as in chat completions.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::messages;
use crate::GenerateError;

/// Maximum length of a value in an error message, in characters.
const MAX_SHOWN: usize = 100;

/// The messages so far.
#[derive(Default)]
pub struct History {
    messages: Vec<Value>,
    /// Names of the functions that were called, by the id of the call.
    called: HashMap<String, String>,
}

impl History {
    /// Adds instructions. Those at the beginning are one message, because many templates take only one.
    pub fn system(&mut self, text: &str) {
        match &mut self.messages[..] {
            [only] if only["role"] == "system" => {
                only["content"] = json!(only["content"].as_str().unwrap_or_default().to_owned() + "\n\n" + text);
            }
            _ => self.messages.push(json!({"role": "system", "content": text})),
        }
    }

    /// Adds a text of the user.
    pub fn user(&mut self, text: &str) {
        self.messages.push(json!({"role": "user", "content": text}));
    }

    /// Adds reasoning of the assistant. It begins a turn.
    pub fn reasoning(&mut self, text: &str) {
        let goes_on = |message: &Value| message.get("reasoning").is_some() && message["content"] == "";
        let message = self.assistant_turn(|message| goes_on(message) && message.get("tool_calls").is_none());
        let text = match message.get("reasoning").and_then(Value::as_str) {
            Some(before) => format!("{before}\n{text}"),
            None => text.to_owned(),
        };
        // Templates read one name or the other.
        message.insert("reasoning".into(), text.clone().into());
        message.insert("reasoning_content".into(), text.into());
    }

    /// Adds a text of the assistant. It follows the reasoning of the turn, and its calls follow.
    pub fn assistant(&mut self, text: &str) {
        let message = self.assistant_turn(|message| message["content"] == "" && message.get("tool_calls").is_none());
        message.insert("content".into(), text.into());
    }

    /// Adds a call of the assistant. `arguments`: JSON text, or an object.
    pub fn call(&mut self, id: &str, name: &str, arguments: Value) {
        self.called.insert(id.to_owned(), name.to_owned());
        let arguments = messages::arguments(arguments);
        let call = json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
        let message = self.assistant_turn(|_| true);
        match message.entry("tool_calls").or_insert_with(|| json!([])) {
            Value::Array(calls) => calls.push(call),
            other => *other = json!([call]),
        }
    }

    /// Adds the result of a call.
    pub fn result(&mut self, id: &str, text: &str) {
        let mut message = json!({"role": "tool", "content": text, "tool_call_id": id});
        if let Some(name) = self.called.get(id) {
            message["name"] = json!(name);
        }
        self.messages.push(message);
    }

    /// Whether the last message is a text of the assistant, with no calls after it.
    pub fn ends_with_text_of_assistant(&self) -> bool {
        self.messages.last().is_some_and(|last| last["role"] == "assistant" && last.get("tool_calls").is_none())
    }

    /// All messages.
    pub fn messages(self) -> Vec<Value> {
        self.messages
    }

    /// The message of the assistant's turn: the last one if `goes_on` says that it goes on, else a new one.
    fn assistant_turn(&mut self, goes_on: impl FnOnce(&Value) -> bool) -> &mut Map<String, Value> {
        let last = self.messages.last().filter(|last| last["role"] == "assistant");
        if !last.is_some_and(goes_on) {
            self.messages.push(json!({"role": "assistant", "content": ""}));
        }
        match self.messages.last_mut() {
            Some(Value::Object(message)) => message,
            _ => unreachable!("the last message is an object, because this type makes only objects"),
        }
    }
}

/// The text of a content: a string, or a list of parts of one of the types `kinds`, which are joined by line breaks.
pub fn text(at: &str, content: &Value, kinds: &[&str]) -> Result<String, GenerateError> {
    let parts = match content {
        Value::String(text) => return Ok(text.clone()),
        Value::Array(parts) => parts,
        Value::Null => return Ok(String::new()),
        other => return Err(GenerateError::limit(at, "a string or a list of parts", shown(other))),
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (i, part) in parts.iter().enumerate() {
        let at = format!("{at}[{i}]");
        let kind = part["type"].as_str().unwrap_or_default();
        if !kinds.contains(&kind) {
            let limit = format!("a part of type {}", kinds.join(" or "));
            return Err(GenerateError::limit(&at, limit, shown(&part["type"])));
        }
        let field = if kind == "refusal" { "refusal" } else { "text" };
        match part[field].as_str() {
            Some(text) => texts.push(text),
            None => return Err(GenerateError::limit(&format!("{at}.{field}"), "a string", shown(&part[field]))),
        }
    }
    Ok(texts.join("\n"))
}

/// A string of an object. `at`: the object's name in errors.
pub fn string<'a>(at: &str, object: &'a Value, field: &str) -> Result<&'a str, GenerateError> {
    let value = &object[field];
    value.as_str().ok_or_else(|| GenerateError::limit(&format!("{at}.{field}"), "a string", shown(value)))
}

/// A value in an error message.
pub fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(MAX_SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_a_turn_are_one_message() {
        let mut history = History::default();
        history.system("a");
        history.system("b");
        history.user("c");
        history.reasoning("d");
        history.assistant("e");
        history.call("1", "f", json!("{\"x\": 1}"));
        history.call("2", "g", json!({"y": 2}));
        history.result("2", "h");
        history.result("3", "i");
        history.system("j");
        history.call("4", "f", json!("no JSON"));
        assert!(!history.ends_with_text_of_assistant());
        history.assistant("k");
        history.assistant("l");
        history.reasoning("m");
        history.reasoning("n");
        assert!(history.ends_with_text_of_assistant());
        let call = |id: &str, name: &str, arguments: Value| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
        let wanted = json!([
            {"role": "system", "content": "a\n\nb"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "e", "reasoning": "d", "reasoning_content": "d",
             "tool_calls": [call("1", "f", json!({"x": 1})), call("2", "g", json!({"y": 2}))]},
            {"role": "tool", "content": "h", "tool_call_id": "2", "name": "g"},
            {"role": "tool", "content": "i", "tool_call_id": "3"},
            {"role": "system", "content": "j"},
            {"role": "assistant", "content": "", "tool_calls": [call("4", "f", json!({}))]},
            {"role": "assistant", "content": "k"},
            {"role": "assistant", "content": "l"},
            {"role": "assistant", "content": "", "reasoning": "m\nn", "reasoning_content": "m\nn"},
        ]);
        assert_eq!(json!(history.messages()), wanted);
    }

    #[test]
    fn values_in_errors_are_short() {
        assert_eq!(shown(&json!("ä".repeat(200))).chars().count(), MAX_SHOWN + 3);
        assert_eq!(shown(&json!({"a": 1})), "{\"a\":1}");
    }
}
