//! The gRPC API: `overfill.v1.Router`.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures::{Stream, StreamExt as _};
use overfill_cluster::{http::Crowded, traces};
use overfill_kv::{RequestId, Role, SamplingParams};
use overfill_proto::v1::{self, generate_event, generate_request, router_server};
use overfill_text::ChatMessage;
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
    prompt::ChatPrompt,
    request::{self, Generation, Lifetime, Output},
    tenants::{TENANT_HEADER, Tenant},
};

/// Maximum time limit of a request: one day.
pub(crate) const MAX_DEADLINE: Duration = Duration::from_secs(24 * 3600);

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
    async fn admit(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<(Place, Generation, LegTimes, Span), GenerateError> {
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
        let (generation, spent) = self.check(request_id, request.into_inner()).instrument(span.clone()).await?;
        let place = self.core.enter(&tenant, std::slice::from_ref(&generation))?.pop();
        let place = place.ok_or_else(|| GenerateError::Internal("admission gave no place".into()))?;
        Ok((place, generation, spent, span))
    }

    fn identify<T>(&self, request: &Request<T>) -> Result<Arc<Tenant>, GenerateError> {
        check_crowd(request.extensions())?;
        let text = |name: &str| request.metadata().get(name).and_then(|value| value.to_str().ok());
        self.core.identify(text("authorization"), text(TENANT_HEADER))
    }

    /// Checks a request. Also returns the time that its first legs took.
    async fn check(
        &self,
        request_id: RequestId,
        wire: v1::GenerateRequest,
    ) -> Result<(Generation, LegTimes), GenerateError> {
        let arrived = Instant::now();
        let mut legs = Legs::new(Span::current());
        legs.enter(Leg::Queue);
        let v1::GenerateRequest { model, prompt, sampling, max_tokens, stop, ignore_eos, deadline_seconds, priority } =
            wire;
        let time = match deadline_seconds {
            0.0 => self.core.default_time,
            seconds if seconds > 0.0 && seconds <= MAX_DEADLINE.as_secs_f64() => Duration::from_secs_f64(seconds),
            other => return Err(GenerateError::limit("deadline_seconds", "in [0, 86400]", other)),
        };
        let lifetime = Lifetime { arrived, time };
        let model = self.core.model(&model, arrived, Some(time)).await?;
        legs.leave();
        let pool = &self.core.text_pool;
        let prompt = match prompt {
            Some(generate_request::Prompt::Text(text)) => {
                legs.enter(Leg::Tokenize);
                pool.encode(&model.text, text, true, lifetime).await?
            }
            Some(generate_request::Prompt::Messages(messages)) => {
                legs.enter(Leg::Tokenize);
                let messages = messages.messages.into_iter().map(|m| ChatMessage::new(m.role, m.content));
                let text = pool.render(&model.text, ChatPrompt::new(messages), lifetime).await?;
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
        let stop_token_ids = if ignore_eos { [].into() } else { model.eos_token_ids.clone() };
        constraints::hold_back_ends(&mut sampling, &stop_token_ids, max_tokens)?;
        if let Some(grammar) = &sampling.grammar {
            constraints::check_grammar(pool, "sampling.grammar", grammar, lifetime).await?;
        }
        let generation = Generation {
            request_id,
            prompt: prompt.into(),
            sampling,
            max_tokens,
            stop_token_ids,
            stop,
            include_stop: false,
            skip_special: true,
            shown_special: [].into(),
            prompt_logprobs: false,
            priority,
            arrived,
            time,
            model,
        };
        Ok((generation, legs.times()))
    }
}

/// Returns an error if the connection exceeds the limit of connections with running requests.
pub(crate) fn check_crowd(extensions: &Extensions) -> Result<(), GenerateError> {
    match extensions.get::<Crowded>() {
        None => Ok(()),
        Some(Crowded) => Err(GenerateError::Unavailable("too many connections have requests in progress".into())),
    }
}

fn event(output: Output, model: &str, full_model: &str) -> Option<v1::GenerateEvent> {
    let event = match output {
        Output::PromptLogprobs(_) => return None,
        Output::Token { token, text, stage } => generate_event::Event::Token(v1::GeneratedToken {
            token: Some(token.into()),
            text,
            stage: v1::Role::from(stage).into(),
            model: match stage {
                Role::Prefill => full_model.to_owned(),
                Role::Decode => model.to_owned(),
            },
        }),
        Output::Finished(finished) => generate_event::Event::Finished(v1::GenerateFinished {
            reason: v1::FinishReason::from(finished.reason).into(),
            text: finished.text,
            prompt_tokens: finished.prompt_tokens,
            completion_tokens: finished.completion_tokens,
            timings: Some(finished.timings.into()),
        }),
    };
    Some(v1::GenerateEvent { event: Some(event) })
}

#[tonic::async_trait]
impl router_server::Router for RouterService {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<v1::GenerateEvent, Status>> + Send>>;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let asked = request.get_ref().model.clone();
        let count = |e: &GenerateError| self.core.metrics.refused(&self.core.catalog.label(&asked), e.reason());
        let (place, generation, spent, span) = self.admit(request).await.inspect_err(count)?;
        let (model, full_model) = (generation.model.name.clone(), generation.model.full_model.clone());
        let outputs = span.in_scope(|| self.core.generate_after(spent, RequestFailure::default(), place, generation));
        let events = outputs.filter_map(move |output| {
            let event = output.map(|output| event(output, &model, &full_model)).map_err(Status::from).transpose();
            std::future::ready(event)
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
            decode_nodes: view.decode.iter().filter(|node| node.info.model == listed.name).count() as u32,
            max_context_tokens: listed.served.as_ref().map_or(0, |model| model.max_context_tokens),
            full_model: listed.served.map_or_else(String::new, |model| model.full_model.clone()),
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
