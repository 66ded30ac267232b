//! What a request to the Responses API asks for.

use overfill_kv::Grammar;
use overfill_text::GenerationDefaults;
use serde_json::{Map, Value, json};

use crate::{
    GenerateError,
    openai::{
        conversation::{Asked, Conversation},
        fields::{Common, Fields},
        history::{History, shown, string, text},
        structured,
        tools::{ToolChoice, Tools},
    },
    prompt::ChatPrompt,
};

/// Unsupported fields that would change the answer, with the values that are accepted because they ask for nothing.
const UNSUPPORTED: &[(&str, &str)] = &[
    ("background", "false"),
    ("prompt", "null"),
    ("truncation", "\"disabled\""),
    ("context_management", "[]"),
    ("moderation", "null"),
    ("chat_template", "null"),
    ("chat_template_kwargs", "{}"),
    ("prompt_logprobs", "null"),
];
/// Fields that name what a server has stored.
const STORED: [&str; 2] = ["previous_response_id", "conversation"];
/// The item of `include` that asks for log-probabilities.
const LOGPROBS: &str = "message.output_text.logprobs";
/// Types of the parts of a message.
const TEXTS: [&str; 4] = ["input_text", "output_text", "text", "refusal"];

/// A request.
pub struct Ask {
    /// How to answer.
    pub asked: Asked,
    /// What to answer.
    pub conversation: Conversation,
    /// Fields of the request that its answer repeats.
    pub echo: Map<String, Value>,
}

impl Ask {
    /// Takes every field except `model`.
    pub fn parse(mut fields: Fields, defaults: &GenerationDefaults) -> Result<Self, GenerateError> {
        for name in STORED {
            if fields.has(name) {
                let fault =
                    format!("{name} is not supported: nothing is stored here, so send the earlier items in input");
                return Err(GenerateError::invalid(name, fault));
            }
        }
        let mut common = Common::take(&mut fields, defaults)?;
        if common.n != 1 {
            return Err(GenerateError::limit("n", "1", common.n));
        }
        let max_tokens = fields.take_count("max_output_tokens")?;
        if max_tokens == Some(0) {
            return Err(GenerateError::limit("max_output_tokens", "at least 1", 0));
        }
        let includes = fields.take::<Vec<String>>("include")?.unwrap_or_default();
        let with_logprobs = includes.iter().any(|include| include == LOGPROBS);
        let top_logprobs = fields.take_count("top_logprobs")?;
        if top_logprobs.is_some_and(|n| n > 0) && !with_logprobs {
            return Err(GenerateError::invalid("top_logprobs", format!("top_logprobs needs {LOGPROBS} in include")));
        }
        let format = fields.take::<Value>("text")?.unwrap_or_else(|| json!({"format": {"type": "text"}}));
        if let Some(grammar) = grammar(&format["format"])? {
            common.match_also("text.format", grammar)?;
        }
        let reasoning = fields.take::<Value>("reasoning")?.unwrap_or_else(|| json!({"effort": null, "summary": null}));
        let variables = effort(&reasoning)?;

        let instructions: Option<String> = fields.take("instructions")?;
        let mut history = History::default();
        if let Some(instructions) = &instructions {
            history.system(instructions);
        }
        match fields.take::<Value>("input")? {
            Some(Value::String(text)) => history.user(&text),
            Some(Value::Array(items)) if !items.is_empty() => {
                for (i, item) in items.iter().enumerate() {
                    add(&mut history, &format!("input[{i}]"), item)?;
                }
            }
            Some(other) => {
                return Err(GenerateError::limit("input", "a string or a list of at least one item", shown(&other)));
            }
            None => return Err(GenerateError::invalid("input", "input is missing")),
        }

        let definitions = fields.take::<Vec<Value>>("tools")?.unwrap_or_default();
        let chosen = fields.take::<Value>("tool_choice")?.unwrap_or_else(|| json!("auto"));
        let parallel = fields.take("parallel_tool_calls")?.unwrap_or(true);
        let tools = Tools::new(definitions.iter().map(definition).collect(), Some(choice(&chosen)?), parallel)
            .map_err(renamed)?;

        let mut echo = Map::new();
        echo.insert("instructions".into(), json!(instructions));
        echo.insert("max_output_tokens".into(), json!(max_tokens));
        echo.insert("metadata".into(), fields.take("metadata")?.unwrap_or_else(|| json!({})));
        echo.insert("parallel_tool_calls".into(), json!(parallel));
        echo.insert("previous_response_id".into(), Value::Null);
        echo.insert("reasoning".into(), reasoning);
        // Whatever the request says, nothing is stored.
        echo.insert("store".into(), json!(false));
        echo.insert("temperature".into(), json!(common.sampling.temperature));
        echo.insert("text".into(), format);
        echo.insert("tool_choice".into(), chosen);
        echo.insert("tools".into(), json!(definitions));
        echo.insert("top_logprobs".into(), json!(top_logprobs.unwrap_or(0)));
        echo.insert("top_p".into(), json!(common.sampling.top_p));
        echo.insert("truncation".into(), json!("disabled"));
        echo.insert("user".into(), fields.take("user")?.unwrap_or_default());
        fields.finish_without(UNSUPPORTED)?;

        let logprobs = with_logprobs.then_some(top_logprobs.unwrap_or(0));
        let chat = ChatPrompt {
            messages: history.messages(),
            tools: tools.definitions.clone(),
            variables,
            ..ChatPrompt::new(std::iter::empty())
        };
        Ok(Self {
            asked: Asked {
                common,
                max_tokens,
                at_most_tokens: None,
                logprobs,
                prompt_logprobs: false,
                add_special: false,
            },
            conversation: Conversation { chat, tools },
            echo,
        })
    }
}

