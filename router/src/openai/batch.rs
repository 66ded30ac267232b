//! The sequences of one HTTP request: every prompt, `n` times.

use std::{pin::Pin, sync::Arc};

use futures::{
    Stream, StreamExt as _,
    stream::{BoxStream, SelectAll},
};
use overfill_kv::{OutputToken, SamplingParams};
use serde::Serialize;
use serde_json::{Value, json};

use super::fields::Common;
use crate::{
    GenerateError,
    generate::Core,
    legs::LegTimes,
    node::ServedModel,
    request::{self, Finished, Generation, Lifetime, Output, StopCause},
    tenants::Tenant,
};

/// An output and the index of its choice.
pub type Indexed = (usize, Result<Output, GenerateError>);

/// What generates the choices, all at once. Dropping it ends all of them on all nodes.
pub type Merged = Pin<Box<dyn Stream<Item = Indexed> + Send>>;

/// One prompt of a request.
pub struct Prompt {
    /// The prompt's token ids.
    pub tokens: Arc<[u32]>,
    /// As the client wrote it, or decoded.
    pub text: String,
}

/// What the sequences of a request have in common.
pub struct Batch {
    /// The model that answers.
    pub model: Arc<ServedModel>,
    /// The request's parameters.
    pub common: Common,
    /// With log-probabilities if they were asked for.
    pub sampling: SamplingParams,
    /// The request's `max_tokens`, which must fit the context.
    pub max_tokens: Option<u32>,
    /// Most tokens of a request without `max_tokens`; fewer if the context holds fewer.
    pub default_max_tokens: u32,
    /// Score the prompt?
    pub prompt_logprobs: bool,
    /// When the request came, and how long it may take.
    pub lifetime: Lifetime,
    /// The time that the request's first legs took.
    pub spent: LegTimes,
}

impl Batch {
    /// Every sequence of the request.
    pub fn generations(&self, prompts: &[Prompt]) -> Result<Vec<Generation>, GenerateError> {
        let Self { model, common, sampling, max_tokens, default_max_tokens, prompt_logprobs, lifetime, spent: _ } =
            self;
        sampling.validate(model.vocab_size as usize).map_err(|e| GenerateError::limit(e.field, e.limit, e.value))?;
        let stop_token_ids: Arc<[u32]> = match common.ignore_eos {
            true => common.stop_token_ids.clone().into(),
            false => model.eos_token_ids.iter().chain(&common.stop_token_ids).copied().collect(),
        };
        let mut generations = Vec::with_capacity(prompts.len() * common.n);
        for prompt in prompts {
            request::check_prompt(model, &prompt.tokens)?;
            let scoring = *max_tokens == Some(0);
            let asked = if scoring { Some(1) } else { *max_tokens };
            let fits = request::check_length(model, prompt.tokens.len(), asked)?;
            let fits = if asked.is_none() { fits.min(*default_max_tokens) } else { fits };
            for choice in 0..common.n {
                let seed = common.seed.map_or_else(request::random_seed, |seed| seed.wrapping_add(choice as u64));
                generations.push(Generation {
                    request_id: request::new_request_id(),
                    model: model.clone(),
                    prompt: prompt.tokens.clone(),
                    sampling: SamplingParams { seed, ..sampling.clone() },
                    max_tokens: if scoring { 0 } else { fits },
                    stop_token_ids: stop_token_ids.clone(),
                    stop: common.stop.clone(),
                    include_stop: common.include_stop,
                    skip_special: common.skip_special,
                    prompt_logprobs: *prompt_logprobs,
                    priority: common.priority,
                    arrived: lifetime.arrived,
                    time: lifetime.time,
                });
            }
        }
        Ok(generations)
    }

    /// Starts every sequence, each in its place, and waits for the first sign of life, so that what fails at once fails
    /// as a whole answer.
    pub async fn start(&self, core: &Core, tenant: &Arc<Tenant>, prompts: &[Prompt]) -> Result<Merged, GenerateError> {
        let generations = self.generations(prompts)?;
        let places = core.enter(tenant, &generations)?;
        let streams = places.into_iter().zip(generations).enumerate().map(|(index, (place, generation))| {
            core.generate_after(self.spent, place, generation).map(move |output| (index, output)).boxed()
        });
        let mut merged: SelectAll<BoxStream<'static, Indexed>> = streams.collect();
        match merged.next().await {
            Some((_, Err(e))) => Err(e),
            Some(first) => Ok(Box::pin(futures::stream::iter([first]).chain(merged))),
            None => Err(GenerateError::Internal("a sequence ended without a word".into())),
        }
    }
}

/// A choice as it grows.
#[derive(Default)]
pub struct Choice {
    /// All text so far.
    pub text: String,
    /// All tokens so far.
    pub tokens: Vec<OutputToken>,
    /// The log-probabilities of prompt tokens 1, 2, ...
    pub prompt_logprobs: Vec<OutputToken>,
    /// The end, once it has come.
    pub finished: Option<Finished>,
}

impl Choice {
    /// Takes the next output.
    pub fn take(&mut self, output: Output) {
        match output {
            Output::PromptLogprobs(tokens) => self.prompt_logprobs = tokens,
            Output::Token { token, text, stage: _ } => {
                self.tokens.push(token);
                self.text += &text;
            }
            Output::Finished(finished) => {
                self.text += &finished.text;
                self.finished = Some(*finished);
            }
        }
    }

    /// Ids of the output.
    pub fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|t| t.token).collect()
    }
}

/// All choices, complete; the first error of any ends the request.
pub async fn collect(mut merged: Merged, choices: usize) -> Result<Vec<Choice>, GenerateError> {
    let mut all: Vec<Choice> = (0..choices).map(|_| Choice::default()).collect();
    while let Some((index, output)) = merged.next().await {
        all[index].take(output?);
    }
    Ok(all)
}

/// vLLM's `stop_reason`: the stop text or token of the request that was met.
pub fn stop_reason(finished: &Finished) -> Value {
    match &finished.stop {
        Some(StopCause::Text(text)) => json!(text),
        Some(StopCause::Token(id)) => json!(id),
        None => Value::Null,
    }
}

/// `usage`.
#[derive(Clone, Copy, Default, Serialize)]
pub struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptDetails,
}

#[derive(Clone, Copy, Default, Serialize)]
struct PromptDetails {
    cached_tokens: u32,
}

impl Usage {
    /// Adds a choice. The prompt's tokens count once for all choices of a prompt: those of its first.
    pub fn add(&mut self, finished: &Finished, first_of_prompt: bool) {
        if first_of_prompt {
            self.prompt_tokens += finished.prompt_tokens;
            self.prompt_tokens_details.cached_tokens += finished.timings.prefill_cached_tokens;
        }
        self.completion_tokens += finished.completion_tokens;
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
    }
}
