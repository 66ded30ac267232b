//! What a chat answer is made of, as a stream of events that each API writes in its own format.

use overfill_text::{AnswerFormat, AnswerParser, AnswerPart, ToolFormat};
use rand::{Rng as _, distr::Alphanumeric};

use super::batch::Choice;
use crate::request::{Finished, Output};

/// Length of the ids of Mistral's calls. Its templates accept no others.
const MISTRAL_ID_BYTES: usize = 9;

/// The next piece of an answer. Neighbours of the same kind belong together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AnswerEvent {
    /// More of the model's reasoning.
    Reasoning(String),
    /// More of the text.
    Content(String),
    /// A tool call begins. Its arguments follow.
    CallStart {
        /// Number of the call in the answer, from 0.
        index: usize,
        /// Id of the call.
        id: String,
        /// The name of the function.
        name: String,
    },
    /// More of a call's arguments, which together are JSON text.
    CallArguments {
        /// Number of the call.
        index: usize,
        /// The next fragment.
        fragment: String,
    },
    /// A call has ended.
    CallEnd {
        /// Number of the call.
        index: usize,
    },
}

/// Reads the answer of one choice while it is generated.
pub struct AnswerReader {
    parser: AnswerParser,
    is_mistral: bool,
    /// Number of calls that have begun.
    calls: usize,
}

impl AnswerReader {
    /// A reader of an answer from its beginning.
    pub fn new(format: &AnswerFormat) -> Self {
        let is_mistral = format.tools == Some(ToolFormat::Mistral);
        Self { parser: AnswerParser::new(format), is_mistral, calls: 0 }
    }

    /// The events that an output adds.
    pub fn take(&mut self, output: &Output) -> Vec<AnswerEvent> {
        match output {
            Output::PromptLogprobs(_) => Vec::new(),
            Output::Token { text, .. } => self.push(text),
            Output::Finished(finished) => {
                let mut events = self.push(&finished.text);
                events.extend(self.finish());
                events
            }
        }
    }

    /// Why the answer ended: `tool_calls` if the model has called tools, not just stopped.
    pub fn finish_reason(&self, finished: &Finished) -> &'static str {
        match finished.reason.as_str() {
            "stop" if self.calls > 0 => "tool_calls",
            other => other,
        }
    }

    fn push(&mut self, text: &str) -> Vec<AnswerEvent> {
        let parts = self.parser.push(text);
        parts.into_iter().map(|part| self.event(part)).collect()
    }

    fn finish(&mut self) -> Vec<AnswerEvent> {
        let parts = self.parser.finish();
        parts.into_iter().map(|part| self.event(part)).collect()
    }

    fn event(&mut self, part: AnswerPart) -> AnswerEvent {
        let index = self.calls.saturating_sub(1);
        match part {
            AnswerPart::Reasoning(text) => AnswerEvent::Reasoning(text),
            AnswerPart::Content(text) => AnswerEvent::Content(text),
            AnswerPart::CallStart { name } => {
                self.calls += 1;
                AnswerEvent::CallStart { index: self.calls - 1, id: self.new_id(), name }
            }
            AnswerPart::CallArguments(fragment) => AnswerEvent::CallArguments { index, fragment },
            AnswerPart::CallEnd => AnswerEvent::CallEnd { index },
        }
    }

    fn new_id(&self) -> String {
        let mut rng = rand::rng();
        match self.is_mistral {
            true => (0..MISTRAL_ID_BYTES).map(|_| char::from(rng.sample(Alphanumeric))).collect(),
            false => format!("call_{:032x}", rng.random::<u128>()),
        }
    }
}

/// A whole answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// The model's reasoning. `None` if it has none.
    pub reasoning: Option<String>,
    /// The text.
    pub content: String,
    /// The tool calls.
    pub calls: Vec<ToolCall>,
    /// Why the answer ended.
    pub finish_reason: &'static str,
}

/// A tool call of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolCall {
    /// Id of the call.
    pub id: String,
    /// The name of the function.
    pub name: String,
    /// The arguments as JSON text.
    pub arguments: String,
}

impl Answer {
    /// The answer of a choice that has ended.
    pub fn of(format: &AnswerFormat, choice: &Choice) -> Self {
        let mut reader = AnswerReader::new(format);
        let mut answer = Self::default();
        // A choice's text includes what was held back until its end.
        let events = reader.push(&choice.text);
        events.into_iter().chain(reader.finish()).for_each(|event| answer.take(event));
        answer.finish_reason = choice.finished.as_ref().map_or("", |finished| reader.finish_reason(finished));
        answer
    }

    fn take(&mut self, event: AnswerEvent) {
        match event {
            AnswerEvent::Reasoning(text) => *self.reasoning.get_or_insert_default() += &text,
            AnswerEvent::Content(text) => self.content += &text,
            AnswerEvent::CallStart { index: _, id, name } => {
                self.calls.push(ToolCall { id, name, arguments: String::new() });
            }
            AnswerEvent::CallArguments { index, fragment } => {
                if let Some(call) = self.calls.get_mut(index) {
                    call.arguments += &fragment;
                }
            }
            AnswerEvent::CallEnd { index: _ } => {}
        }
    }
}