/// A fault of a tool, with the names of this API.
pub fn renamed(e: GenerateError) -> GenerateError {
    e.renamed(".function", "")
}

/// Adds an item of the input.
fn add(history: &mut History, at: &str, item: &Value) -> Result<(), GenerateError> {
    let kind = match &item["type"] {
        Value::Null if item["role"].is_string() => "message",
        kind => kind.as_str().unwrap_or_default(),
    };
    match kind {
        "message" => {
            let content = text(&format!("{at}.content"), &item["content"], &TEXTS)?;
            match string(at, item, "role")? {
                "user" => history.user(&content),
                "assistant" => history.assistant(&content),
                // Templates know only the older name.
                "system" | "developer" => history.system(&content),
                other => {
                    let limit = "user, assistant, system or developer";
                    return Err(GenerateError::limit(&format!("{at}.role"), limit, shown(&json!(other))));
                }
            }
        }
        "function_call" => {
            let arguments = string(at, item, "arguments")?;
            history.call(string(at, item, "call_id")?, string(at, item, "name")?, arguments.into());
        }
        "function_call_output" => {
            let output = text(&format!("{at}.output"), &item["output"], &TEXTS)?;
            history.result(string(at, item, "call_id")?, &output);
        }
        "reasoning" => {
            let full = text(&format!("{at}.content"), &item["content"], &["reasoning_text"])?;
            let summary = text(&format!("{at}.summary"), &item["summary"], &["summary_text"])?;
            let reasoning = if full.is_empty() { summary } else { full };
            if !reasoning.is_empty() {
                history.reasoning(&reasoning);
            }
        }
        _ => {
            let limit = "message, function_call, function_call_output or reasoning";
            return Err(GenerateError::limit(&format!("{at}.type"), limit, shown(&item["type"])));
        }
    }
    Ok(())
}

/// A tool in the form of chat completions, which is the one that templates take. Other tools than functions stay as they are,
/// and are refused with the others' faults.
fn definition(tool: &Value) -> Value {
    if tool["type"] != "function" {
        return tool.clone();
    }
    let fields = ["name", "description", "parameters"].into_iter();
    let given = fields.filter_map(|name| Some((name.to_owned(), tool.get(name)?.clone())));
    json!({"type": "function", "function": given.collect::<Map<_, _>>()})
}

