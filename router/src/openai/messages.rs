//! The messages of a chat request, in the form that chat templates take.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::GenerateError;

#[derive(Deserialize)]
struct MessageBody {
    role: String,
    content: Option<Content>,
    name: Option<String>,
    tool_calls: Option<Vec<Value>>,
    tool_call_id: Option<String>,
    reasoning_content: Option<String>,
    /// vLLM's newer name of `reasoning_content`.
    reasoning: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of parts")]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    r#type: String,
    text: Option<String>,
    refusal: Option<String>,
}

/// Checks the messages. Errors name the message and its field, like `messages[3].content`.
pub fn parse(messages: Vec<Value>) -> Result<Vec<Value>, GenerateError> {
    if messages.is_empty() {
        return Err(GenerateError::invalid("messages", "messages must have at least one message, got 0"));
    }
    messages.into_iter().enumerate().map(|(i, message)| parse_one(&format!("messages[{i}]"), message)).collect()
}

fn parse_one(at: &str, message: Value) -> Result<Value, GenerateError> {
    let body = serde_json::from_value(message).map_err(|e| GenerateError::invalid(at, format!("{at}: {e}")))?;
    let MessageBody { role, content, name, tool_calls, tool_call_id, reasoning_content, reasoning } = body;
    let mut message = Map::new();
    let is_assistant = role == "assistant";
    message.insert("role".into(), role.into());
    message.insert("content".into(), content.map_or(Ok(String::new()), |content| text(at, content))?.into());
    if is_assistant {
        let mut calls = tool_calls.unwrap_or_default();
        for (i, call) in calls.iter_mut().enumerate() {
            check_call(&format!("{at}.tool_calls[{i}]"), call)?;
        }
        // Without calls, templates take the path of an ordinary message.
        if !calls.is_empty() {
            message.insert("tool_calls".into(), calls.into());
        }
        // Templates read one name or the other.
        if let Some(reasoning) = reasoning_content.or(reasoning) {
            message.insert("reasoning".into(), reasoning.clone().into());
            message.insert("reasoning_content".into(), reasoning.into());
        }
    } else if tool_calls.is_some_and(|calls| !calls.is_empty()) {
        let field = format!("{at}.tool_calls");
        return Err(GenerateError::limit(&field, "of a message with the role assistant", &message["role"]));
    }
    for (field, value) in [("tool_call_id", tool_call_id), ("name", name)] {
        if let Some(value) = value {
            message.insert(field.into(), value.into());
        }
    }
    Ok(message.into())
}

