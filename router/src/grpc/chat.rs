//! Chats over gRPC: from and to the types that the HTTP API uses as well.

use overfill_proto::v1::{self, answer_part, tool_choice};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::{
    GenerateError,
    openai::{
        answer::AnswerEvent,
        conversation::{Conversation, TemplateFields},
        tools::{ToolChoice, Tools},
    },
    settings::RequestSettings,
};

/// Checks a chat. Errors name the field, like `messages[3].tool_calls[0].function.name` in the HTTP API.
pub fn conversation(wire: v1::Messages, settings: &RequestSettings) -> Result<Conversation, GenerateError> {
    let v1::Messages {
        messages,
        tools,
        tool_choice,
        single_tool_call,
        chat_template_kwargs,
        documents,
        continue_final_message,
        chat_template,
    } = wire;
    let tools = tools.into_iter().enumerate().map(|(i, tool)| definition(i, tool)).collect::<Result<_, _>>()?;
    let choice = tool_choice.and_then(|choice| choice.choice).map(choice_of).transpose()?;
    let extras = TemplateFields {
        add_generation_prompt: !continue_final_message,
        continue_final_message,
        template: (!chat_template.is_empty()).then_some(chat_template),
        variables: json_text("chat_template_kwargs", &chat_template_kwargs)?.unwrap_or_default(),
        documents: json_text("documents", &documents)?,
    };
    let messages = messages.into_iter().map(message).collect();
    Conversation::new(messages, Tools::new(tools, choice, !single_tool_call)?, extras, settings)
}

/// Parses a field that has JSON text; `None` if it is empty.
fn json_text<T: DeserializeOwned>(field: &str, text: &str) -> Result<Option<T>, GenerateError> {
    if text.is_empty() {
        return Ok(None);
    }
    serde_json::from_str(text).map(Some).map_err(|e| GenerateError::invalid(field, format!("{field}: {e}")))
}

/// A tool as the HTTP API has it.
fn definition(index: usize, tool: v1::Tool) -> Result<Value, GenerateError> {
    let v1::Tool { name, description, parameters } = tool;
    let mut function = Map::from_iter([("name".to_owned(), Value::from(name))]);
    if !description.is_empty() {
        function.insert("description".into(), description.into());
    }
    if let Some(parameters) = json_text(&format!("tools[{index}].function.parameters"), &parameters)? {
        function.insert("parameters".into(), parameters);
    }
    Ok(json!({"type": "function", "function": function}))
}

fn choice_of(choice: tool_choice::Choice) -> Result<ToolChoice, GenerateError> {
    match choice {
        tool_choice::Choice::Function(name) => Ok(ToolChoice::Function(name)),
        tool_choice::Choice::Mode(mode) => match tool_choice::Mode::try_from(mode) {
            Ok(tool_choice::Mode::Auto) => Ok(ToolChoice::Auto),
            Ok(tool_choice::Mode::None) => Ok(ToolChoice::None),
            Ok(tool_choice::Mode::Required) => Ok(ToolChoice::Required),
            Err(_) => Err(GenerateError::limit("tool_choice.mode", "a known mode", mode)),
        },
    }
}

/// A message as the HTTP API has it.
fn message(wire: v1::Message) -> Value {
    let v1::Message { role, content, tool_calls, tool_call_id, name, reasoning_content } = wire;
    let mut message = Map::from_iter([("role".to_owned(), role.into()), ("content".into(), content.into())]);
    let call = |v1::ToolCall { id, name, arguments }| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
    if !tool_calls.is_empty() {
        message.insert("tool_calls".into(), tool_calls.into_iter().map(call).collect());
    }
    for (field, text) in [("tool_call_id", tool_call_id), ("name", name), ("reasoning_content", reasoning_content)] {
        if !text.is_empty() {
            message.insert(field.into(), text.into());
        }
    }
    message.into()
}

/// The wire form of what a text adds to an answer.
pub fn parts(events: Vec<AnswerEvent>) -> Vec<v1::AnswerPart> {
    let part = |event| match event {
        AnswerEvent::Reasoning(text) => Some(answer_part::Part::Reasoning(text)),
        AnswerEvent::Content(text) => Some(answer_part::Part::Content(text)),
        AnswerEvent::CallStart { index: _, id, name } => {
            Some(answer_part::Part::ToolCall(v1::ToolCall { id, name, arguments: String::new() }))
        }
        AnswerEvent::CallArguments { index: _, fragment } => Some(answer_part::Part::ToolCallArguments(fragment)),
        AnswerEvent::CallEnd { index: _ } => None,
    };
    events.into_iter().filter_map(part).map(|part| v1::AnswerPart { part: Some(part) }).collect()
}
