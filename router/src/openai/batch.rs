//! The sequences of one HTTP request: `n` sequences for every prompt.

use std::{pin::Pin, sync::Arc};

use futures::{
    Stream, StreamExt as _,
    stream::{BoxStream, SelectAll},
};
use overfill_kv::{OutputToken, SamplingParams, sampling::MAX_STOP_TOKENS};
use serde::Serialize;
use serde_json::{Value, json};

use super::{error::ApiError, fields::Common};
use crate::{
    GenerateError, constraints,
    generate::Core,
    legs::LegTimes,
    metrics::RequestFailure,
    node::ServedModel,
    request::{self, Finished, Generation, Lifetime, Output, StopCause},
    tenants::Tenant,
};

/// Index of a choice, and its next output.
pub type Indexed = (usize, Result<Output, GenerateError>);

/// The merged outputs of all choices. Dropping the stream ends all choices on all nodes.
pub type Merged = Pin<Box<dyn Stream<Item = Indexed> + Send>>;

/// One prompt of a request.
pub struct Prompt {
    /// The prompt's token ids.
    pub tokens: Arc<[u32]>,
    /// The text that the client sent, or the decoded token ids. Empty if the text is not needed.
    pub text: String,
}

/// Parameters that the sequences of a request share.
pub struct Batch {
    /// The model.
    pub model: Arc<ServedModel>,
    /// Shared request fields.
    pub common: Common,
    /// Sampling parameters with `logprobs` set. The seed is set per sequence.
    pub sampling: SamplingParams,
    /// The request's `max_tokens`. Prompt and `max_tokens` together must fit the context.
    pub max_tokens: Option<u32>,
    /// Default of `max_tokens`. It is reduced to what fits the context.
    pub default_max_tokens: u32,
    /// Whether to compute log-probabilities of the prompt.
    pub prompt_logprobs: bool,
    /// Special tokens that are part of the text even if it omits the others.
    pub shown_special: Arc<[u32]>,
    /// Arrival and time limit of the request.
    pub lifetime: Lifetime,
    /// Time already spent in the legs that all sequences share.
    pub spent: LegTimes,
}

impl Batch {
    /// Creates the sequences: `n` for every prompt, in order.
    pub fn generations(&self, prompts: &[Prompt]) -> Result<Vec<Generation>, GenerateError> {
        let Self {
            model,
            common,
            sampling,
            max_tokens,
            default_max_tokens,
            prompt_logprobs,
            shown_special,
            lifetime,
            spent: _,
        } = self;
        sampling.validate(model.vocab_size as usize).map_err(|e| GenerateError::limit(e.field, e.limit, e.value))?;
        let stop_token_ids: Arc<[u32]> = match common.ignore_eos {
            true => common.stop_token_ids.clone().into(),
            false => model.eos_token_ids.iter().chain(&common.stop_token_ids).copied().collect(),
        };
        let own = common.stop_token_ids.len();
        if stop_token_ids.len() > MAX_STOP_TOKENS {
            let limit = format!("at most {} ids", MAX_STOP_TOKENS.saturating_sub(stop_token_ids.len() - own));
            return Err(GenerateError::limit("stop_token_ids", limit, own));
        }
        let bad_words = constraints::bad_words(&model.text, &common.bad_words)?;
        let mut generations = Vec::with_capacity(prompts.len() * common.n);
        for prompt in prompts {
            request::check_prompt(model, &prompt.tokens)?;
            let scoring = *max_tokens == Some(0);
            let asked = if scoring { Some(1) } else { *max_tokens };
            let fits = request::check_length(model, prompt.tokens.len(), asked)?;
            let fits = if asked.is_none() { fits.min(*default_max_tokens) } else { fits };
            let max_tokens = if scoring { 0 } else { fits };
            let mut sampling = SamplingParams { bad_words: bad_words.clone(), ..sampling.clone() };
            constraints::hold_back_ends(&mut sampling, &stop_token_ids, fits)?;
            for choice in 0..common.n {
                let seed = common.seed.map_or_else(request::random_seed, |seed| seed.wrapping_add(choice as u64));
                generations.push(Generation {
                    request_id: request::new_request_id(),
                    model: model.clone(),
                    prompt: prompt.tokens.clone(),
                    sampling: SamplingParams { seed, ..sampling.clone() },
                    max_tokens,
                    stop_token_ids: stop_token_ids.clone(),
                    stop: common.stop.clone(),
                    include_stop: common.include_stop,
                    skip_special: common.skip_special,
                    shown_special: shown_special.clone(),
                    prompt_logprobs: *prompt_logprobs,
                    mode: common.mode,
                    priority: common.priority,
                    arrived: lifetime.arrived,
                    time: lifetime.time,
                });
            }
        }
        Ok(generations)
    }

