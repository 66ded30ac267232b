//! The gRPC API: `overfill.v1.Router`.

mod chat;

use std::{pin::Pin, sync::Arc, time::Duration};

use futures::{Stream, StreamExt as _};
use overfill_cluster::{http::Crowded, traces};
use overfill_kv::{RequestId, Role, SamplingParams, sampling::MAX_STOP_TOKENS};
use overfill_proto::v1::{self, generate_event, generate_request, router_server};
use overfill_text::AnswerFormat;
use tokio::time::Instant;
use tonic::{Extensions, Request, Response, Status};
use tracing::{Instrument as _, Span, info_span};

use crate::{
    GenerateError,
    admission::Place,
    constraints,
    generate::Core,
    legs::{Leg, LegTimes, Legs},
    metrics::RequestFailure,
    openai::{answer::AnswerReader, conversation::Rendered},
    request::{self, Generation, Lifetime, Output},
    tenants::{TENANT_HEADER, Tenant},
};

/// Maximum time limit of a request: one day.
pub(crate) const MAX_DEADLINE: Duration = Duration::from_secs(24 * 3600);

/// A request that has passed all checks.
struct Checked {
    generation: Generation,
    /// The time that its first legs took.
    spent: LegTimes,
    /// What to look for in the answer of a chat.
    format: Option<AnswerFormat>,
}

/// The service over gRPC.
pub struct RouterService {
    core: Core,
}

impl RouterService {
    /// The service over this core.
    pub fn new(core: Core) -> Self {
        Self { core }
    }

    /// Checks a request and puts it into the queue.
    async fn admit(&self, request: Request<v1::GenerateRequest>) -> Result<(Place, Checked, Span), GenerateError> {
        let tenant = self.identify(&request)?;
        let request_id = request::new_request_id();
        let span = info_span!(
            "request",
            otel.name = "overfill.v1.Router/Generate",
            otel.kind = "server",
            request = %request_id,
            trace_id = tracing::field::Empty
        );
        traces::continue_from(&span, &request.metadata().clone().into_headers());
        let checked = self.check(request_id, request.into_inner()).instrument(span.clone()).await?;
        let place = self.core.enter(&tenant, std::slice::from_ref(&checked.generation))?.pop();
        let place = place.ok_or_else(|| GenerateError::Internal("admission gave no place".into()))?;
        Ok((place, checked, span))
    }

    fn identify<T>(&self, request: &Request<T>) -> Result<Arc<Tenant>, GenerateError> {
        check_crowd(request.extensions())?;
        let text = |name: &str| request.metadata().get(name).and_then(|value| value.to_str().ok());
        self.core.identify(text("authorization"), text(TENANT_HEADER))
    }

    /// Checks a request.
    async fn check(&self, request_id: RequestId, wire: v1::GenerateRequest) -> Result<Checked, GenerateError> {
        let arrived = Instant::now();
        let mut legs = Legs::new(Span::current());
        legs.enter(Leg::Queue);
        let v1::GenerateRequest {
            model,
            prompt,
            sampling,
            max_tokens,
            stop,
            ignore_eos,
            deadline_seconds,
            priority,
            stop_token_ids,
            include_stop,
            keep_special_tokens,
            bad_words,
            prompt_logprobs,
            truncate_prompt_tokens,
            mode,
        } = wire;
        let mode =
            v1::Mode::try_from(mode).map_err(|e| GenerateError::limit("mode", "draft, refresh or exact", e.0))?.named();
        let time = match deadline_seconds {
            0.0 => self.core.default_time,
            seconds if seconds > 0.0 && seconds <= MAX_DEADLINE.as_secs_f64() => Duration::from_secs_f64(seconds),
            other => return Err(GenerateError::limit("deadline_seconds", "in [0, 86400]", other)),
        };
        let lifetime = Lifetime { arrived, time };
        let model = self.core.model(&model, arrived, Some(time)).await?;
        legs.leave();
        let pool = &self.core.text_pool;
        let mut chat: Option<Rendered> = None;
        let mut prompt = match prompt {
            Some(generate_request::Prompt::Text(text)) => {
                legs.enter(Leg::Tokenize);
                pool.encode(&model.text, text, true, lifetime).await?
            }
            Some(generate_request::Prompt::Messages(messages)) => {
                legs.enter(Leg::Tokenize);
                let settings = &self.core.settings;
                let conversation = chat::conversation(messages, settings)?;
                let mut rendered = conversation.render(&model, settings, pool, lifetime).await?;
                let text = std::mem::take(&mut rendered.prompt);
                chat = Some(rendered);
                pool.encode(&model.text, text, false, lifetime).await?
            }
            Some(generate_request::Prompt::TokenIds(ids)) => ids.ids,
            None => {
                return Err(GenerateError::invalid(
                    "prompt",
                    "prompt must be text, messages or token_ids, got nothing",
                ));
            }
        };
        legs.leave();
        if truncate_prompt_tokens > 0 {
            prompt.drain(..prompt.len().saturating_sub(truncate_prompt_tokens as usize));
        }
        request::check_prompt(&model, &prompt)?;
        request::check_stops(&stop)?;
        let max_tokens = request::check_length(&model, prompt.len(), (max_tokens > 0).then_some(max_tokens))?;
        let mut sampling = match sampling {
            Some(sampling) => SamplingParams::try_from(sampling)
                .map_err(|e| GenerateError::limit(&format!("sampling.{}", e.field), e.limit, e.value))?,
            None => SamplingParams { seed: request::random_seed(), ..SamplingParams::default() },
        };
        sampling
            .validate(model.vocab_size as usize)
            .map_err(|e| GenerateError::limit(&format!("sampling.{}", e.field), e.limit, e.value))?;
        if sampling.bad_words.is_empty() {
            sampling.bad_words = constraints::bad_words(&model.text, &bad_words)?;
        } else if !bad_words.is_empty() {
            return Err(GenerateError::invalid("bad_words", "bad_words and sampling.bad_words: only one can be given"));
        }
        let own: &[u32] = if ignore_eos { &[] } else { &model.eos_token_ids };
        let stop_token_ids: Arc<[u32]> = own.iter().chain(&stop_token_ids).copied().collect();
        if stop_token_ids.len() > MAX_STOP_TOKENS {
            let limit = format!("at most {} ids", MAX_STOP_TOKENS.saturating_sub(own.len()));
            return Err(GenerateError::limit("stop_token_ids", limit, stop_token_ids.len() - own.len()));
        }
        constraints::hold_back_ends(&mut sampling, &stop_token_ids, max_tokens)?;
        if let Some(grammar) = &sampling.grammar {
            constraints::check_grammar(pool, "sampling.grammar", grammar, lifetime).await?;
        }
        let format = match chat {
            Some(rendered) => {
                sampling.grammar = rendered.grammar(&model, sampling.grammar.as_ref())?;
                Some(rendered.format)
            }
            None => None,
        };
        let generation = Generation {
            request_id,
            prompt: prompt.into(),
            sampling,
            max_tokens,
            stop_token_ids,
            stop,
            include_stop,
            skip_special: !keep_special_tokens,
            shown_special: format.iter().flat_map(|format| model.text.special_ids(format.markers())).collect(),
            prompt_logprobs,
            mode,
            priority,
            arrived,
            time,
            model,
        };
        Ok(Checked { generation, spent: legs.times(), format })
    }
}

