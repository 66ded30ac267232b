//! `POST /v1/chat/completions`.

use std::sync::Arc;

use async_stream::try_stream;
use axum::{
    Json,
    body::Bytes,
    response::{IntoResponse as _, Response},
};
use futures::StreamExt as _;
use overfill_text::AnswerFormat;
use serde_json::{Value, json};

use super::{
    BodyLimits, Checked, Intake,
    answer::{Answer, AnswerEvent, AnswerReader, ToolCall},
    batch::{self, Batch, Choice, Merged, Prompt, Usage},
    caller::Caller,
    conversation::{Asked, Conversation, Prepared},
    error::ApiError,
    fields::{Common, Fields},
    logprobs::{ChatLogprobs, Names},
    producers, prompt_logprobs, sse,
};
use crate::{GenerateError, generate::Core, node::ServedModel, request::Output};

struct Chat {
    id: String,
    batch: Batch,
    prompt: Prompt,
    /// What to look for in the answers.
    format: AnswerFormat,
    logprobs: bool,
}

/// Handles a request.
pub async fn create(core: Core, caller: Caller, body: Bytes, id: String) -> Result<Response, ApiError> {
    let intake = Intake::at(&core, &caller, id);
    let mut fields = Fields::parse(&body)?;
    drop(body);
    let name = fields.take::<String>("model")?.unwrap_or_default();
    let answered = answer(&core, &caller, intake, &name, fields).await;
    answered.map_err(|e| e.of_model(core.catalog.label(&name)))
}

async fn answer(
    core: &Core,
    caller: &Caller,
    mut intake: Intake<'_>,
    name: &str,
    fields: Fields,
) -> Result<Response, ApiError> {
    let model = intake.model(core, caller, name).await?;
    let chat = parse(fields, model, intake, |count| core.admission.check_count(count)).await?;
    let merged = chat.batch.start(core, &caller.tenant, std::slice::from_ref(&chat.prompt)).await?;
    if chat.batch.common.stream {
        return Ok(chat.stream(merged));
    }
    let choices = batch::collect(merged, chat.batch.common.n).await?;
    Ok(Json(chat.whole(&choices)).into_response())
}

/// Checks the fields and returns the sequences, without starting them.
pub(super) async fn generations(
    fields: Fields,
    model: Arc<ServedModel>,
    intake: Intake<'_>,
    limits: BodyLimits,
) -> Checked {
    let chat = parse(fields, model, intake, |count| limits.allow(count)).await?;
    Ok(chat.batch.generations(std::slice::from_ref(&chat.prompt))?)
}

/// Takes every field except `model`. `may_ask` returns an error if the number of sequences can never be served.
async fn parse(
    mut fields: Fields,
    model: Arc<ServedModel>,
    intake: Intake<'_>,
    may_ask: impl FnOnce(usize) -> Result<(), GenerateError>,
) -> Result<Chat, ApiError> {
    let common = Common::take(&mut fields, model.text.generation_defaults())?;
    let logprobs = fields.take("logprobs")?.unwrap_or(false);
    let top_logprobs = fields.take_count("top_logprobs")?;
    if top_logprobs.is_some_and(|n| n > 0) && !logprobs {
        return Err(GenerateError::invalid("top_logprobs", "top_logprobs needs logprobs to be true").into());
    }
    let of_output = logprobs.then_some(top_logprobs.unwrap_or(0));
    let prompt_scores = prompt_logprobs::take(&mut fields, common.stream, of_output)?;
    let old: Option<u32> = fields.take_count("max_tokens")?;
    let max_tokens = fields.take_count("max_completion_tokens")?.or(old);
    if max_tokens == Some(0) {
        return Err(GenerateError::limit("max_completion_tokens", "at least 1", 0).into());
    }
    let add_special = fields.take("add_special_tokens")?.unwrap_or(false);
    let conversation = Conversation::take(&mut fields, intake.settings)?;
    fields.finish()?;
    may_ask(common.n)?;
    let asked = Asked {
        common,
        max_tokens,
        at_most_tokens: None,
        logprobs: of_output.or(prompt_scores),
        prompt_logprobs: prompt_scores.is_some(),
        add_special,
    };
    let Prepared { id, batch, prompt, format } = conversation.prepare(asked, model, intake).await?;
    Ok(Chat { id, batch, prompt, format, logprobs })
}