fn choice(value: &Value) -> Result<ToolChoice, GenerateError> {
    let named = || (value["type"] == "function").then(|| value["name"].as_str()).flatten();
    match (value.as_str(), named()) {
        (Some("auto"), _) => Ok(ToolChoice::Auto),
        (Some("none"), _) => Ok(ToolChoice::None),
        (Some("required"), _) => Ok(ToolChoice::Required),
        (_, Some(name)) => Ok(ToolChoice::Function(name.to_owned())),
        _ => {
            let limit = r#""auto", "none", "required" or {"type": "function", "name": ".."}"#;
            Err(GenerateError::limit("tool_choice", limit, shown(value)))
        }
    }
}

/// What the answer must match because of `text.format`.
fn grammar(format: &Value) -> Result<Option<Grammar>, GenerateError> {
    match (&format["type"], &format["schema"]) {
        (Value::Null, _) if format.is_null() => Ok(None),
        (Value::String(kind), _) if kind == "text" => Ok(None),
        (Value::String(kind), _) if kind == "json_object" => Ok(Some(structured::any_object())),
        (Value::String(kind), Value::Object(_)) if kind == "json_schema" => {
            Ok(Some(Grammar::Json(format["schema"].to_string())))
        }
        (Value::String(kind), other) if kind == "json_schema" => {
            Err(GenerateError::limit("text.format.schema", "a JSON schema, which is an object", shown(other)))
        }
        (other, _) => Err(GenerateError::limit("text.format.type", "text, json_object or json_schema", shown(other))),
    }
}

