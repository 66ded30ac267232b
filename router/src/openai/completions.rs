//! `POST /v1/completions`.

use std::sync::Arc;

use async_stream::try_stream;
use axum::{
    Json,
    body::Bytes,
    response::{IntoResponse as _, Response},
};
use futures::StreamExt as _;
use overfill_kv::SamplingParams;
use overfill_text::Offsets;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    BodyLimits, Checked, Intake,
    batch::{self, Batch, Choice, Merged, Prompt, Usage},
    caller::Caller,
    error::ApiError,
    fields::{Common, Fields},
    logprobs::{CompletionLogprobs, Names},
    producers, prompt_logprobs, sse,
};
use crate::{
    GenerateError,
    generate::Core,
    legs::Leg,
    node::ServedModel,
    request::{self, Output},
};

/// Default of `max_tokens`, as in OpenAI's API.
const DEFAULT_MAX_TOKENS: u32 = 16;

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected a string, a list of strings, a list of token ids, or a list of lists of token ids"
)]
enum Prompts {
    Text(String),
    Ids(Vec<u32>),
    Texts(Vec<String>),
    IdLists(Vec<Vec<u32>>),
}

struct Completion {
    id: String,
    batch: Batch,
    prompts: Vec<Prompt>,
    /// Number of alternatives per token. `None`: no log-probabilities.
    logprobs: Option<u32>,
    /// Number of alternatives per token of the prompt. `None`: no `prompt_logprobs`.
    prompt_scores: Option<u32>,
    echo: bool,
}

#[derive(Serialize)]
struct ChoiceBody {
    index: usize,
    text: String,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Value>,
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
    let completion = parse(fields, model, intake, |count| core.admission.check_count(count)).await?;
    let merged = completion.batch.start(core, &caller.tenant, &completion.prompts).await?;
    if completion.batch.common.stream {
        return Ok(completion.stream(merged));
    }
    let choices = batch::collect(merged, completion.prompts.len() * completion.batch.common.n).await?;
    Ok(Json(completion.whole(&choices)).into_response())
}

/// Checks the fields and returns the sequences, without starting them.
pub(super) async fn generations(
    fields: Fields,
    model: Arc<ServedModel>,
    intake: Intake<'_>,
    limits: BodyLimits,
) -> Checked {
    let completion = parse(fields, model, intake, |count| limits.allow(count)).await?;
    Ok(completion.batch.generations(&completion.prompts)?)
}

/// Takes every field except `model`. `may_ask` returns an error if the number of sequences can never be served.
async fn parse(
    mut fields: Fields,
    model: Arc<ServedModel>,
    intake: Intake<'_>,
    may_ask: impl FnOnce(usize) -> Result<(), GenerateError>,
) -> Result<Completion, ApiError> {
    let Intake { id, pool, settings: _, lifetime, mut legs } = intake;
    let common = Common::take(&mut fields, model.text.generation_defaults())?;
    let logprobs = fields.take_count("logprobs")?;
    let echo: bool = fields.take("echo")?.unwrap_or(false);
    let max_tokens = fields.take_count("max_tokens")?;
    if max_tokens == Some(0) && !echo {
        return Err(GenerateError::limit("max_tokens", "at least 1 (0 only with echo)", 0).into());
    }
    let prompt_scores = prompt_logprobs::take(&mut fields, common.stream, logprobs)?;
    let add_special = fields.take("add_special_tokens")?.unwrap_or(true);
    let prompt = fields.take("prompt")?.ok_or_else(|| GenerateError::invalid("prompt", "prompt is missing"))?;
    fields.finish()?;
    let (texts, ids) = match prompt {
        Prompts::Text(text) => (vec![text], Vec::new()),
        Prompts::Texts(texts) => (texts, Vec::new()),
        Prompts::Ids(ids) => (Vec::new(), vec![ids]),
        Prompts::IdLists(lists) => (Vec::new(), lists),
    };
    // Checked before anything is computed or allocated per prompt: a body may contain millions of short prompts.
    may_ask((texts.len() + ids.len()) * common.n)?;
    let mut prompts = Vec::with_capacity(texts.len() + ids.len());
    for text in texts {
        legs.enter(Leg::Tokenize);
        let tokens = pool.encode(&model.text, text.clone(), add_special, lifetime).await?;
        let (tokens, cut) = common.truncate(&model, tokens, max_tokens);
        let text = if cut && echo {
            model.text.decode(&tokens, common.skip_special).map_err(GenerateError::from)?
        } else {
            text
        };
        prompts.push(Prompt { tokens: tokens.into(), text });
        // Short texts are tokenised on this thread. Yield, so that many of them do not block other tasks.
        tokio::task::yield_now().await;
    }
    legs.leave();
    for ids in ids {
        let (ids, _) = common.truncate(&model, ids, max_tokens);
        request::check_prompt(&model, &ids)?;
        request::check_length(&model, ids.len(), None)?;
        // The text is needed only for an echo.
        let text = if echo {
            model.text.decode(&ids, common.skip_special).map_err(GenerateError::from)?
        } else {
            String::new()
        };
        prompts.push(Prompt { tokens: ids.into(), text });
    }
    let batch = Batch {
        sampling: SamplingParams { logprobs: logprobs.or(prompt_scores), ..common.sampling.clone() },
        max_tokens,
        default_max_tokens: model.text.generation_defaults().max_new_tokens.unwrap_or(DEFAULT_MAX_TOKENS),
        prompt_logprobs: echo && logprobs.is_some() || prompt_scores.is_some(),
        shown_special: [].into(),
        model,
        common,
        lifetime,
        spent: legs.times(),
    };
    Ok(Completion { id, batch, prompts, logprobs, prompt_scores, echo })
}

