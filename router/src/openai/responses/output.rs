//! The answer of the Responses API, as events and as a whole.

use overfill_kv::OutputToken;
use serde_json::{Map, Value, json};

use crate::{
    openai::{
        blocks::{Block, BlockEvent, BlockKind, BlockReader},
        conversation::Prepared,
        error::ApiError,
        logprobs::{ChatLogprobs, Names},
        now,
    },
    request::{self, Finished, Output},
};

const COMPLETED: &str = "completed";
const INCOMPLETE: &str = "incomplete";
const IN_PROGRESS: &str = "in_progress";

/// Writes one answer.
pub struct Writer {
    prepared: Prepared,
    /// Fields of the request that the answer repeats.
    echo: Map<String, Value>,
    created: u64,
    reader: BlockReader,
    /// Number of events so far.
    events: u64,
    /// The items that have ended.
    output: Vec<Value>,
    /// Id and kind of the item that has not ended.
    open: Option<(String, BlockKind)>,
    /// Log-probabilities of tokens whose text has not been written.
    pending: Vec<Value>,
    /// Log-probabilities of the open item.
    logprobs: Vec<Value>,
    /// The answer, when it has ended.
    ended: Option<Value>,
}

impl Writer {
    /// A writer of the answer to this request.
    pub fn new(prepared: Prepared, echo: Map<String, Value>) -> Self {
        Self {
            reader: BlockReader::new(&prepared.format),
            prepared,
            echo,
            created: now(),
            events: 0,
            output: Vec::new(),
            open: None,
            pending: Vec::new(),
            logprobs: Vec::new(),
            ended: None,
        }
    }

    /// The events before the first output.
    pub fn begin(&mut self) -> [Value; 2] {
        let response = self.response(IN_PROGRESS);
        let created = self.event("response.created", json!({"response": response}));
        [created, self.event("response.in_progress", json!({"response": response}))]
    }

    /// The events of an output.
    pub fn take(&mut self, output: Output) -> Vec<Value> {
        if let Output::Token { token, .. } = &output {
            self.note_logprobs(token);
        }
        let cut = matches!(&output, Output::Finished(finished) if self.reader.finish_reason(finished) == "length");
        let status = if cut { INCOMPLETE } else { COMPLETED };
        let mut events = Vec::new();
        for event in self.reader.take(&output) {
            match event {
                BlockEvent::Start(kind) => self.start(kind, &mut events),
                BlockEvent::Delta(text) => self.delta(&text, &mut events),
                BlockEvent::End(block) => self.end(&block, status, &mut events),
            }
        }
        if let Output::Finished(finished) = &output {
            let mut response = self.response(status);
            if cut {
                response["incomplete_details"] = json!({"reason": "max_output_tokens"});
            } else {
                response["completed_at"] = json!(now());
            }
            response["usage"] = self.usage(finished);
            self.ended = Some(response.clone());
            events.push(self.event(&format!("response.{status}"), json!({"response": response})));
        }
        events
    }

    /// The event after which a failed answer ends.
    pub fn fail(&mut self, error: &ApiError) -> Value {
        let mut response = self.response("failed");
        let code = if error.status().is_client_error() { "rate_limit_exceeded" } else { "server_error" };
        response["error"] = json!({"code": code, "message": error.message()});
        self.event("response.failed", json!({"response": response}))
    }

    /// The whole answer. `None` if it has not ended.
    pub fn ended(self) -> Option<Value> {
        self.ended
    }

    /// The response object without usage.
    fn response(&self, status: &str) -> Value {
        let mut response = json!({
            "id": self.prepared.id, "object": "response", "created_at": self.created, "status": status,
            "background": false, "completed_at": null, "error": null, "incomplete_details": null,
            "model": self.prepared.batch.model.name, "output": self.output, "usage": null,
        });
        if let Value::Object(response) = &mut response {
            response.extend(self.echo.clone());
        }
        response
    }