impl Chat {
    fn names(&self) -> Names<'_> {
        Names { text: &self.batch.model.text, as_ids: self.batch.common.tokens_as_ids }
    }

    fn frame(&self, object: &str, choices: Value) -> Value {
        json!({"id": self.id, "object": object, "created": super::now(), "model": self.batch.model.name,
               "choices": choices})
    }

    fn whole(&self, choices: &[Choice]) -> Value {
        let mut usage = Usage::default();
        let mut bodies = Vec::with_capacity(choices.len());
        for (index, choice) in choices.iter().enumerate() {
            let answer = Answer::of(&self.format, choice);
            let mut body = json!({
                "index": index,
                "message": message(&answer),
                "logprobs": self.logprobs.then(|| ChatLogprobs::new(&choice.tokens, self.names())),
                "finish_reason": answer.finish_reason,
                "stop_reason": choice.finished.as_ref().map(batch::stop_reason),
            });
            if self.batch.common.return_token_ids {
                body["token_ids"] = json!(choice.ids());
            }
            if let Some(finished) = &choice.finished {
                usage.add(finished, index == 0);
            }
            bodies.push(body);
        }
        let mut whole = self.frame("chat.completion", json!(bodies));
        if self.batch.common.return_token_ids {
            whole["prompt_token_ids"] = json!(self.prompt.tokens[..]);
        }
        if let (true, [first, ..]) = (self.batch.prompt_logprobs, choices) {
            whole["prompt_logprobs"] = prompt_logprobs::entries(&first.prompt_logprobs, self.names().text);
        }
        whole["usage"] = json!(usage);
        whole
    }

    fn chunk(&self, index: usize, delta: &Value) -> Value {
        let choice = json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null});
        let mut chunk = self.frame("chat.completion.chunk", json!([choice]));
        if self.batch.common.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn stream(self, mut merged: Merged) -> Response {
        sse::response(try_stream! {
            let common = &self.batch.common;
            let mut usage = Usage::default();
            let mut readers: Vec<AnswerReader> = (0..common.n).map(|_| AnswerReader::new(&self.format)).collect();
            for index in 0..common.n {
                let mut chunk = self.chunk(index, &json!({"role": "assistant", "content": ""}));
                if common.return_token_ids {
                    chunk["prompt_token_ids"] = json!(self.prompt.tokens[..]);
                }
                yield sse::event(&chunk)?;
            }
            while let Some((index, output)) = merged.next().await {
                let output = output?;
                let events = readers[index].take(&output);
                // Empty chunks are not sent.
                let is_empty = events.iter().all(|event| matches!(event, AnswerEvent::CallEnd { .. }));
                let delta = delta(events);
                let chunk = match output {
                    Output::PromptLogprobs(_) => continue,
                    Output::Token { token, text: _, stage } => {
                        if is_empty && !self.logprobs && !common.return_token_ids && !common.include_overfill {
                            continue;
                        }
                        let mut chunk = self.chunk(index, &delta);
                        if common.return_token_ids {
                            chunk["choices"][0]["token_ids"] = json!([token.token]);
                        }
                        if self.logprobs {
                            chunk["choices"][0]["logprobs"] = json!(ChatLogprobs::new(&[token], self.names()));
                        }
                        if common.include_overfill {
                            chunk["overfill"] = producers::token(&self.batch.model, stage);
                        }
                        chunk
                    }
                    Output::Finished(finished) => {
                        let mut chunk = self.chunk(index, &delta);
                        chunk["choices"][0]["finish_reason"] = json!(readers[index].finish_reason(&finished));
                        chunk["choices"][0]["stop_reason"] = batch::stop_reason(&finished);
                        if common.include_overfill {
                            chunk["overfill"] = producers::timings(&finished);
                        }
                        usage.add(&finished, index == 0);
                        chunk
                    }
                };
                yield sse::event(&chunk)?;
            }
            if common.include_usage {
                let mut chunk = self.frame("chat.completion.chunk", json!([]));
                chunk["usage"] = json!(usage);
                yield sse::event(&chunk)?;
            }
        })
    }
}

/// The message of a whole answer. Its content is null if the answer is nothing but reasoning and calls.
fn message(answer: &Answer) -> Value {
    let Answer { reasoning, content, calls, finish_reason: _ } = answer;
    let content = (!content.is_empty() || calls.is_empty() && reasoning.is_none()).then_some(content);
    let mut message = json!({"role": "assistant", "content": content, "refusal": null});
    if let Some(reasoning) = reasoning {
        message["reasoning_content"] = json!(reasoning);
    }
    if !calls.is_empty() {
        let call = |call: &ToolCall| json!({"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}});
        message["tool_calls"] = calls.iter().map(call).collect();
    }
    message
}

/// The delta of a chunk. A call has one entry, whose arguments are joined.
fn delta(events: Vec<AnswerEvent>) -> Value {
    let (mut reasoning, mut content) = (String::new(), String::new());
    let mut calls: Vec<Value> = Vec::new();
    for event in events {
        match event {
            AnswerEvent::Reasoning(text) => reasoning += &text,
            AnswerEvent::Content(text) => content += &text,
            AnswerEvent::CallStart { index, id, name } => calls.push(json!({
                "index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}
            })),
            AnswerEvent::CallArguments { index, fragment } => {
                match calls.last_mut().filter(|call| call["index"] == index) {
                    Some(Value::Object(call)) => {
                        let arguments = &mut call["function"]["arguments"];
                        *arguments = json!(arguments.as_str().unwrap_or_default().to_owned() + &fragment);
                    }
                    _ => calls.push(json!({"index": index, "function": {"arguments": fragment}})),
                }
            }
            AnswerEvent::CallEnd { index: _ } => {}
        }
    }
    let mut delta = json!({});
    for (field, text) in [("reasoning_content", reasoning), ("content", content)] {
        if !text.is_empty() {
            delta[field] = json!(text);
        }
    }
    if !calls.is_empty() {
        delta["tool_calls"] = json!(calls);
    }
    delta
}
