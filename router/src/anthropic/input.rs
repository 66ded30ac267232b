//! What a request to the Messages API asks for.

use overfill_kv::Grammar;
use overfill_text::GenerationDefaults;
use serde_json::{Map, Value, json};

use crate::{
    GenerateError,
    openai::{
        conversation::{Asked, Conversation},
        fields::{Common, Fields},
        history::{History, shown, string, text},
        tools::{ToolChoice, Tools},
    },
    prompt::ChatPrompt,
    request,
};

/// Unsupported fields that would change the answer, with the values that are accepted because they ask for nothing.
const UNSUPPORTED: &[(&str, &str)] =
    &[("mcp_servers", "[]"), ("prompt_logprobs", "null"), ("chat_template", "null"), ("chat_template_kwargs", "{}")];

/// A request.
pub struct Ask {
    /// How to answer.
    pub asked: Asked,
    /// What to answer.
    pub conversation: Conversation,
    /// Maximum number of tokens of the answer. It may exceed what fits the context.
    pub max_tokens: u32,
}

impl Ask {
    /// Takes every field except `model`. `generates`: whether an answer is wanted, not only a count of tokens.
    pub fn parse(mut fields: Fields, defaults: &GenerationDefaults, generates: bool) -> Result<Self, GenerateError> {
        let stops = fields.take::<Vec<String>>("stop_sequences")?.unwrap_or_default();
        request::check_stops(&stops).map_err(|e| e.renamed("stop", "stop_sequences"))?;
        // Not a field of this API. What it says elsewhere is said by `stop_sequences` here.
        if fields.has("stop") {
            return Err(GenerateError::invalid("stop", "stop is not supported: use stop_sequences"));
        }
        let mut common = Common::take(&mut fields, defaults)?;
        common.stop = stops;
        if common.n != 1 {
            return Err(GenerateError::limit("n", "1", common.n));
        }
        let max_tokens = match (fields.take_count("max_tokens")?, generates) {
            (Some(0), true) => return Err(GenerateError::limit("max_tokens", "at least 1", 0)),
            (None, true) => return Err(GenerateError::invalid("max_tokens", "max_tokens is missing")),
            (given, _) => given.unwrap_or(1),
        };
        let mut variables = Map::new();
        let output = fields.take::<Value>("output_config")?.unwrap_or_default();
        if let Some(schema) = schema(&output["format"])? {
            common.match_also("output_config.format", Grammar::Json(schema))?;
        }
        match &output["effort"] {
            Value::Null => {}
            Value::String(effort) => drop(variables.insert("reasoning_effort".into(), json!(effort))),
            other => return Err(GenerateError::limit("output_config.effort", "a string", shown(other))),
        }
        if let Some(thinking) = fields.take::<Value>("thinking")? {
            let thinks = match thinking["type"].as_str() {
                Some("disabled") => false,
                Some("enabled" | "adaptive") => true,
                _ => {
                    let limit = "enabled, adaptive or disabled";
                    return Err(GenerateError::limit("thinking.type", limit, shown(&thinking["type"])));
                }
            };
            variables.insert("enable_thinking".into(), json!(thinks));
        }

        let mut history = History::default();
        let system = text("system", &fields.take::<Value>("system")?.unwrap_or_default(), &["text"])?;
        if !system.is_empty() {
            history.system(&system);
        }
        let messages: Vec<Value> =
            fields.take("messages")?.ok_or_else(|| GenerateError::invalid("messages", "messages is missing"))?;
        if messages.is_empty() {
            return Err(GenerateError::invalid("messages", "messages must have at least one message, got 0"));
        }
        for (i, message) in messages.iter().enumerate() {
            add(&mut history, &format!("messages[{i}]"), message)?;
        }
        // The model goes on with a text that the client has begun.
        let continues = history.ends_with_text_of_assistant();

        let definitions = fields.take::<Vec<Value>>("tools")?.unwrap_or_default();
        let definitions = definitions.iter().enumerate().map(|(i, tool)| definition(&format!("tools[{i}]"), tool));
        let chosen = fields.take::<Value>("tool_choice")?.unwrap_or_default();
        let tools = Tools::new(
            definitions.collect::<Result<_, _>>()?,
            Some(choice(&chosen)?),
            chosen["disable_parallel_tool_use"] != true,
        );
        let tools = tools.map_err(renamed)?;
        fields.finish_without(UNSUPPORTED)?;

        let chat = ChatPrompt {
            messages: history.messages(),
            tools: tools.definitions.clone(),
            variables,
            add_generation_prompt: !continues,
            continue_final_message: continues,
            ..ChatPrompt::new(std::iter::empty())
        };
        Ok(Self {
            asked: Asked {
                common,
                max_tokens: None,
                at_most_tokens: Some(max_tokens),
                logprobs: None,
                prompt_logprobs: false,
                add_special: false,
            },
            conversation: Conversation { chat, tools },
            max_tokens,
        })
    }
}

/// A fault of a tool, with the names of this API.
pub fn renamed(e: GenerateError) -> GenerateError {
    e.renamed(".function.parameters", ".input_schema").renamed(".function", "")
}