/// The text of a content. Parts are joined by line breaks, as in vLLM.
fn text(at: &str, content: Content) -> Result<String, GenerateError> {
    let parts = match content {
        Content::Text(text) => return Ok(text),
        Content::Parts(parts) => parts,
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (i, Part { r#type, text, refusal }) in parts.into_iter().enumerate() {
        let field = || format!("{at}.content[{i}]");
        match (r#type.as_str(), text, refusal) {
            ("text", Some(text), _) | ("refusal", _, Some(text)) => texts.push(text),
            ("text" | "refusal", ..) => {
                return Err(GenerateError::limit(
                    &field(),
                    "a part with a text",
                    format!("one of type {type} without", type = r#type),
                ));
            }
            (other, ..) => return Err(GenerateError::limit(&field(), "a part of type text", other)),
        }
    }
    Ok(texts.join("\n"))
}

/// Checks a call of an earlier answer. Clients send its arguments as JSON text, but templates take an object, so the text is
/// parsed. As in vLLM, a text that is no JSON becomes an empty object.
fn check_call(at: &str, call: &mut Value) -> Result<(), GenerateError> {
    let limit =
        |field: &str, limit: &str, value: &Value| Err(GenerateError::limit(&format!("{at}{field}"), limit, value));
    match &call["type"] {
        Value::Null => {}
        Value::String(kind) if kind == "function" => {}
        other => return limit(".type", "\"function\"", other),
    }
    if !call["function"].is_object() {
        return limit(".function", "an object", &call["function"]);
    }
    if call["function"]["name"].as_str().is_none_or(str::is_empty) {
        return limit(".function.name", "the name of a function", &call["function"]["name"]);
    }
    let arguments = &mut call["function"]["arguments"];
    *arguments = self::arguments(arguments.take());
    Ok(())
}

/// The arguments of a call as templates take them: JSON text is parsed, and what is no JSON becomes an empty object.
pub fn arguments(value: Value) -> Value {
    match value {
        Value::String(text) => serde_json::from_str(&text).unwrap_or_else(|_| json!({})),
        value @ (Value::Object(_) | Value::Array(_)) => value,
        _ => json!({}),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(message: Value) -> Result<Value, String> {
        parse(vec![json!({"role": "user", "content": "x"}), message])
            .map(|mut all| all.remove(1))
            .map_err(|e| e.to_string())
    }

    /// Without serde_json's `float_roundtrip`, each of these numbers becomes one of its neighbours.
    #[test]
    fn numbers_in_arguments_keep_all_digits() {
        let text = r#"{"x":[1.0189544801599961,1.2290127489411473,3.0777988738688586,1.1934073473931799]}"#;
        assert_eq!(arguments(json!(text)).to_string(), text);
    }

    #[test]
    fn templates_get_what_vllm_gives_them() {
        let call = |arguments: Value| json!({"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}});
        for (sent, given) in [
            (json!("{\"b\": 1, \"a\": 2.0}"), json!({"b": 1, "a": 2.0})),
            (json!({"a": 1}), json!({"a": 1})),
            (json!(""), json!({})),
            (json!("{"), json!({})),
            (Value::Null, json!({})),
        ] {
            let message =
                one(json!({"role": "assistant", "content": null, "tool_calls": [call(sent)], "refusal": null}));
            let wanted = json!({"role": "assistant", "content": "", "tool_calls": [call(given)]});
            assert_eq!(message.unwrap().to_string(), wanted.to_string());
        }
        let message = one(
            json!({"role": "assistant", "content": "x", "tool_calls": [], "reasoning_content": "r", "audio": null}),
        );
        let wanted = json!({"role": "assistant", "content": "x", "reasoning": "r", "reasoning_content": "r"});
        assert_eq!(message.unwrap(), wanted);
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let message = one(json!({"role": "tool", "tool_call_id": "a", "name": "f", "content": parts}));
        assert_eq!(message.unwrap(), json!({"role": "tool", "content": "a\nb", "tool_call_id": "a", "name": "f"}));
    }

    #[test]
    fn faults_name_the_message() {
        let call = |call: Value| json!({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}, call]});
        for (message, fault) in [
            (json!("x"), "messages[1]: invalid type: string \"x\", expected struct MessageBody"),
            (json!({"content": "x"}), "messages[1]: missing field `role`"),
            (json!({"role": "user", "content": 3}), "messages[1]: expected a string or a list of parts"),
            (
                json!({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}),
                "messages[1].content[0] must be a part of type text, got image_url",
            ),
            (
                json!({"role": "user", "content": [{"type": "text"}]}),
                "messages[1].content[0] must be a part with a text, got one of type text without",
            ),
            (call(json!({"type": "custom"})), "messages[1].tool_calls[1].type must be \"function\", got \"custom\""),
            (call(json!(3)), "messages[1].tool_calls[1].function must be an object, got null"),
            (
                call(json!({"function": {"name": ""}})),
                "messages[1].tool_calls[1].function.name must be the name of a function, got \"\"",
            ),
            (
                json!({"role": "user", "tool_calls": [{}]}),
                "messages[1].tool_calls must be of a message with the role assistant, got \"user\"",
            ),
        ] {
            assert_eq!(one(message).unwrap_err(), fault);
        }
    }
}
