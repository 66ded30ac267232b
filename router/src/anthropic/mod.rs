//! Anthropic's Messages API: `/v1/messages` and `/v1/messages/count_tokens`.

mod error;
mod input;
mod output;

use std::sync::Arc;

use axum::{
    Extension, Json,
    body::Bytes,
    extract::{State, rejection::BytesRejection},
    http::HeaderMap,
    response::{IntoResponse as _, Response},
};
use futures::StreamExt as _;
use serde_json::{Value, json};
use tracing::Instrument as _;

pub use self::error::rewrite;
use self::{input::Ask, output::Writer};
use crate::{
    GenerateError,
    generate::Core,
    node::ServedModel,
    openai::{
        Intake, body, caller::Caller, conversation::Prepared, error::ApiError, fields::Fields, request_span, sse,
    },
    request,
};

/// Handles `POST /v1/messages`.
pub async fn messages(
    State(core): State<Core>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    bytes: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let id = format!("msg_{}", request::new_request_id());
    let span = request_span("POST /v1/messages", &id, &headers);
    let answered = async {
        let (fields, name) = fields(bytes)?;
        let answered = answer(&core, &caller, Intake::at(&core, &caller, id), &name, fields).await;
        answered.map_err(|e| e.of_model(core.catalog.label(&name)))
    };
    Box::pin(answered).instrument(span).await
}

/// Handles `POST /v1/messages/count_tokens`.
pub async fn count_tokens(
    State(core): State<Core>,
    Extension(caller): Extension<Caller>,
    bytes: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, ApiError> {
    let (fields, name) = fields(bytes)?;
    let counted = async {
        let _counted = caller.tenant.count(0)?;
        let mut intake = Intake::at(&core, &caller, String::new());
        let model = intake.model(&core, &caller, &name).await?;
        let Prepared { prompt, .. } = prepare(fields, model, intake, false).await?.0;
        Ok(Json(json!({"input_tokens": prompt.tokens.len()})))
    };
    counted.await.map_err(|e: GenerateError| ApiError::from(e).of_model(core.catalog.label(&name)))
}

/// The fields of a body, and the name of the model.
fn fields(bytes: Result<Bytes, BytesRejection>) -> Result<(Fields, String), ApiError> {
    let mut fields = Fields::parse(&body(bytes)?)?;
    let name = fields.take::<String>("model")?.unwrap_or_default();
    Ok((fields, name))
}

/// A chat that is ready to be answered, and the request's `max_tokens`. Takes every field except `model`. `generates`: whether
/// an answer is wanted, not only a count of tokens.
pub async fn prepare(
    fields: Fields,
    model: Arc<ServedModel>,
    intake: Intake<'_>,
    generates: bool,
) -> Result<(Prepared, u32), GenerateError> {
    let Ask { asked, conversation, max_tokens } = Ask::parse(fields, model.text.generation_defaults(), generates)?;
    Ok((conversation.prepare(asked, model, intake).await.map_err(input::renamed)?, max_tokens))
}

async fn answer(
    core: &Core,
    caller: &Caller,
    mut intake: Intake<'_>,
    name: &str,
    fields: Fields,
) -> Result<Response, ApiError> {
    let model = intake.model(core, caller, name).await?;
    let (prepared, max_tokens) = prepare(fields, model, intake, true).await?;
    let mut merged = prepared.batch.start(core, &caller.tenant, std::slice::from_ref(&prepared.prompt)).await?;
    let streamed = prepared.batch.common.stream;
    let mut writer = Writer::new(&prepared, max_tokens);
    if streamed {
        return Ok(sse::answer(writer.begin(), merged, move |output| match output {
            Ok(output) => writer.take(&output),
            Err(e) => vec![error::body(&e)],
        }));
    }
    while let Some((_, output)) = merged.next().await {
        writer.take(&output.map_err(ApiError::of_sequence)?);
    }
    let whole = writer.ended().ok_or_else(|| GenerateError::Internal("the answer has no end".into()))?;
    Ok(Json(whole).into_response())
}
