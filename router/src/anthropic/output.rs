//! The answer of the Messages API, as events and as a whole.

use serde_json::{Value, json};

use crate::{
    openai::{
        blocks::{Block, BlockEvent, BlockKind, BlockReader},
        conversation::Prepared,
    },
    request::{Finished, Output, StopCause},
};

/// Writes one answer.
pub struct Writer {
    id: String,
    model: String,
    prompt_tokens: usize,
    /// The request's `max_tokens`, of which the context may hold fewer.
    max_tokens: u32,
    reader: BlockReader,
    /// The blocks that have ended.
    content: Vec<Value>,
    /// What the open block is.
    open: Option<BlockKind>,
    /// The answer, when it has ended.
    ended: Option<Value>,
}

impl Writer {
    /// A writer of the answer to this request.
    pub fn new(prepared: &Prepared, max_tokens: u32) -> Self {
        Self {
            id: prepared.id.clone(),
            model: prepared.batch.model.name.clone(),
            prompt_tokens: prepared.prompt.tokens.len(),
            max_tokens,
            reader: BlockReader::new(&prepared.format),
            content: Vec::new(),
            open: None,
            ended: None,
        }
    }

    /// The events before the first output.
    pub fn begin(&mut self) -> [Value; 2] {
        let mut message = self.message();
        // How many of the tokens were cached is known at the end.
        message["usage"] = json!({"input_tokens": self.prompt_tokens, "output_tokens": 0});
        [json!({"type": "message_start", "message": message}), json!({"type": "ping"})]
    }

    /// The events of an output.
    pub fn take(&mut self, output: &Output) -> Vec<Value> {
        let mut events = Vec::new();
        for event in self.reader.take(output) {
            let index = self.content.len();
            match event {
                BlockEvent::Start(kind) => {
                    let block = content_block(&kind, "");
                    events.push(json!({"type": "content_block_start", "index": index, "content_block": block}));
                    self.open = Some(kind);
                }
                BlockEvent::Delta(text) => {
                    let delta = match &self.open {
                        Some(BlockKind::Reasoning) => json!({"type": "thinking_delta", "thinking": text}),
                        Some(BlockKind::Call { .. }) => json!({"type": "input_json_delta", "partial_json": text}),
                        Some(BlockKind::Text) | None => json!({"type": "text_delta", "text": text}),
                    };
                    events.push(json!({"type": "content_block_delta", "index": index, "delta": delta}));
                }
                BlockEvent::End(Block { kind, text }) => {
                    self.content.push(content_block(&kind, &text));
                    self.open = None;
                    events.push(json!({"type": "content_block_stop", "index": index}));
                }
            }
        }
        if let Output::Finished(finished) = output {
            let (reason, sequence) = self.stop_reason(finished);
            let usage = usage(finished);
            let delta = json!({"stop_reason": reason, "stop_sequence": sequence});
            let mut message = self.message();
            message["content"] = json!(self.content);
            message["stop_reason"] = json!(reason);
            message["stop_sequence"] = json!(sequence);
            message["usage"] = usage.clone();
            self.ended = Some(message);
            events.push(json!({"type": "message_delta", "delta": delta, "usage": usage}));
            events.push(json!({"type": "message_stop"}));
        }
        events
    }

    /// The whole answer. `None` if it has not ended.
    pub fn ended(self) -> Option<Value> {
        self.ended
    }

    fn message(&self) -> Value {
        json!({"id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": [],
               "stop_reason": null, "stop_sequence": null})
    }

    /// Why the answer ended, and the stop sequence that ended it.
    fn stop_reason<'a>(&self, finished: &'a Finished) -> (&'static str, Option<&'a str>) {
        match (&finished.stop, self.reader.finish_reason(finished)) {
            (Some(StopCause::Text(text)), "stop") => ("stop_sequence", Some(text.as_str())),
            (_, "tool_calls") => ("tool_use", None),
            (_, "length") if finished.completion_tokens < self.max_tokens => ("model_context_window_exceeded", None),
            (_, "length") => ("max_tokens", None),
            _ => ("end_turn", None),
        }
    }
}

/// A block of the answer. `text`: its text, or the arguments of a call as JSON text.
fn content_block(kind: &BlockKind, text: &str) -> Value {
    match kind {
        BlockKind::Text => json!({"type": "text", "text": text}),
        // The signature is for Anthropic's own service.
        BlockKind::Reasoning => json!({"type": "thinking", "thinking": text, "signature": ""}),
        BlockKind::Call { id, name } => {
            // Arguments that were cut off are no JSON. `stop_reason` says so.
            let input = serde_json::from_str(text).ok().filter(Value::is_object).unwrap_or_else(|| json!({}));
            json!({"type": "tool_use", "id": id, "name": name, "input": input})
        }
    }
}

/// The tokens of a request. As in Anthropic's API, `input_tokens` does not include those that were cached.
fn usage(finished: &Finished) -> Value {
    let cached = finished.timings.prefill_cached_tokens;
    json!({
        "input_tokens": finished.prompt_tokens.saturating_sub(cached),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": finished.completion_tokens,
    })
}
