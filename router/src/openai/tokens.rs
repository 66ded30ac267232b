//! `POST /tokenize`, `POST /detokenize` and `GET /tokenizer_info`, as in vLLM.

use std::sync::Arc;

use axum::{
    Extension, Json,
    body::Bytes,
    extract::{
        Query, State,
        rejection::{BytesRejection, QueryRejection},
    },
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Intake, body, caller::Caller, conversation::Conversation, error::ApiError, fields::Fields};
use crate::{GenerateError, generate::Core, node::ServedModel};

/// Handles `POST /tokenize`.
pub async fn tokenize(
    State(core): State<Core>,
    Extension(caller): Extension<Caller>,
    bytes: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, ApiError> {
    answer(&core, &caller, bytes, async |fields, model, intake| {
        let (text, add_special) = match (fields.take::<String>("prompt")?, fields.has("messages")) {
            (Some(_), true) => {
                return Err(GenerateError::invalid("prompt", "prompt and messages exclude each other"));
            }
            (Some(text), false) => (text, true),
            (None, true) => {
                let Intake { pool, settings, lifetime, .. } = intake;
                let chat = Conversation::take(fields, settings)?;
                (chat.render(&model, settings, pool, lifetime).await?.prompt, false)
            }
            (None, false) => return Err(GenerateError::invalid("prompt", "prompt or messages is missing")),
        };
        let add_special = fields.take("add_special_tokens")?.unwrap_or(add_special);
        let with_texts = fields.take("return_token_strs")?.unwrap_or(false);
        std::mem::take(fields).finish()?;
        let tokens = intake.pool.encode(&model.text, text, add_special, intake.lifetime).await?;
        let texts = with_texts.then(|| tokens.iter().map(|id| model.text.token(*id)).collect::<Vec<_>>());
        Ok(json!({"count": tokens.len(), "max_model_len": model.max_context_tokens, "tokens": tokens,
                  "token_strs": texts}))
    })
    .await
}

/// Handles `POST /detokenize`.
pub async fn detokenize(
    State(core): State<Core>,
    Extension(caller): Extension<Caller>,
    bytes: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, ApiError> {
    answer(&core, &caller, bytes, async |fields, model, intake| {
        let tokens: Vec<i64> =
            fields.take("tokens")?.ok_or_else(|| GenerateError::invalid("tokens", "tokens is missing"))?;
        std::mem::take(fields).finish()?;
        let below = |id: &i64| u32::try_from(*id).ok().filter(|id| *id < model.vocab_size);
        let check = |id: i64| {
            below(&id)
                .ok_or_else(|| GenerateError::limit("tokens", format!("of token ids below {}", model.vocab_size), id))
        };
        let tokens = tokens.into_iter().map(check).collect::<Result<Vec<u32>, _>>()?;
        let text = intake.pool.decode(&model.text, tokens, intake.lifetime).await?;
        Ok(json!({"prompt": text}))
    })
    .await
}

/// The query of `GET /tokenizer_info`.
#[derive(Deserialize)]
pub struct InfoQuery {
    /// Name of the model. A router that serves only one needs no name.
    model: Option<String>,
}

/// Handles `GET /tokenizer_info`: the special tokens by the names of tokenizer_config.json. Clients without the tokenizer's
/// files, such as lm-evaluation-harness, need `eos_token`.
pub async fn tokenizer_info(
    State(core): State<Core>,
    Extension(caller): Extension<Caller>,
    query: Result<Query<InfoQuery>, QueryRejection>,
) -> Result<Json<Value>, ApiError> {
    let Query(query) = query.map_err(|e| ApiError::bad_request(e.body_text()))?;
    let name = query.model.unwrap_or_default();
    let mut intake = Intake::at(&core, &caller, String::new());
    let model = intake.model(&core, &caller, &name).await;
    let model = model.map_err(|e| ApiError::from(e).of_model(core.catalog.label(&name)))?;
    let mut info = json!(model.text.special_tokens());
    if info["eos_token"].is_null() {
        info["eos_token"] = model.eos_token_ids.first().and_then(|id| model.text.token(*id)).into();
    }
    Ok(Json(info))
}

/// Answers a request for a model that needs no node. It counts against the requests of its tenant.
async fn answer(
    core: &Core,
    caller: &Caller,
    bytes: Result<Bytes, BytesRejection>,
    answer: impl AsyncFnOnce(&mut Fields, Arc<ServedModel>, Intake<'_>) -> Result<Value, GenerateError>,
) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::parse(&body(bytes)?)?;
    let name = fields.take::<String>("model")?.unwrap_or_default();
    let mut intake = Intake::at(core, caller, String::new());
    let answered = async {
        let _counted = caller.tenant.count(0)?;
        let model = intake.model(core, caller, &name).await?;
        answer(&mut fields, model, intake).await
    };
    answered.await.map(Json).map_err(|e| ApiError::from(e).of_model(core.catalog.label(&name)))
}