/// Adds a message.
fn add(history: &mut History, at: &str, message: &Value) -> Result<(), GenerateError> {
    let role = string(at, message, "role")?;
    if !["user", "assistant", "system"].contains(&role) {
        return Err(GenerateError::limit(&format!("{at}.role"), "user, assistant or system", shown(&message["role"])));
    }
    let field = format!("{at}.content");
    let blocks = match &message["content"] {
        Value::String(text) => vec![json!({"type": "text", "text": text})],
        Value::Array(blocks) => blocks.clone(),
        other => return Err(GenerateError::limit(&field, "a string or a list of blocks", shown(other))),
    };
    let mut texts = Texts { role, texts: Vec::new() };
    for (i, block) in blocks.iter().enumerate() {
        let at = format!("{field}[{i}]");
        match (role, block["type"].as_str().unwrap_or_default()) {
            (_, "text") => {
                texts.texts.push(string(&at, block, "text")?);
                continue;
            }
            ("user", "tool_result") => {
                texts.flush(history);
                let content = text(&format!("{at}.content"), &block["content"], &["text"])?;
                history.result(string(&at, block, "tool_use_id")?, &content);
            }
            ("assistant", "tool_use") => {
                texts.flush(history);
                let input = &block["input"];
                if !input.is_object() {
                    return Err(GenerateError::limit(&format!("{at}.input"), "an object", shown(input)));
                }
                history.call(string(&at, block, "id")?, string(&at, block, "name")?, input.clone());
            }
            ("assistant", "thinking") => {
                texts.flush(history);
                history.reasoning(string(&at, block, "thinking")?);
            }
            // Only Anthropic can read it.
            ("assistant", "redacted_thinking") => {}
            (role, _) => {
                let limit = match role {
                    "user" => "text or tool_result",
                    "assistant" => "text, tool_use or thinking",
                    _ => "text",
                };
                return Err(GenerateError::limit(&format!("{at}.type"), limit, shown(&block["type"])));
            }
        }
    }
    texts.flush(history);
    Ok(())
}

/// Neighbouring blocks of text, which are one text.
struct Texts<'a> {
    role: &'a str,
    texts: Vec<&'a str>,
}

impl Texts<'_> {
    fn flush(&mut self, history: &mut History) {
        if self.texts.is_empty() {
            return;
        }
        let text = std::mem::take(&mut self.texts).join("\n");
        match self.role {
            "user" => history.user(&text),
            "assistant" => history.assistant(&text),
            _ => history.system(&text),
        }
    }
}

/// A tool in the form of chat completions, which is the one that templates take.
fn definition(at: &str, tool: &Value) -> Result<Value, GenerateError> {
    let kind = &tool["type"];
    if !kind.is_null() && kind != "custom" {
        return Err(GenerateError::limit(&format!("{at}.type"), "custom", shown(kind)));
    }
    let mut function = json!({"name": tool["name"], "parameters": tool["input_schema"]});
    if let Some(description) = tool.get("description") {
        function["description"] = description.clone();
    }
    Ok(json!({"type": "function", "function": function}))
}

fn choice(value: &Value) -> Result<ToolChoice, GenerateError> {
    match (value["type"].as_str(), value["name"].as_str()) {
        (None, _) if value.is_null() => Ok(ToolChoice::Auto),
        (Some("auto"), _) => Ok(ToolChoice::Auto),
        (Some("none"), _) => Ok(ToolChoice::None),
        (Some("any"), _) => Ok(ToolChoice::Required),
        (Some("tool"), Some(name)) => Ok(ToolChoice::Function(name.to_owned())),
        (Some("tool"), None) => Err(GenerateError::limit("tool_choice.name", "a string", shown(&value["name"]))),
        _ => Err(GenerateError::limit("tool_choice.type", "auto, any, tool or none", shown(&value["type"]))),
    }
}

