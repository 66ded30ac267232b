//! `POST /v1/chat/completions`.

use std::sync::Arc;

use async_stream::try_stream;
use axum::{
    Json,
    body::Bytes,
    response::{IntoResponse as _, Response},
};
use futures::StreamExt as _;
use overfill_kv::SamplingParams;
use overfill_text::ChatMessage;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    BodyLimits, Checked, Intake,
    batch::{self, Batch, Choice, Merged, Prompt, Usage},
    caller::Caller,
    error::ApiError,
    fields::{Common, Fields},
    logprobs::{ChatLogprobs, Names},
    producers, sse,
};
use crate::{
    GenerateError,
    generate::Core,
    legs::Leg,
    node::ServedModel,
    prompt::TextPool,
    request::{Lifetime, Output},
};

#[derive(Deserialize)]
struct MessageBody {
    role: String,
    content: Option<Content>,
    tool_calls: Option<Vec<Value>>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of parts")]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    r#type: String,
    text: Option<String>,
}

impl MessageBody {
    fn message(self) -> Result<ChatMessage, GenerateError> {
        let invalid = |what: String| Err(GenerateError::invalid("messages", what));
        if self.tool_calls.is_some_and(|calls| !calls.is_empty()) {
            return invalid("messages: tool_calls are not supported".into());
        }
        let content = match self.content {
            None => String::new(),
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => {
                let mut texts = Vec::with_capacity(parts.len());
                for part in parts {
                    match (part.r#type.as_str(), part.text) {
                        ("text", Some(text)) => texts.push(text),
                        ("text", None) => return invalid("messages: a part of type text must have a text".into()),
                        (other, _) => return invalid(format!("messages: parts must be of type text, got {other}")),
                    }
                }
                texts.join("\n")
            }
        };
        Ok(ChatMessage::new(self.role, content))
    }
}

struct Chat {
    id: String,
    batch: Batch,
    prompt: Prompt,
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

/// Checks a body and returns its sequences, without starting them.
pub(super) async fn generations(body: &Bytes, model: &Arc<ServedModel>, limits: BodyLimits) -> Checked {
    let mut fields = Fields::parse(body)?;
    fields.take::<String>("model")?;
    let pool = TextPool::default();
    let intake = Intake::new(String::new(), &pool, Lifetime::now(limits.time));
    let chat = parse(fields, model.clone(), intake, |count| limits.allow(count)).await?;
    Ok(chat.batch.generations(std::slice::from_ref(&chat.prompt))?)
}

/// Takes every field except `model`. `may_ask` returns an error if the number of sequences can never be served.
async fn parse(
    mut fields: Fields,
    model: Arc<ServedModel>,
    intake: Intake<'_>,
    may_ask: impl FnOnce(usize) -> Result<(), GenerateError>,
) -> Result<Chat, ApiError> {
    let Intake { id, pool, lifetime, mut legs } = intake;
    let common = Common::take(&mut fields, model.text.generation_defaults())?;
    let logprobs = fields.take("logprobs")?.unwrap_or(false);
    let top_logprobs = fields.take_count("top_logprobs")?;
    if top_logprobs.is_some_and(|n| n > 0) && !logprobs {
        return Err(GenerateError::invalid("top_logprobs", "top_logprobs needs logprobs to be true").into());
    }
    let old: Option<u32> = fields.take_count("max_tokens")?;
    let max_tokens = fields.take_count("max_completion_tokens")?.or(old);
    if max_tokens == Some(0) {
        return Err(GenerateError::limit("max_completion_tokens", "at least 1", 0).into());
    }
    let add_generation_prompt = fields.take("add_generation_prompt")?.unwrap_or(true);
    let add_special = fields.take("add_special_tokens")?.unwrap_or(false);
    let messages: Vec<MessageBody> =
        fields.take("messages")?.ok_or_else(|| GenerateError::invalid("messages", "messages is missing"))?;
    if messages.is_empty() {
        return Err(GenerateError::invalid("messages", "messages must have at least one message, got 0").into());
    }
    fields.finish()?;
    may_ask(common.n)?;
    let messages = messages.into_iter().map(MessageBody::message).collect::<Result<Vec<_>, _>>()?;
    legs.enter(Leg::Tokenize);
    let text = pool.render(&model.text, messages, add_generation_prompt, lifetime).await?;
    let tokens: Arc<[u32]> = pool.encode(&model.text, text, add_special, lifetime).await?.into();
    legs.leave();
    let batch = Batch {
        sampling: SamplingParams { logprobs: logprobs.then_some(top_logprobs.unwrap_or(0)), ..common.sampling.clone() },
        max_tokens,
        default_max_tokens: model.text.generation_defaults().max_new_tokens.unwrap_or(u32::MAX),
        prompt_logprobs: false,
        model,
        common,
        lifetime,
        spent: legs.times(),
    };
    Ok(Chat { id, batch, prompt: Prompt { tokens, text: String::new() }, logprobs })
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
            let mut body = json!({
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": null},
                "logprobs": self.logprobs.then(|| ChatLogprobs::new(&choice.tokens, self.names())),
                "finish_reason": choice.finished.as_ref().map(|finished| finished.reason.as_str()),
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
            for index in 0..common.n {
                let mut chunk = self.chunk(index, &json!({"role": "assistant", "content": ""}));
                if common.return_token_ids {
                    chunk["prompt_token_ids"] = json!(self.prompt.tokens[..]);
                }
                yield sse::event(&chunk)?;
            }
            while let Some((index, output)) = merged.next().await {
                let chunk = match output? {
                    Output::PromptLogprobs(_) => continue,
                    Output::Token { token, text, stage } => {
                        // Empty chunks are not sent.
                        if text.is_empty() && !self.logprobs && !common.return_token_ids && !common.include_overfill {
                            continue;
                        }
                        let mut chunk = self.chunk(index, &json!({"content": text}));
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
                        let delta = match finished.text.is_empty() {
                            true => json!({}),
                            false => json!({"content": finished.text}),
                        };
                        let mut chunk = self.chunk(index, &delta);
                        chunk["choices"][0]["finish_reason"] = json!(finished.reason.as_str());
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
