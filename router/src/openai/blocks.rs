//! An answer as a list of blocks, one after the other: reasoning, text, calls. The APIs whose answers are such lists share
//! this: Responses calls blocks items, Anthropic's Messages content blocks.

use overfill_text::AnswerFormat;

use super::answer::{AnswerEvent, AnswerReader};
use crate::request::{Finished, Output};

/// What a block is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlockKind {
    /// The model's reasoning.
    Reasoning,
    /// Text for the client.
    Text,
    /// A call of a function. The block's text is its arguments, as JSON text.
    Call {
        /// Id of the call.
        id: String,
        /// The name of the function.
        name: String,
    },
}

/// A block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// What the block is.
    pub kind: BlockKind,
    /// Its text so far.
    pub text: String,
}

/// A step of the list of blocks. After a `Start` come `Delta`s that are not empty, then an `End`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlockEvent {
    /// A block begins.
    Start(BlockKind),
    /// More text of the block.
    Delta(String),
    /// The block ends. This is all of it.
    End(Block),
}

/// Reads an answer as blocks while it is generated.
pub struct BlockReader {
    reader: AnswerReader,
    open: Option<Block>,
    reasoning_tokens: u32,
}

impl BlockReader {
    /// A reader of an answer from its beginning.
    pub fn new(format: &AnswerFormat) -> Self {
        Self { reader: AnswerReader::new(format), open: None, reasoning_tokens: 0 }
    }

    /// The events that an output adds. With the last output, the open block ends.
    pub fn take(&mut self, output: &Output) -> Vec<BlockEvent> {
        let mut events = Vec::new();
        for event in self.reader.take(output) {
            self.add(event, &mut events);
        }
        match output {
            Output::Token { .. } if self.open.as_ref().is_some_and(|block| block.kind == BlockKind::Reasoning) => {
                self.reasoning_tokens += 1;
            }
            Output::Finished(_) => self.end(&mut events),
            Output::Token { .. } | Output::PromptLogprobs(_) => {}
        }
        events
    }

    /// Number of tokens after which the reasoning was not over. Tokens that only mark its beginning do not count.
    pub fn reasoning_tokens(&self) -> u32 {
        self.reasoning_tokens
    }

    /// Why the answer ended: `tool_calls` if the model has called tools, not just stopped.
    pub fn finish_reason(&self, finished: &Finished) -> &'static str {
        self.reader.finish_reason(finished)
    }

    fn add(&mut self, event: AnswerEvent, events: &mut Vec<BlockEvent>) {
        match event {
            AnswerEvent::Reasoning(text) => self.write(BlockKind::Reasoning, text, events),
            AnswerEvent::Content(text) => self.write(BlockKind::Text, text, events),
            AnswerEvent::CallStart { index: _, id, name } => self.start(BlockKind::Call { id, name }, events),
            AnswerEvent::CallArguments { index: _, fragment } => self.append(fragment, events),
            AnswerEvent::CallEnd { index: _ } => self.end(events),
        }
    }

    fn write(&mut self, kind: BlockKind, text: String, events: &mut Vec<BlockEvent>) {
        if !text.is_empty() && self.open.as_ref().is_none_or(|block| block.kind != kind) {
            self.start(kind, events);
        }
        self.append(text, events);
    }

    fn start(&mut self, kind: BlockKind, events: &mut Vec<BlockEvent>) {
        self.end(events);
        events.push(BlockEvent::Start(kind.clone()));
        self.open = Some(Block { kind, text: String::new() });
    }

    fn append(&mut self, text: String, events: &mut Vec<BlockEvent>) {
        if let Some(block) = self.open.as_mut().filter(|_| !text.is_empty()) {
            block.text += &text;
            events.push(BlockEvent::Delta(text));
        }
    }

    fn end(&mut self, events: &mut Vec<BlockEvent>) {
        events.extend(self.open.take().map(BlockEvent::End));
    }
}

#[cfg(test)]
mod tests {
    use overfill_text::{ReasoningFormat, ToolFormat};

    use super::*;

    #[test]
    fn neighbours_of_a_kind_are_one_block() {
        let format = AnswerFormat {
            reasoning: Some(ReasoningFormat::Qwen3),
            tools: Some(ToolFormat::Hermes),
            functions: ["f".to_owned()].into(),
            ..AnswerFormat::default()
        };
        let text = "<think>\nHm. Ja.\n</think>\n\nI call.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>";
        let mut reader = BlockReader::new(&format);
        let events: Vec<BlockEvent> = text
            .split_inclusive(' ')
            .flat_map(|text| {
                let token = overfill_kv::OutputToken { token: 1, logprob: 0.0, top: Vec::new() };
                reader.take(&Output::Token { token, text: text.into(), stage: overfill_kv::Role::Decode })
            })
            .collect();
        let mut blocks = Vec::new();
        let mut parts = String::new();
        for event in events {
            match event {
                BlockEvent::Start(_) => parts.clear(),
                BlockEvent::Delta(text) => parts += &text,
                BlockEvent::End(block) => {
                    assert_eq!(block.text, parts);
                    blocks.push((block.kind, block.text));
                }
            }
        }
        let (kind, arguments) = blocks.pop().unwrap();
        assert!(matches!(kind, BlockKind::Call { name, .. } if name == "f"));
        assert_eq!(arguments, "{\"a\": 1}");
        let told = |kind, text: &str| (kind, text.to_owned());
        assert_eq!(blocks, [told(BlockKind::Reasoning, "Hm. Ja."), told(BlockKind::Text, "I call.")]);
        assert!(reader.reasoning_tokens() > 0);
    }
}