/// Returns an error if the connection exceeds the limit of connections with running requests.
pub(crate) fn check_crowd(extensions: &Extensions) -> Result<(), GenerateError> {
    match extensions.get::<Crowded>() {
        None => Ok(()),
        Some(Crowded) => Err(GenerateError::Unavailable("too many connections have requests in progress".into())),
    }
}

fn event(output: Output, reader: Option<&mut AnswerReader>, model: &str, full_model: &str) -> v1::GenerateEvent {
    let parts = reader.map_or_else(Vec::new, |reader| chat::parts(reader.take(&output)));
    let event = match output {
        Output::PromptLogprobs(tokens) => {
            let tokens = tokens.into_iter().map(Into::into).collect();
            generate_event::Event::PromptLogprobs(v1::PromptLogprobs { tokens })
        }
        Output::Token { token, text, stage } => generate_event::Event::Token(v1::GeneratedToken {
            token: Some(token.into()),
            text,
            stage: v1::Role::from(stage).into(),
            model: match stage {
                Role::Prefill => full_model.to_owned(),
                Role::Decode => model.to_owned(),
            },
            parts,
        }),
        Output::Finished(finished) => generate_event::Event::Finished(v1::GenerateFinished {
            reason: v1::FinishReason::from(finished.reason).into(),
            text: finished.text,
            prompt_tokens: finished.prompt_tokens,
            completion_tokens: finished.completion_tokens,
            timings: Some(finished.timings.into()),
            parts,
        }),
    };
    v1::GenerateEvent { event: Some(event) }
}

#[tonic::async_trait]
impl router_server::Router for RouterService {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<v1::GenerateEvent, Status>> + Send>>;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let asked = request.get_ref().model.clone();
        let count = |e: &GenerateError| self.core.metrics.refused(&self.core.catalog.label(&asked), e.reason());
        let (place, Checked { generation, spent, format }, span) = self.admit(request).await.inspect_err(count)?;
        let (model, full_model) = (generation.model.name.clone(), generation.model.full_model.clone());
        let outputs = span.in_scope(|| self.core.generate_after(spent, RequestFailure::default(), place, generation));
        let mut reader = format.as_ref().map(AnswerReader::new);
        let events = outputs.map(move |output| {
            output.map(|output| event(output, reader.as_mut(), &model, &full_model)).map_err(Status::from)
        });
        Ok(Response::new(Box::pin(events)))
    }

    async fn list_models(
        &self,
        request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        self.identify(&request)?;
        let view = self.core.nodes.view();
        let models = self.core.catalog.list().into_iter().map(|listed| v1::ServedModel {
            decode_nodes: view.decode.iter().filter(|node| node.info.serves(&listed.name)).count() as u32,
            max_context_tokens: listed.served.as_ref().map_or(0, |model| model.max_context_tokens),
            full_model: listed.served.map_or_else(String::new, |model| model.full_model.clone()),
            watch: self.core.watch.summary(&listed.name).map(Into::into),
            name: listed.name,
        });
        Ok(Response::new(v1::ListModelsResponse { models: models.collect() }))
    }

    async fn list_nodes(
        &self,
        request: Request<v1::ListNodesRequest>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        self.identify(&request)?;
        Ok(Response::new(v1::ListNodesResponse {
            nodes: self.core.nodes.statuses().into_iter().map(Into::into).collect(),
        }))
    }
}