/// The JSON schema of `output_config.format`.
fn schema(format: &Value) -> Result<Option<String>, GenerateError> {
    match (format["type"].as_str(), &format["schema"]) {
        (None, _) if format.is_null() => Ok(None),
        (Some("json_schema"), schema @ Value::Object(_)) => Ok(Some(schema.to_string())),
        (Some("json_schema"), other) => {
            let limit = "a JSON schema, which is an object";
            Err(GenerateError::limit("output_config.format.schema", limit, shown(other)))
        }
        _ => Err(GenerateError::limit("output_config.format.type", "json_schema", shown(&format["type"]))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(mut request: Value, generates: bool) -> Result<Ask, String> {
        if generates && request.get("max_tokens").is_none() {
            request["max_tokens"] = json!(5);
        }
        let fields = Fields::parse(&request.to_string().into()).unwrap();
        Ask::parse(fields, &GenerationDefaults::default(), generates).map_err(|e| e.to_string())
    }

    #[test]
    fn blocks_become_messages() {
        let ask = parse(
            json!({
                "system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}],
                "messages": [
                    {"role": "user", "content": "c"},
                    {"role": "assistant", "content": [
                        {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                        {"type": "redacted_thinking", "data": "x"},
                        {"type": "text", "text": "d"},
                        {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}},
                        {"type": "tool_use", "id": "2", "name": "g", "input": {}},
                    ]},
                    {"role": "user", "content": [
                        {"type": "tool_result", "tool_use_id": "1", "content": "e"},
                        {"type": "tool_result", "tool_use_id": "2", "content": [{"type": "text", "text": "h"}], "is_error": true},
                        {"type": "text", "text": "i"}, {"type": "text", "text": "j"},
                    ]},
                ],
                "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}, {"type": "custom", "name": "g"}],
                "tool_choice": {"type": "any", "disable_parallel_tool_use": true},
                "thinking": {"type": "enabled", "budget_tokens": 1024}, "stop_sequences": ["END"], "metadata": {"user_id": "u"},
            }),
            true,
        )
        .unwrap();
        let call = |id: &str, name: &str, arguments: Value| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
        let wanted = json!([
            {"role": "system", "content": "a\nb"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d", "reasoning": "Hm.", "reasoning_content": "Hm.",
             "tool_calls": [call("1", "f", json!({"x": 1})), call("2", "g", json!({}))]},
            {"role": "tool", "content": "e", "tool_call_id": "1", "name": "f"},
            {"role": "tool", "content": "h", "tool_call_id": "2", "name": "g"},
            {"role": "user", "content": "i\nj"},
        ]);
        let chat = ask.conversation.chat;
        assert_eq!(json!(chat.messages), wanted);
        let tools = json!([
            {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "description": "d"}},
            {"type": "function", "function": {"name": "g", "parameters": null}},
        ]);
        assert_eq!(chat.tools, Some(tools));
        assert_eq!(Value::from(chat.variables), json!({"enable_thinking": true}));
        assert_eq!((ask.asked.common.stop, ask.asked.at_most_tokens), (vec!["END".to_owned()], Some(5)));
        assert!(chat.add_generation_prompt && !chat.continue_final_message);
    }

    #[test]
    fn the_model_goes_on_with_a_text_that_has_begun() {
        let begun =
            json!({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "The answer"}]});
        let chat = parse(begun, false).unwrap().conversation.chat;
        assert!(chat.continue_final_message && !chat.add_generation_prompt);
    }

    #[test]
    fn faults_name_the_field() {
        let user = |content: Value| json!({"messages": [{"role": "user", "content": content}]});
        let with = |field: &str, value: Value| {
            let mut request = user(json!("x"));
            request[field] = value;
            request
        };
        let long: Vec<String> = (0..17).map(|i| i.to_string()).collect();
        for (request, fault) in [
            (json!({}), "messages is missing"),
            (json!({"messages": []}), "messages must have at least one message, got 0"),
            (
                json!({"messages": [{"role": "tool", "content": "x"}]}),
                "messages[0].role must be user, assistant or system, got \"tool\"",
            ),
            (
                json!({"messages": [{"role": "user"}]}),
                "messages[0].content must be a string or a list of blocks, got null",
            ),
            (
                user(json!([{"type": "image"}])),
                "messages[0].content[0].type must be text or tool_result, got \"image\"",
            ),
            (user(json!([{"type": "tool_result"}])), "messages[0].content[0].tool_use_id must be a string, got null"),
            (
                user(json!([{"type": "tool_result", "tool_use_id": "x", "content": [{"type": "image"}]}])),
                "messages[0].content[0].content[0] must be a part of type text, got \"image\"",
            ),
            (
                json!({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "f", "input": "{}"}]}]}),
                "messages[0].content[0].input must be an object, got \"{}\"",
            ),
            (with("max_tokens", json!(0)), "max_tokens must be at least 1, got 0"),
            (with("stop_sequences", json!(long)), "stop_sequences must be at most 16 texts, got 17"),
            (with("stop", json!("x")), "stop is not supported: use stop_sequences"),
            (with("mcp_servers", json!([{}])), "mcp_servers is not supported"),
            (
                with("thinking", json!({"type": "maybe"})),
                "thinking.type must be enabled, adaptive or disabled, got \"maybe\"",
            ),
            (
                with("tools", json!([{"type": "web_search_20250305", "name": "w"}])),
                "tools[0].type must be custom, got \"web_search_20250305\"",
            ),
            (
                with("tools", json!([{"input_schema": {}}])),
                "tools[0].name must be 1 to 64 letters, digits, _ or -, got null",
            ),
            (
                with("tools", json!([{"name": "f", "input_schema": 3}])),
                "tools[0].input_schema must be a JSON schema, which is an object, got 3",
            ),
            (with("tool_choice", json!("auto")), "tool_choice.type must be auto, any, tool or none, got null"),
            (
                with("output_config", json!({"format": {"type": "xml"}})),
                "output_config.format.type must be json_schema, got \"xml\"",
            ),
        ] {
            assert_eq!(parse(request, true).err().as_deref(), Some(fault));
        }
        let fields = Fields::parse(&user(json!("x")).to_string().into()).unwrap();
        let missing = Ask::parse(fields, &GenerationDefaults::default(), true).err().map(|e| e.to_string());
        assert_eq!(missing.as_deref(), Some("max_tokens is missing"));
    }
}