    fn usage(&self, finished: &Finished) -> Value {
        let Finished { prompt_tokens: input, completion_tokens: output, timings, .. } = finished;
        json!({
            "input_tokens": input,
            "input_tokens_details": {"cached_tokens": timings.prefill_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": output,
            "output_tokens_details": {"reasoning_tokens": self.reader.reasoning_tokens()},
            "total_tokens": input + output,
        })
    }

    fn event(&mut self, kind: &str, data: Value) -> Value {
        let mut event = json!({"type": kind, "sequence_number": self.events});
        self.events += 1;
        if let (Value::Object(event), Value::Object(data)) = (&mut event, data) {
            event.extend(data);
        }
        event
    }

    /// An event of the open item.
    fn item_event(&mut self, kind: &str, data: Value) -> Value {
        let id = self.open.as_ref().map(|(id, _)| id.clone());
        let mut event = self.event(kind, json!({"item_id": id, "output_index": self.output.len()}));
        if let (Value::Object(event), Value::Object(data)) = (&mut event, data) {
            event.extend(data);
        }
        event
    }

    fn start(&mut self, kind: BlockKind, events: &mut Vec<Value>) {
        let prefix = match &kind {
            BlockKind::Reasoning => "rs",
            BlockKind::Text => "msg",
            BlockKind::Call { .. } => "fc",
        };
        let id = format!("{prefix}_{}", request::new_request_id());
        let mut item = item(&id, &kind, "", IN_PROGRESS, &[]);
        // The parts of the content begin with events of their own.
        if item.get("content").is_some() {
            item["content"] = json!([]);
        }
        let added = json!({"output_index": self.output.len(), "item": item});
        events.push(self.event("response.output_item.added", added));
        let part = part(&kind, "", &[]);
        self.open = Some((id, kind));
        if let Some(part) = part {
            events.push(self.item_event("response.content_part.added", json!({"content_index": 0, "part": part})));
        }
    }

    fn delta(&mut self, text: &str, events: &mut Vec<Value>) {
        let Some((_, kind)) = &self.open else { return };
        let logprobs = std::mem::take(&mut self.pending);
        let (name, data) = match kind {
            BlockKind::Reasoning => ("response.reasoning_text.delta", json!({"content_index": 0, "delta": text})),
            BlockKind::Text => {
                let data = json!({"content_index": 0, "delta": text, "logprobs": logprobs});
                self.logprobs.extend(logprobs);
                ("response.output_text.delta", data)
            }
            BlockKind::Call { .. } => ("response.function_call_arguments.delta", json!({"delta": text})),
        };
        events.push(self.item_event(name, data));
    }

    fn end(&mut self, block: &Block, status: &str, events: &mut Vec<Value>) {
        let Some((id, _)) = self.open.clone() else { return };
        let logprobs = std::mem::take(&mut self.logprobs);
        let Block { kind, text } = block;
        let (name, data) = match kind {
            BlockKind::Reasoning => ("response.reasoning_text.done", json!({"content_index": 0, "text": text})),
            BlockKind::Text => {
                ("response.output_text.done", json!({"content_index": 0, "text": text, "logprobs": logprobs}))
            }
            BlockKind::Call { name, .. } => {
                ("response.function_call_arguments.done", json!({"arguments": text, "name": name}))
            }
        };
        events.push(self.item_event(name, data));
        if let Some(part) = part(kind, text, &logprobs) {
            events.push(self.item_event("response.content_part.done", json!({"content_index": 0, "part": part})));
        }
        let item = item(&id, kind, text, status, &logprobs);
        let done = json!({"output_index": self.output.len(), "item": item});
        events.push(self.event("response.output_item.done", done));
        self.output.push(item);
        self.open = None;
    }

    fn note_logprobs(&mut self, token: &OutputToken) {
        let Prepared { batch, .. } = &self.prepared;
        if batch.sampling.logprobs.is_some() {
            let names = Names { text: &batch.model.text, as_ids: batch.common.tokens_as_ids };
            self.pending.push(ChatLogprobs::of_token(token, names));
        }
    }
}

/// A part of an item's content. Calls have no content.
fn part(kind: &BlockKind, text: &str, logprobs: &[Value]) -> Option<Value> {
    match kind {
        BlockKind::Reasoning => Some(json!({"type": "reasoning_text", "text": text})),
        BlockKind::Text => Some(json!({"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs})),
        BlockKind::Call { .. } => None,
    }
}

fn item(id: &str, kind: &BlockKind, text: &str, status: &str, logprobs: &[Value]) -> Value {
    let content = part(kind, text, logprobs);
    match kind {
        BlockKind::Reasoning => {
            json!({"id": id, "type": "reasoning", "summary": [], "content": [content], "status": status})
        }
        BlockKind::Text => {
            json!({"id": id, "type": "message", "role": "assistant", "content": [content], "status": status})
        }
        BlockKind::Call { id: call_id, name } => {
            json!({"id": id, "type": "function_call", "call_id": call_id, "name": name, "arguments": text,
                   "status": status})
        }
    }
}