    /// Starts every sequence in its place in the queue, and waits for the first output. A request that fails at once can
    /// then be answered with an error status instead of a stream.
    pub async fn start(&self, core: &Core, tenant: &Arc<Tenant>, prompts: &[Prompt]) -> Result<Merged, ApiError> {
        if let (Some(grammar), Some(field)) = (&self.common.sampling.grammar, self.common.structured) {
            constraints::check_grammar(&core.text_pool, field, grammar, self.lifetime).await?;
        }
        let generations = self.generations(prompts)?;
        let places = core.enter(tenant, &generations)?;
        let failure = RequestFailure::default();
        let streams = places.into_iter().zip(generations).enumerate().map(|(index, (place, generation))| {
            core.generate_after(self.spent, failure.clone(), place, generation)
                .map(move |output| (index, output))
                .boxed()
        });
        let mut merged: SelectAll<BoxStream<'static, Indexed>> = streams.collect();
        match merged.next().await {
            Some((_, Err(e))) => Err(ApiError::of_sequence(e)),
            Some(first) => Ok(Box::pin(futures::stream::iter([first]).chain(merged))),
            None => Err(GenerateError::Internal("all sequences ended without output".into()).into()),
        }
    }
}

/// Accumulates the outputs of one choice.
#[derive(Default)]
pub struct Choice {
    /// Text so far.
    pub text: String,
    /// Output tokens so far.
    pub tokens: Vec<OutputToken>,
    /// The log-probabilities of prompt tokens 1, 2, ...
    pub prompt_logprobs: Vec<OutputToken>,
    /// How the choice ended. `None` while it is running.
    pub finished: Option<Finished>,
}

impl Choice {
    /// Adds the next output.
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

    /// Token ids of the output.
    pub fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|t| t.token).collect()
    }
}

/// Waits for all choices to end. The first error ends the request.
pub async fn collect(mut merged: Merged, choices: usize) -> Result<Vec<Choice>, ApiError> {
    let mut all: Vec<Choice> = (0..choices).map(|_| Choice::default()).collect();
    while let Some((index, output)) = merged.next().await {
        all[index].take(output.map_err(ApiError::of_sequence)?);
    }
    Ok(all)
}

/// vLLM's `stop_reason`: the request's stop string or stop token that ended the choice, else null.
pub fn stop_reason(finished: &Finished) -> Value {
    match &finished.stop {
        Some(StopCause::Text(text)) => json!(text),
        Some(StopCause::Token(id)) => json!(id),
        None => Value::Null,
    }
}

/// The `usage` object of a response.
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
    /// Adds a choice. The prompt's tokens are counted once per prompt, with its first choice.
    pub fn add(&mut self, finished: &Finished, first_of_prompt: bool) {
        if first_of_prompt {
            self.prompt_tokens += finished.prompt_tokens;
            self.prompt_tokens_details.cached_tokens += finished.timings.prefill_cached_tokens;
        }
        self.completion_tokens += finished.completion_tokens;
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
    }
}