/// The variables of chat templates for `reasoning.effort`.
fn effort(reasoning: &Value) -> Result<Map<String, Value>, GenerateError> {
    let mut variables = Map::new();
    match &reasoning["effort"] {
        Value::Null => {}
        Value::String(effort) => {
            if effort == "none" {
                variables.insert("enable_thinking".into(), json!(false));
            }
            variables.insert("reasoning_effort".into(), json!(effort));
        }
        other => return Err(GenerateError::limit("reasoning.effort", "a string", shown(other))),
    }
    Ok(variables)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(request: Value) -> Result<Ask, String> {
        let fields = Fields::parse(&request.to_string().into()).unwrap();
        Ask::parse(fields, &GenerationDefaults::default()).map_err(|e| e.to_string())
    }

    #[test]
    fn items_become_messages() {
        let ask = parse(json!({
            "instructions": "Be brief.",
            "input": [
                {"role": "developer", "content": "Rhyme."},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"},
                                                                {"type": "input_text", "text": "b"}]},
                {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": null,
                 "content": [{"type": "reasoning_text", "text": "Hm."}]},
                {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
                 "content": [{"type": "output_text", "text": "c", "annotations": [], "logprobs": []}]},
                {"type": "function_call", "id": "fc_1", "call_id": "x", "name": "f", "arguments": "{\"a\": 1}"},
                {"type": "function_call_output", "call_id": "x", "output": "42"},
            ],
            "reasoning": {"effort": "none"}, "store": true, "include": ["reasoning.encrypted_content"],
        }))
        .unwrap();
        let call = json!({"id": "x", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}});
        let wanted = json!([
            {"role": "system", "content": "Be brief.\n\nRhyme."},
            {"role": "user", "content": "a\nb"},
            {"role": "assistant", "content": "c", "reasoning": "Hm.", "reasoning_content": "Hm.", "tool_calls": [call]},
            {"role": "tool", "content": "42", "tool_call_id": "x", "name": "f"},
        ]);
        assert_eq!(json!(ask.conversation.chat.messages), wanted);
        let variables = json!({"enable_thinking": false, "reasoning_effort": "none"});
        assert_eq!(Value::from(ask.conversation.chat.variables), variables);
        assert!(ask.conversation.chat.add_generation_prompt);
        assert_eq!((&ask.echo["store"], &ask.echo["tool_choice"]), (&json!(false), &json!("auto")));
    }

    #[test]
    fn tools_and_formats() {
        let tool = json!({"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": true});
        let ask =
            parse(json!({"input": "x", "tools": [tool], "tool_choice": {"type": "function", "name": "f"}})).unwrap();
        let function = json!({"name": "f", "description": "d", "parameters": {"type": "object"}});
        assert_eq!(ask.conversation.chat.tools, Some(json!([{"type": "function", "function": function}])));
        assert_eq!(ask.echo["tools"], json!([tool]));
        let grammar = |format: Value| {
            parse(json!({"input": "x", "text": {"format": format}})).map(|ask| ask.asked.common.sampling.grammar)
        };
        assert_eq!(grammar(json!({"type": "text"})), Ok(None));
        assert_eq!(grammar(json!({"type": "json_object"})), Ok(Some(structured::any_object())));
        let schema = json!({"type": "json_schema", "name": "n", "schema": {"type": "integer"}});
        assert_eq!(grammar(schema), Ok(Some(Grammar::Json("{\"type\":\"integer\"}".into()))));
    }

    #[test]
    fn faults_name_the_field() {
        let item = |item: Value| json!({"input": [{"role": "user", "content": "x"}, item]});
        let stored = "is not supported: nothing is stored here, so send the earlier items in input";
        for (request, fault) in [
            (json!({}), "input is missing"),
            (json!({"input": []}), "input must be a string or a list of at least one item, got []"),
            (json!({"input": "x", "previous_response_id": "resp_1"}), &format!("previous_response_id {stored}")),
            (json!({"input": "x", "conversation": "conv_1"}), &format!("conversation {stored}")),
            (json!({"input": "x", "background": true}), "background is not supported"),
            (json!({"input": "x", "truncation": "auto"}), "truncation is not supported"),
            (json!({"input": "x", "n": 2}), "n must be 1, got 2"),
            (json!({"input": "x", "max_output_tokens": 0}), "max_output_tokens must be at least 1, got 0"),
            (json!({"input": "x", "top_logprobs": 2}), "top_logprobs needs message.output_text.logprobs in include"),
            (
                json!({"input": "x", "tools": [{"type": "web_search"}]}),
                "tools[0].type must be \"function\", got \"web_search\"",
            ),
            (
                json!({"input": "x", "tools": [{"type": "function", "name": "a b"}]}),
                "tools[0].name must be 1 to 64 letters, digits, _ or -, got \"a b\"",
            ),
            (
                json!({"input": "x", "tool_choice": {"type": "allowed_tools"}}),
                "tool_choice must be \"auto\", \"none\", \"required\" or {\"type\": \"function\", \"name\": \"..\"}, \
                 got {\"type\":\"allowed_tools\"}",
            ),
            (
                json!({"input": "x", "text": {"format": {"type": "json_schema", "name": "n"}}}),
                "text.format.schema must be a JSON schema, which is an object, got null",
            ),
            (
                item(json!({"type": "item_reference", "id": "x"})),
                "input[1].type must be message, function_call, function_call_output or reasoning, got \"item_reference\"",
            ),
            (
                item(json!(3)),
                "input[1].type must be message, function_call, function_call_output or reasoning, got null",
            ),
            (
                item(json!({"role": "user", "content": [{"type": "input_image", "image_url": "u"}]})),
                "input[1].content[0] must be a part of type input_text or output_text or text or refusal, got \"input_image\"",
            ),
            (
                item(json!({"role": "tool", "content": "x"})),
                "input[1].role must be user, assistant, system or developer, got \"tool\"",
            ),
            (
                item(json!({"type": "function_call", "arguments": "{}", "name": "f"})),
                "input[1].call_id must be a string, got null",
            ),
        ] {
            assert_eq!(parse(request).err().as_deref(), Some(fault));
        }
    }
}