impl Completion {
    fn names(&self) -> Names<'_> {
        Names { text: &self.batch.model.text, as_ids: self.batch.common.tokens_as_ids }
    }

    fn prompt(&self, index: usize) -> &Prompt {
        &self.prompts[index / self.batch.common.n]
    }

    fn whole(&self, choices: &[Choice]) -> Value {
        let mut usage = Usage::default();
        let mut bodies = Vec::with_capacity(choices.len());
        for (index, choice) in choices.iter().enumerate() {
            let prompt = self.prompt(index);
            let mut body = self.body(index);
            let mut offsets = self.offsets(prompt);
            if self.echo {
                body.text = prompt.text.clone();
                self.prompt_logprobs(&mut body, prompt, choice, &mut offsets);
            }
            let scores =
                self.prompt_scores.map(|_| prompt_logprobs::entries(&choice.prompt_logprobs, self.names().text));
            body.prompt_logprobs = scores;
            body.text += &choice.text;
            if let Some(logprobs) = &mut body.logprobs {
                for token in &choice.tokens {
                    logprobs.push(token.token, Some(token), self.names(), offsets.next_output(token.token));
                }
            }
            if self.batch.common.return_token_ids {
                body.token_ids = Some(choice.ids());
                body.prompt_token_ids = Some(prompt.tokens.to_vec());
            }
            if let Some(finished) = &choice.finished {
                body.finish_reason = Some(finished.reason.as_str());
                body.stop_reason = batch::stop_reason(finished);
                usage.add(finished, index % self.batch.common.n == 0);
            }
            bodies.push(body);
        }
        let mut whole = self.frame(json!(bodies));
        whole["usage"] = json!(usage);
        whole
    }

    fn body(&self, index: usize) -> ChoiceBody {
        ChoiceBody {
            index,
            text: String::new(),
            logprobs: self.logprobs.map(|_| CompletionLogprobs::default()),
            finish_reason: None,
            stop_reason: Value::Null,
            token_ids: None,
            prompt_token_ids: None,
            prompt_logprobs: None,
        }
    }

    /// Token offsets in the text of a choice. With `echo` the text begins with the prompt.
    fn offsets(&self, prompt: &Prompt) -> Offsets {
        let context = if self.echo { &[] } else { &prompt.tokens[..] };
        self.batch.model.text.offsets(context, self.batch.common.skip_special)
    }

    fn prompt_logprobs(&self, body: &mut ChoiceBody, prompt: &Prompt, choice: &Choice, offsets: &mut Offsets) {
        let Some(logprobs) = &mut body.logprobs else { return };
        let reports = std::iter::once(None).chain(choice.prompt_logprobs.iter().map(Some));
        for (token, report) in prompt.tokens.iter().zip(reports) {
            logprobs.push(*token, report, self.names(), offsets.next_of_prompt(*token, &prompt.text));
        }
        offsets.end_prompt(&prompt.text);
    }

    fn frame(&self, choices: Value) -> Value {
        json!({"id": self.id, "object": "text_completion", "created": super::now(), "model": self.batch.model.name,
               "choices": choices})
    }

    fn stream(self, mut merged: Merged) -> Response {
        sse::response(try_stream! {
            let common = &self.batch.common;
            let count = self.prompts.len() * common.n;
            let mut usage = Usage::default();
            let mut offsets: Vec<Offsets> = (0..count).map(|index| self.offsets(self.prompt(index))).collect();
            let mut begun = vec![false; count];
            let mut scores: Vec<Choice> = (0..count).map(|_| Choice::default()).collect();
            while let Some((index, output)) = merged.next().await {
                let mut body = self.body(index);
                let offsets = &mut offsets[index];
                let output = output?;
                if let Output::PromptLogprobs(_) = &output {
                    scores[index].take(output);
                    continue;
                }
                let first = !std::mem::replace(&mut begun[index], true);
                if first {
                    let prompt = self.prompt(index);
                    if self.echo {
                        body.text = prompt.text.clone();
                        self.prompt_logprobs(&mut body, prompt, &std::mem::take(&mut scores[index]), offsets);
                    }
                    body.prompt_token_ids = common.return_token_ids.then(|| prompt.tokens.to_vec());
                }
                let mut ids = Vec::new();
                let mut overfill = None;
                match output {
                    Output::PromptLogprobs(_) => {}
                    Output::Token { token, text, stage } => {
                        // Empty chunks are not sent.
                        let wanted = self.logprobs.is_some() || common.return_token_ids || common.include_overfill;
                        if text.is_empty() && !first && !wanted {
                            continue;
                        }
                        overfill = common.include_overfill.then(|| producers::token(&self.batch.model, stage));
                        body.text += &text;
                        ids.push(token.token);
                        if let Some(logprobs) = &mut body.logprobs {
                            let offset = offsets.next_output(token.token);
                            logprobs.push(token.token, Some(&token), self.names(), offset);
                        }
                    }
                    Output::Finished(finished) => {
                        body.text += &finished.text;
                        body.finish_reason = Some(finished.reason.as_str());
                        body.stop_reason = batch::stop_reason(&finished);
                        if !(self.echo && first) {
                            body.logprobs = None;
                        }
                        overfill = common.include_overfill.then(|| producers::timings(&finished));
                        usage.add(&finished, index % common.n == 0);
                    }
                }
                body.token_ids = common.return_token_ids.then_some(ids);
                let mut chunk = self.frame(json!([body]));
                if common.include_usage {
                    chunk["usage"] = Value::Null;
                }
                if let Some(overfill) = overfill {
                    chunk["overfill"] = overfill;
                }
                yield sse::event(&chunk)?;
            }
            if common.include_usage {
                let mut chunk = self.frame(json!([]));
                chunk["usage"] = json!(usage);
                yield sse::event(&chunk)?;
            }
        })
    }
}
