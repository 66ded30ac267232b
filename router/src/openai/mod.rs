//! The OpenAI HTTP API, with vLLM's extensions.

pub mod answer;
pub mod batch;
pub mod blocks;
pub mod caller;
mod chat;
mod completions;
pub mod conversation;
pub mod error;
pub mod fields;
pub mod history;
mod logprobs;
pub mod messages;
mod producers;
mod prompt_logprobs;
mod responses;
pub mod sse;
pub mod structured;
mod tokens;
pub mod tools;
mod whole;

use std::{
    error::Error,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::{
    Extension, Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, Path, Request, State, rejection::BytesRejection},
    http::{HeaderMap, HeaderValue, StatusCode},
    middleware::{Next, from_fn, from_fn_with_state, map_response},
    response::Response,
    routing::{get, post},
};
use caller::Caller;
use error::{ApiError, Refusal};
use fields::Fields;
use overfill_cluster::{http::SlowBody, traces};
use serde_json::{Value, json};
use tracing::{Instrument as _, Span, info_span};

use crate::{
    GenerateError, anthropic,
    catalog::Listed,
    generate::Core,
    http,
    legs::{Leg, Legs},
    node::ServedModel,
    prompt::TextPool,
    request::{self, Generation, Lifetime},
    settings::RequestSettings,
};

type Checked = Result<Vec<Generation>, ApiError>;

/// The routes of all APIs over HTTP.
///
/// Layers run from the last one to the first one. So a client is identified before its body is unpacked.
pub fn routes(core: Core, max_body_bytes: usize, allowed_origins: &[HeaderValue]) -> Router {
    let layered = |routes: Router<Core>| {
        routes
            .route_layer(from_fn(http::decompress))
            .route_layer(from_fn_with_state(core.clone(), caller::identify))
            .route_layer(from_fn_with_state(core.clone(), count_refusals))
    };
    let messages = Router::new()
        .route("/v1/messages", post(anthropic::messages))
        .route("/v1/messages/count_tokens", post(anthropic::count_tokens));
    let messages = layered(messages).route_layer(map_response(anthropic::rewrite));
    let routes = Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/responses", post(responses))
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/tokenizer_info", get(tokens::tokenizer_info))
        .route("/version", get(async || Json(json!({"version": env!("CARGO_PKG_VERSION")}))));
    let routes = layered(routes)
        .merge(messages)
        .fallback(async || ApiError::bad_request("no such path").with_status(StatusCode::NOT_FOUND))
        .method_not_allowed_fallback(async || {
            ApiError::bad_request("no such method for this path").with_status(StatusCode::METHOD_NOT_ALLOWED)
        })
        .layer(DefaultBodyLimit::max(max_body_bytes));
    let routes = match allowed_origins {
        [] => routes,
        origins => routes.layer(http::allow_origins(origins)),
    };
    routes.with_state(core)
}

/// Unwraps the body. A body that is too long gives status 413. A body that arrives too slowly gives 408.
pub fn body(result: Result<Bytes, BytesRejection>) -> Result<Bytes, ApiError> {
    result.map_err(|e| {
        let status = if is_slow(&e) { StatusCode::REQUEST_TIMEOUT } else { e.status() };
        ApiError::bad_request(e.body_text()).with_status(status)
    })
}

