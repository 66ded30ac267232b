//! The tools of a chat request, and which of them the model may or must call.

use overfill_kv::{Grammar, sampling::MAX_GRAMMAR_BYTES};
use overfill_text::{AnswerFormat, ToolFormat};
use serde_json::{Value, json};

use super::fields::Fields;
use crate::{GenerateError, node::ServedModel, settings::RequestSettings};

/// Maximum number of tools, as in OpenAI's API.
const MAX_TOOLS: usize = 128;
/// Maximum size of a tool as JSON text.
const MAX_TOOL_BYTES: usize = 64 << 10;
/// Maximum length of a function's name, as in OpenAI's API.
const MAX_NAME_BYTES: usize = 64;

/// The tools of a request.
#[derive(Clone, Debug)]
pub struct Tools {
    /// The definitions as the client sent them, for the chat template. `None` if there are none.
    pub definitions: Option<Value>,
    functions: Vec<Function>,
    choice: ToolChoice,
    parallel: bool,
}

#[derive(Clone, Debug)]
struct Function {
    name: String,
    /// JSON schema of the arguments.
    parameters: Value,
}

/// Which functions the model may call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolChoice {
    /// Any or none, as the model likes.
    Auto,
    /// None: the answer is text.
    None,
    /// At least one.
    Required,
    /// The one with this name.
    Function(String),
}

impl Tools {
    /// Takes `tools`, `tool_choice` and `parallel_tool_calls` in the format of chat completions.
    pub fn take(fields: &mut Fields) -> Result<Self, GenerateError> {
        let definitions = fields.take::<Vec<Value>>("tools")?.unwrap_or_default();
        let choice = fields.take::<Value>("tool_choice")?.as_ref().map(ToolChoice::parse).transpose()?;
        Self::new(definitions, choice, fields.take("parallel_tool_calls")?.unwrap_or(true))
    }

    /// Checks tools. `definitions`: in the format of chat completions. `choice`: `None` is auto. `parallel`: whether there may
    /// be several calls in one answer.
    pub fn new(definitions: Vec<Value>, choice: Option<ToolChoice>, parallel: bool) -> Result<Self, GenerateError> {
        if definitions.len() > MAX_TOOLS {
            return Err(GenerateError::limit("tools", format!("at most {MAX_TOOLS} tools"), definitions.len()));
        }
        let functions = definitions.iter().enumerate().map(|(i, tool)| Function::parse(&format!("tools[{i}]"), tool));
        let functions = functions.collect::<Result<Vec<_>, _>>()?;
        let choice = choice.unwrap_or(ToolChoice::Auto);
        match &choice {
            ToolChoice::Required | ToolChoice::Function(_) if functions.is_empty() => {
                return Err(GenerateError::invalid("tool_choice", "tool_choice needs tools, got none"));
            }
            ToolChoice::Function(name) if !functions.iter().any(|function| function.name == *name) => {
                return Err(GenerateError::limit("tool_choice.function.name", "the name of one of the tools", name));
            }
            _ => {}
        }
        let definitions = (!definitions.is_empty()).then(|| definitions.into());
        Ok(Self { definitions, functions, choice, parallel })
    }

    /// Whether the model must call a function.
    fn is_forced(&self) -> bool {
        matches!(self.choice, ToolChoice::Required | ToolChoice::Function(_))
    }

    /// Completes `format` with how calls are written and who can be called. `template`: the request's own chat template.
    pub fn complete(
        &self,
        format: AnswerFormat,
        template: Option<&str>,
        model: &ServedModel,
        settings: &RequestSettings,
    ) -> Result<AnswerFormat, GenerateError> {
        if self.functions.is_empty() || self.choice == ToolChoice::None {
            return Ok(format);
        }
        let known = match settings.tool_parsers.of(&model.name) {
            Some(given) => given,
            None => match template.map_or(model.text.tool_format(), ToolFormat::of_template) {
                None if !self.is_forced() => {
                    let fault = "tools: the format in which this model calls tools is not known; the router's \
                                 --tool-call-parser names it";
                    return Err(GenerateError::invalid("tools", fault));
                }
                found => found,
            },
        };
        let tools = match known {
            // A grammar says what the model writes. Python's syntax has no grammar for JSON schemas, so it writes JSON.
            None | Some(ToolFormat::Pythonic) if self.is_forced() => Some(ToolFormat::Llama3Json),
            known => known,
        };
        let functions = self.functions.iter().map(|function| function.name.clone()).collect();
        Ok(AnswerFormat { tools, functions, only_one_call: !self.parallel, ..format })
    }

    /// The schemas that the answer must match, each with its field in the request.
    pub fn schemas(&self) -> Vec<(String, Grammar)> {
        let field = |i: usize| format!("tools[{i}].function.parameters");
        self.forced().map(|(i, function)| (field(i), Grammar::Json(function.parameters.to_string()))).collect()
    }

    /// The grammar of the answer, if the model must call a function.
    pub fn grammar(&self, format: &AnswerFormat, model: &ServedModel) -> Result<Option<Grammar>, GenerateError> {
        let functions: Vec<(&str, &Value)> = self.forced().map(|(_, f)| (f.name.as_str(), &f.parameters)).collect();
        if functions.is_empty() {
            return Ok(None);
        }
        let grammar = model.text.call_grammar(format, &functions);
        if grammar.bytes() > MAX_GRAMMAR_BYTES {
            let limit = format!("at most {MAX_GRAMMAR_BYTES} bytes together if one of them must be called");
            return Err(GenerateError::limit("tools", limit, grammar.bytes()));
        }
        Ok(Some(grammar))
    }

