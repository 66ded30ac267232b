//! What a chat answer is made of: reasoning, content and tool calls, found in the streamed text of a model.
//!
//! Everything here is a state machine over characters, so it does not matter how the text is cut into fragments. Nothing
//! of an answer is lost: what turns out not to be a tool call is content. Only layout is dropped: the markers, line breaks
//! around reasoning, and white space next to tool calls.

mod call;
mod formats;
pub(crate) mod grammar;
mod json;
mod python;
mod reasoning;
mod sink;
mod text;

use std::sync::Arc;

pub use formats::{ReasoningFormat, ReasoningPosition, ToolFormat};

use self::{reasoning::Reasoning, sink::Sink, text::CallText};

/// A part of an answer. Parts come in the order of the text. Neighbours of the same kind belong together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AnswerPart {
    /// Text that the model wrote to think. Not part of the answer proper.
    Reasoning(String),
    /// Text of the answer.
    Content(String),
    /// A tool call begins.
    CallStart {
        /// The name of the function.
        name: String,
    },
    /// A fragment of the call's arguments, which together are JSON text. They may be incomplete if the answer was cut off,
    /// or if the model wrote something that is not JSON.
    CallArguments(String),
    /// The tool call ends.
    CallEnd,
}

/// What to look for in an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AnswerFormat {
    /// How reasoning is marked. `None`: all text is content.
    pub reasoning: Option<ReasoningFormat>,
    /// Whether the prompt ends within the reasoning, because the chat template has opened it.
    pub reasoning_is_open: bool,
    /// How tool calls are written. `None`: they stay text.
    pub tools: Option<ToolFormat>,
    /// Names of the functions that may be called. Formats without a marker take only calls of these for calls.
    pub functions: Arc<[String]>,
    /// Whether calls after the first one are dropped.
    pub only_one_call: bool,
}

impl AnswerFormat {
    /// The texts that mark parts of an answer. If one of them is a special token, it must not be left out of the text.
    pub fn markers(&self) -> impl Iterator<Item = &'static str> + use<> {
        let reasoning = self.reasoning.map_or(&[][..], ReasoningFormat::markers);
        reasoning.iter().chain(self.tools.map_or(&[][..], ToolFormat::markers)).copied()
    }
}

/// Finds the parts of one answer. Reasoning comes first, and tool calls are looked for only after it.
pub struct AnswerParser {
    reasoning: Option<Reasoning>,
    calls: Option<CallText>,
    sink: Sink,
}

impl AnswerParser {
    /// A parser of one answer.
    pub fn new(format: &AnswerFormat) -> Self {
        let AnswerFormat { reasoning, reasoning_is_open, tools, functions, only_one_call } = format;
        Self {
            reasoning: reasoning.map(|format| Reasoning::new(format, *reasoning_is_open)),
            calls: tools.map(CallText::new),
            sink: Sink::new(functions.clone(), *only_one_call),
        }
    }

    /// Adds text and returns the parts that have become certain.
    pub fn push(&mut self, text: &str) -> Vec<AnswerPart> {
        let Self { reasoning, calls, sink } = self;
        let Some(reasoning) = reasoning else {
            content(calls, sink, text);
            return sink.take();
        };
        for (at, c) in text.char_indices() {
            if reasoning.is_over() {
                content(calls, sink, &text[at..]);
                break;
            }
            let passed_on = reasoning.push(c, sink);
            content(calls, sink, &passed_on);
        }
        sink.take()
    }

    /// Ends the answer and returns what was held back.
    pub fn finish(&mut self) -> Vec<AnswerPart> {
        let Self { reasoning, calls, sink } = self;
        if let Some(reasoning) = reasoning {
            let passed_on = reasoning.finish(sink);
            content(calls, sink, &passed_on);
        }
        if let Some(calls) = calls {
            calls.finish(sink);
        }
        sink.finish();
        sink.take()
    }
}

/// Adds text after the reasoning.
fn content(calls: &mut Option<CallText>, sink: &mut Sink, text: &str) {
    match calls {
        Some(calls) => text.chars().for_each(|c| calls.push(c, sink)),
        None => sink.plain(text),
    }
}

#[cfg(test)]
mod tests;
