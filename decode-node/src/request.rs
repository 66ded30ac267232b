//! Converts a decode request from its wire form to a checked [`Request`]. An error names the field, its limit and its
//! value. Nothing is allocated for a request before it has passed.

use overfill_kv::{KvSchema, SchemaMismatch, Ticket, sampling::MAX_STOP_TOKENS};
use overfill_node::{
    Identity, RequestError, RequestLimits,
    request::{Common, CommonFields},
};
use overfill_proto::{InvalidField, MAX_SECONDS_PER_DRAFT, ticket_from_wire, v1};
use tokio::time::Instant;

use crate::{extension::Chosen, sequence::Request};

/// Checks a request that arrived at `now`.
///
/// # Errors
/// A field has an invalid value, the request names another incarnation, or it names another full model than this node's
/// model.
pub fn check(limits: &RequestLimits, wire: v1::DecodeRequest, now: Instant) -> Result<Request, RequestError> {
    let v1::DecodeRequest {
        request_id,
        prompt_tokens,
        sampling,
        max_tokens,
        stop_token_ids,
        deadline_seconds,
        generated_tokens,
        producer,
        incarnation,
        mode,
        model,
    } = wire;
    let mode = v1::Mode::try_from(mode).map_err(|e| InvalidField::new("mode", "a known mode", e))?;
    let fields = CommonFields { request_id, prompt_tokens, sampling, deadline_seconds, generated_tokens, incarnation };
    let Common { id, tokens, sampling, generated, deadline } = limits.check(fields, now)?;
    let (count, max) = (tokens.len(), limits.identity.max_context_tokens);
    let room = max - count;
    let max_tokens = max_tokens as usize;
    if max_tokens < 2 || max_tokens > room {
        let limit = format!("in [2, {room}] after {count} prompt tokens in a context of {max}");
        return Err(InvalidField::new("max_tokens", limit, max_tokens).into());
    }
    if stop_token_ids.len() > MAX_STOP_TOKENS {
        let limit = format!("at most {MAX_STOP_TOKENS} ids");
        return Err(InvalidField::new("stop_token_ids", limit, format!("{} ids", stop_token_ids.len())).into());
    }
    let variant = check_model(&limits.identity, &model)?;
    let producer = check_producer(&limits.identity.schema, producer)?;
    let mode = mode.named().unwrap_or_default();
    Ok(Request {
        id,
        variant,
        tokens,
        generated,
        sampling,
        constraint: None,
        max_tokens,
        stop_token_ids,
        producer,
        deadline,
        mode,
    })
}

/// Which of the node's models a request names.
fn check_model(identity: &Identity, model: &str) -> Result<usize, InvalidField> {
    if model.is_empty() {
        return Ok(0);
    }
    let names: Vec<&str> = std::iter::once(&identity.model).chain(&identity.variants).map(String::as_str).collect();
    let place = names.iter().position(|name| *name == model);
    place.ok_or_else(|| InvalidField::new("model", format!("one of {}", names.join(", ")), model))
}

/// Checks a verdict. Returns the ticket of its request, and what was chosen; `None` if the extension was lost.
///
/// # Errors
/// A field has an invalid value, or the request names another incarnation.
pub fn check_verdict(
    limits: &RequestLimits,
    wire: v1::VerdictRequest,
) -> Result<(Ticket, Option<Chosen>), RequestError> {
    let v1::VerdictRequest { request_id, incarnation, ticket, position, tokens, lost, seconds_per_draft } = wire;
    let ticket = ticket_from_wire(&ticket)?;
    // Nothing was chosen then, but the other fields are checked.
    let prompt_tokens = if lost { vec![0] } else { tokens };
    let fields = CommonFields { request_id, prompt_tokens, incarnation, ..Default::default() };
    let Common { tokens, .. } = limits.check(fields, Instant::now())?;
    if let Some(seconds) = seconds_per_draft.filter(|seconds| !(0.0..=MAX_SECONDS_PER_DRAFT).contains(seconds)) {
        return Err(InvalidField::new("seconds_per_draft", format!("in [0, {MAX_SECONDS_PER_DRAFT}]"), seconds).into());
    }
    let chosen = Chosen { position: position as usize, tokens, seconds_per_draft };
    Ok((ticket, (!lost).then_some(chosen)))
}

/// Fingerprint of the full model that computes the prompt's KV: the one that the request names, else the one in this
/// node's schema. It is an error if both are given and differ.
fn check_producer(own: &KvSchema, asked: String) -> Result<Option<String>, SchemaMismatch> {
    match (&own.full_model, asked.is_empty()) {
        (own, true) => Ok(own.clone()),
        (Some(own), false) if *own != asked => {
            Err(SchemaMismatch { field: "full_model", producer: asked, consumer: own.clone() })
        }
        _ => Ok(Some(asked)),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use overfill_kv::Role;

    use super::*;

    fn limits() -> RequestLimits {
        RequestLimits::of_a_small_node(Role::Decode)
    }

    fn good() -> v1::DecodeRequest {
        v1::DecodeRequest { request_id: "r".into(), prompt_tokens: vec![1; 20], max_tokens: 44, ..Default::default() }
    }

    fn refused(change: impl FnOnce(&mut v1::DecodeRequest)) -> String {
        let mut wire = good();
        change(&mut wire);
        check(&limits(), wire, Instant::now()).unwrap_err().to_string()
    }

    #[test]
    fn a_good_request_is_taken() {
        let now = Instant::now();
        let request = check(&limits(), good(), now).unwrap();
        assert_eq!(request.producer.as_deref(), Some("f"));
        assert_eq!(request.deadline, now + Duration::from_secs(9));
    }

    #[test]
    fn refusals_name_field_limit_and_value() {
        assert!(refused(|r| r.prompt_tokens = vec![1; 65]).ends_with("got 65 tokens"));
        let long = "max_tokens must be in [2, 44] after 20 prompt tokens in a context of 64, got 45";
        assert_eq!(refused(|r| r.max_tokens = 45), long);
        assert!(refused(|r| r.max_tokens = 1).starts_with("max_tokens must be"));
        assert!(refused(|r| r.stop_token_ids = vec![0; 300]).ends_with("got 300 ids"));
        assert!(refused(|r| r.producer = "g".into()).starts_with("kv schema mismatch: full_model is g"));
    }
}