    /// The functions of which the model must call one, with their places in the list of tools.
    fn forced(&self) -> impl Iterator<Item = (usize, &Function)> {
        self.functions.iter().enumerate().filter(|(_, function)| match &self.choice {
            ToolChoice::Required => true,
            ToolChoice::Function(name) => function.name == *name,
            ToolChoice::Auto | ToolChoice::None => false,
        })
    }
}

impl ToolChoice {
    /// Parses `tool_choice` of chat completions.
    pub fn parse(value: &Value) -> Result<Self, GenerateError> {
        let named = || (value["type"] == "function").then(|| value["function"]["name"].as_str()).flatten();
        match value.as_str() {
            Some("auto") => Ok(Self::Auto),
            Some("none") => Ok(Self::None),
            Some("required") => Ok(Self::Required),
            Some(_) => Err(Self::fault(value)),
            None => named().map(|name| Self::Function(name.to_owned())).ok_or_else(|| Self::fault(value)),
        }
    }

    fn fault(value: &Value) -> GenerateError {
        let limit = r#""auto", "none", "required" or {"type": "function", "function": {"name": ".."}}"#;
        GenerateError::limit("tool_choice", limit, value)
    }
}

impl Function {
    fn parse(at: &str, tool: &Value) -> Result<Self, GenerateError> {
        let limit =
            |field: &str, limit: &str, value: &Value| Err(GenerateError::limit(&format!("{at}{field}"), limit, value));
        let bytes = tool.to_string().len();
        if bytes > MAX_TOOL_BYTES {
            return Err(GenerateError::limit(at, format!("at most {MAX_TOOL_BYTES} bytes of JSON"), bytes));
        }
        if !tool.is_object() {
            return limit("", "an object", tool);
        }
        if tool["type"] != "function" {
            return limit(".type", "\"function\"", &tool["type"]);
        }
        let function = &tool["function"];
        let plain = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'-');
        let is_name = |name: &&str| (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(plain);
        let Some(name) = function["name"].as_str().filter(is_name) else {
            return limit(".function.name", "1 to 64 letters, digits, _ or -", &function["name"]);
        };
        if !(function["description"].is_null() || function["description"].is_string()) {
            return limit(".function.description", "a string", &function["description"]);
        }
        let parameters = match &function["parameters"] {
            Value::Null => json!({"type": "object", "properties": {}}),
            schema @ Value::Object(_) => schema.clone(),
            other => return limit(".function.parameters", "a JSON schema, which is an object", other),
        };
        Ok(Self { name: name.to_owned(), parameters })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(json: Value) -> Result<Tools, GenerateError> {
        Tools::take(&mut Fields::parse(&json.to_string().into()).unwrap())
    }

    fn tool(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}, "strict": true}})
    }

    #[test]
    fn choices() {
        let choice = |json: Value| take(json).unwrap().choice;
        assert_eq!(choice(json!({})), ToolChoice::Auto);
        assert_eq!(choice(json!({"tools": [tool("a")], "tool_choice": "none"})), ToolChoice::None);
        assert_eq!(choice(json!({"tools": [tool("a")], "tool_choice": "required"})), ToolChoice::Required);
        let named = json!({"type": "function", "function": {"name": "a"}});
        assert_eq!(choice(json!({"tools": [tool("a")], "tool_choice": named})), ToolChoice::Function("a".into()));
        assert_eq!(take(json!({"tools": []})).unwrap().definitions, None);
        assert_eq!(take(json!({"tools": [tool("a")]})).unwrap().definitions, Some(json!([tool("a")])));
    }

    #[test]
    fn faults_name_the_field() {
        let many: Vec<Value> = (0..129).map(|i| tool(&format!("f{i}"))).collect();
        let long = json!({"type": "function", "function": {"name": "a", "description": "x".repeat(70_000)}});
        let function = |function: Value| json!({"tools": [tool("a"), {"type": "function", "function": function}]});
        for (request, field, fault) in [
            (json!({"tools": many}), "tools", "at most 128 tools, got 129"),
            (json!({"tools": {}}), "tools", "invalid type: map, expected a sequence"),
            (json!({"tools": [3]}), "tools[0]", "must be an object, got 3"),
            (json!({"tools": [{"type": "web_search"}]}), "tools[0].type", "must be \"function\", got \"web_search\""),
            (json!({"tools": [long]}), "tools[0]", "at most 65536 bytes of JSON, got 70"),
            (
                function(json!({"name": "a b"})),
                "tools[1].function.name",
                "1 to 64 letters, digits, _ or -, got \"a b\"",
            ),
            (function(json!({})), "tools[1].function.name", "got null"),
            (function(json!({"name": "a".repeat(65)})), "tools[1].function.name", "got \"aaa"),
            (function(json!({"name": "a", "parameters": []})), "tools[1].function.parameters", "an object, got []"),
            (function(json!({"name": "a", "description": 3})), "tools[1].function.description", "a string, got 3"),
            (json!({"tool_choice": "required"}), "tool_choice", "needs tools"),
            (json!({"tool_choice": "always"}), "tool_choice", "got \"always\""),
            (json!({"tool_choice": {"type": "allowed_tools"}}), "tool_choice", "\"required\" or"),
            (
                json!({"tools": [tool("a")], "tool_choice": {"type": "function", "function": {"name": "b"}}}),
                "tool_choice.function.name",
                "the name of one of the tools, got b",
            ),
        ] {
            let error = take(request).unwrap_err();
            assert!(matches!(&error, GenerateError::Invalid { field: Some(named), .. } if named == field), "{error}");
            let error = error.to_string();
            assert!(error.starts_with(field) && error.contains(fault), "{error}");
        }
    }
}
