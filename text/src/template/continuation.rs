//! Prompts that end within the last message, as `apply_chat_template(continue_final_message=True)` of transformers makes them.

use serde_json::Value as Json;

use super::ChatInput;
use crate::TextError;

/// Marks the end of the message's text in the rendered prompt. transformers uses the same tag. If the template trims the
/// message, the space at the end of the tag is missing.
const TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// Renders the messages with `render`, and cuts the prompt after the text of the last message.
pub(super) fn render(
    input: &ChatInput<'_>,
    render: impl FnOnce(&ChatInput<'_>) -> Result<String, TextError>,
) -> Result<String, TextError> {
    let invalid = |what: &str| TextError::Template(what.into());
    let mut messages = input.messages.to_vec();
    let text = messages.last_mut().and_then(|message| last_text(message.get_mut("content")?));
    let text = text.ok_or_else(|| invalid("continue_final_message needs a last message with a text"))?;
    let wanted = text.trim().to_owned();
    *text += TAG;
    let mut prompt = render(&ChatInput { messages: &messages, ..*input })?;
    let tag = prompt.rfind(TAG.trim_end()).filter(|_| prompt.contains(&wanted));
    let tag =
        tag.ok_or_else(|| invalid("it does not write the whole last message, so continue_final_message can't work"))?;
    let is_trimmed = !prompt[tag..].starts_with(TAG);
    prompt.truncate(tag);
    if is_trimmed {
        prompt.truncate(prompt.trim_end().len());
    }
    Ok(prompt)
}

/// The text of a message's content: a text, or the last part that has a text.
fn last_text(content: &mut Json) -> Option<&mut String> {
    match content {
        Json::String(text) => Some(text),
        Json::Array(parts) => parts.iter_mut().rev().find_map(|part| match part.get_mut("text") {
            Some(Json::String(text)) => Some(text),
            _ => None,
        }),
        _ => None,
    }
}