fn is_slow(e: &(dyn Error + 'static)) -> bool {
    e.is::<SlowBody>() || e.source().is_some_and(is_slow)
}

/// Middleware that counts the requests that are answered with an error.
async fn count_refusals(State(core): State<Core>, request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    let error: Option<&ApiError> = response.extensions().get();
    if let Some(Refusal { reason, model }) = error.and_then(ApiError::refusal) {
        core.metrics.refused(model, reason);
    }
    response
}

/// The span of a request. It continues the client's trace.
pub fn request_span(name: &str, id: &str, headers: &HeaderMap) -> Span {
    let span =
        info_span!("request", otel.name = name, otel.kind = "server", request = id, trace_id = tracing::field::Empty);
    traces::continue_from(&span, headers);
    span
}

async fn completions(
    State(core): State<Core>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    bytes: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let id = format!("cmpl-{}", request::new_request_id());
    let span = request_span("POST /v1/completions", &id, &headers);
    Box::pin(completions::create(core, caller, body(bytes)?, id)).instrument(span).await
}

async fn chat_completions(
    State(core): State<Core>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    bytes: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let id = format!("chatcmpl-{}", request::new_request_id());
    let span = request_span("POST /v1/chat/completions", &id, &headers);
    Box::pin(chat::create(core, caller, body(bytes)?, id)).instrument(span).await
}

async fn responses(
    State(core): State<Core>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    bytes: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let id = format!("resp_{}", request::new_request_id());
    let span = request_span("POST /v1/responses", &id, &headers);
    Box::pin(responses::create(core, caller, body(bytes)?, id)).instrument(span).await
}

/// Limits of [`check_body`].
#[derive(Clone, Copy, Debug)]
pub struct BodyLimits {
    /// Maximum number of sequences.
    pub sequences: usize,
    /// Time limit of each sequence.
    pub time: Duration,
}

impl BodyLimits {
    fn allow(self, count: usize) -> Result<(), GenerateError> {
        if count > self.sequences {
            return Err(GenerateError::limit("n", format!("at most {} with all prompts", self.sequences), count));
        }
        Ok(())
    }
}

/// A request while its fields are turned into sequences.
pub struct Intake<'a> {
    /// The id that the client sees.
    id: String,
    pool: &'a TextPool,
    /// Settings of chats.
    pub settings: &'a RequestSettings,
    lifetime: Lifetime,
    /// Measures the first legs, which all sequences share.
    legs: Legs,
}

impl<'a> Intake<'a> {
    /// A request with this lifetime.
    fn new(id: String, pool: &'a TextPool, settings: &'a RequestSettings, lifetime: Lifetime) -> Self {
        Self { id, pool, settings, lifetime, legs: Legs::new(Span::current()) }
    }

    /// A request of `caller`. Its time limit is the caller's, else the router's default.
    pub fn at(core: &'a Core, caller: &Caller, id: String) -> Self {
        let lifetime = Lifetime { arrived: caller.arrived, time: caller.time.unwrap_or(core.default_time) };
        Self::new(id, &core.text_pool, &core.settings, lifetime)
    }

    /// The model `name`. Waits if no node serves it yet.
    pub async fn model(&mut self, core: &Core, caller: &Caller, name: &str) -> Result<Arc<ServedModel>, GenerateError> {
        self.legs.enter(Leg::Queue);
        let model = core.model(name, self.lifetime.arrived, caller.time).await?;
        self.legs.leave();
        Ok(model)
    }
}

/// An API over HTTP that generates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HttpApi {
    /// OpenAI's completions.
    Completions,
    /// OpenAI's chat completions.
    ChatCompletions,
    /// OpenAI's responses.
    Responses,
    /// Anthropic's messages.
    Messages,
}

/// Checks the body of a request and returns its sequences. The router does the same before it uses a node.
pub async fn check_body(body: &Bytes, api: HttpApi, model: &Arc<ServedModel>, limits: BodyLimits) -> Checked {
    let mut fields = Fields::parse(body)?;
    fields.take::<String>("model")?;
    let (pool, settings) = (TextPool::default(), RequestSettings::default());
    let intake = Intake::new(String::new(), &pool, &settings, Lifetime::now(limits.time));
    let model = model.clone();
    match api {
        HttpApi::Completions => completions::generations(fields, model, intake, limits).await,
        HttpApi::ChatCompletions => chat::generations(fields, model, intake, limits).await,
        HttpApi::Responses => Ok(responses::prepare(fields, model, intake).await?.0.generations()?),
        HttpApi::Messages => Ok(anthropic::prepare(fields, model, intake, true).await?.0.generations()?),
    }
}

fn card(model: &Listed) -> Value {
    let Listed { name, created, served } = model;
    json!({"id": name, "object": "model", "created": created, "owned_by": "overfill",
           "root": served.as_ref().map(|served| &served.full_model), "parent": null,
           "max_model_len": served.as_ref().map(|served| served.max_context_tokens)})
}

async fn models(State(core): State<Core>) -> Json<Value> {
    Json(json!({"object": "list", "data": core.catalog.list().iter().map(card).collect::<Vec<_>>()}))
}

async fn model(State(core): State<Core>, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    let models = core.catalog.list();
    let model = models.iter().find(|model| model.name == name).ok_or_else(|| GenerateError::UnknownModel {
        served: models.iter().map(|model| model.name.as_str()).collect::<Vec<_>>().join(", "),
        model: name,
    })?;
    Ok(Json(card(model)))
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
