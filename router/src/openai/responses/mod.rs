//! `POST /v1/responses`, OpenAI's Responses API. Nothing is stored, so each request has the whole conversation.

mod input;
mod output;

use std::sync::Arc;

use axum::{
    Json,
    body::Bytes,
    response::{IntoResponse as _, Response},
};
use futures::StreamExt as _;
use serde_json::{Map, Value};

use self::{input::Ask, output::Writer};
use super::{Intake, caller::Caller, conversation::Prepared, error::ApiError, fields::Fields, sse};
use crate::{GenerateError, generate::Core, node::ServedModel};

/// Handles a request.
pub async fn create(core: Core, caller: Caller, body: Bytes, id: String) -> Result<Response, ApiError> {
    let intake = Intake::at(&core, &caller, id);
    let mut fields = Fields::parse(&body)?;
    drop(body);
    let name = fields.take::<String>("model")?.unwrap_or_default();
    let answered = answer(&core, &caller, intake, &name, fields).await;
    answered.map_err(|e| e.of_model(core.catalog.label(&name)))
}

/// A chat that is ready to be answered, and the fields that its answer repeats. Takes every field except `model`.
pub async fn prepare(
    fields: Fields,
    model: Arc<ServedModel>,
    intake: Intake<'_>,
) -> Result<(Prepared, Map<String, Value>), GenerateError> {
    let Ask { asked, conversation, echo } = Ask::parse(fields, model.text.generation_defaults())?;
    Ok((conversation.prepare(asked, model, intake).await.map_err(input::renamed)?, echo))
}

async fn answer(
    core: &Core,
    caller: &Caller,
    mut intake: Intake<'_>,
    name: &str,
    fields: Fields,
) -> Result<Response, ApiError> {
    let model = intake.model(core, caller, name).await?;
    let (prepared, echo) = prepare(fields, model, intake).await?;
    let mut merged = prepared.batch.start(core, &caller.tenant, std::slice::from_ref(&prepared.prompt)).await?;
    let streamed = prepared.batch.common.stream;
    let mut writer = Writer::new(prepared, echo);
    if streamed {
        return Ok(sse::answer(writer.begin(), merged, move |output| match output {
            Ok(output) => writer.take(output),
            Err(e) => vec![writer.fail(&e)],
        }));
    }
    while let Some((_, output)) = merged.next().await {
        writer.take(output.map_err(ApiError::of_sequence)?);
    }
    let whole = writer.ended().ok_or_else(|| GenerateError::Internal("the answer has no end".into()))?;
    Ok(Json(whole).into_response())
}
