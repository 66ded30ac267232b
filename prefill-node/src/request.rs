//! Converts a prefill request from its wire form to a checked [`Request`]. An error names the field, its limit and its
//! value. Nothing is allocated for a request before it has passed.

use overfill_kv::{BLOCK_TOKENS, KvEndpoint, KvSchema, Ticket};
use overfill_node::{
    RequestError, RequestLimits,
    request::{Common, CommonFields},
};
use overfill_proto::{InvalidField, ticket_from_wire, v1};
use tokio::time::Instant;
use tracing::Span;

use crate::{
    extension::{ExtendReply, Extension, MAX_DRAFTS, MAX_EXTENSION_TOKENS},
    job::{Handoff, Request},
    score::ScoreRequest,
};

/// Checks a request that arrived at `now`.
///
/// # Errors
/// A field has an invalid value, the request names another incarnation, or the receiver's KV schema does not match.
pub fn check(limits: &RequestLimits, wire: v1::PrefillRequest, now: Instant) -> Result<Request, RequestError> {
    let v1::PrefillRequest {
        request_id,
        prompt_tokens,
        sampling,
        handoff,
        prompt_logprobs,
        deadline_seconds,
        generated_tokens,
        incarnation,
        lease,
    } = wire;
    let fields = CommonFields { request_id, prompt_tokens, sampling, deadline_seconds, generated_tokens, incarnation };
    let Common { id, tokens, sampling, generated, deadline } = limits.check(fields, now)?;
    let handoff = handoff.map(|handoff| check_handoff(limits, handoff, tokens.len())).transpose()?;
    let lease = if lease.is_empty() { None } else { Some(check_lease(&lease)?) };
    let span = Span::current();
    Ok(Request { id, tokens, generated, sampling, constraint: None, prompt_logprobs, handoff, lease, deadline, span })
}

fn check_lease(bytes: &[u8]) -> Result<Ticket, InvalidField> {
    Ticket::from_bytes(bytes).ok_or_else(|| InvalidField::new("lease", "16 bytes", format!("{} bytes", bytes.len())))
}

/// Checks an extension that arrived at `now`. `reply` receives its result.
///
/// # Errors
/// As [`check`].
pub fn check_extension(
    limits: &RequestLimits,
    wire: v1::ExtendRequest,
    now: Instant,
    reply: ExtendReply,
) -> Result<Extension, RequestError> {
    let v1::ExtendRequest {
        request_id,
        incarnation,
        lease,
        position,
        tokens,
        standing_tokens,
        choose,
        handoff,
        handoff_end_tokens,
        deadline_seconds,
    } = wire;
    let (position, standing) = (position as usize, standing_tokens as usize);
    let room = limits.identity.max_context_tokens.saturating_sub(position).min(MAX_EXTENSION_TOKENS);
    if tokens.is_empty() || tokens.len() > room {
        let limit = format!("1 to {room} tokens behind position {position}");
        return Err(InvalidField::new("tokens", limit, format!("{} tokens", tokens.len())).into());
    }
    let least = if choose { tokens.len().saturating_sub(MAX_DRAFTS).max(1) } else { tokens.len() };
    if !(least..=tokens.len()).contains(&standing) {
        let limit = format!("in [{least}, {}]", tokens.len());
        return Err(InvalidField::new("standing_tokens", limit, standing).into());
    }
    let fields =
        CommonFields { request_id, prompt_tokens: tokens, deadline_seconds, incarnation, ..Default::default() };
    let Common { id, tokens, deadline, .. } = limits.check(fields, now)?;
    let end = handoff_end_tokens as usize;
    let handoff = handoff.map(|handoff| {
        // The last standing token may be computed again, so the block that it completes can't be sent meanwhile.
        let most = position + standing - usize::from(choose);
        if !end.is_multiple_of(BLOCK_TOKENS) || end > most {
            let limit = format!("a multiple of {BLOCK_TOKENS} up to {most}");
            return Err(InvalidField::new("handoff_end_tokens", limit, end).into());
        }
        check_handoff(limits, handoff, end)
    });
    let (handoff, lease) = (handoff.transpose()?, check_lease(&lease)?);
    let handoff_end_blocks = if handoff.is_some() { end / BLOCK_TOKENS } else { 0 };
    Ok(Extension {
        id,
        lease,
        position,
        tokens,
        standing,
        choose,
        handoff,
        handoff_end_blocks,
        arrived: now,
        deadline,
        reply,
    })
}

/// Checks a request to score an output that arrived at `now`.
///
/// # Errors
/// As [`check`].
pub fn check_score(limits: &RequestLimits, wire: v1::ScoreRequest, now: Instant) -> Result<ScoreRequest, RequestError> {
    let v1::ScoreRequest { request_id, incarnation, tokens, generated_tokens, sampling, deadline_seconds } = wire;
    if generated_tokens == 0 {
        return Err(InvalidField::new("generated_tokens", "1 or more", 0).into());
    }
    let fields =
        CommonFields { request_id, prompt_tokens: tokens, sampling, deadline_seconds, generated_tokens, incarnation };
    let Common { id, tokens, sampling, generated, deadline } = limits.check(fields, now)?;
    Ok(ScoreRequest { id, tokens, generated, sampling, deadline })
}

fn check_handoff(
    limits: &RequestLimits,
    wire: v1::HandoffTarget,
    prompt_tokens: usize,
) -> Result<Handoff, RequestError> {
    let v1::HandoffTarget { ticket, kv_endpoint, kv_schema, held_tokens } = wire;
    let ticket = ticket_from_wire(&ticket)?;
    let endpoint = kv_endpoint.ok_or_else(|| InvalidField::new("handoff.kv_endpoint", "present", "nothing"))?;
    let endpoint = KvEndpoint::try_from(endpoint)?;
    let schema = kv_schema.ok_or_else(|| InvalidField::new("handoff.kv_schema", "present", "nothing"))?;
    let schema = KvSchema::try_from(schema)?;
    limits.identity.schema.check_consumer(&schema)?;
    let held = held_tokens as usize;
    if !held.is_multiple_of(BLOCK_TOKENS) || held >= prompt_tokens {
        let limit = format!("a multiple of {BLOCK_TOKENS} below the {prompt_tokens} prompt tokens");
        return Err(InvalidField::new("handoff.held_tokens", limit, held).into());
    }
    Ok(Handoff { ticket, endpoint, schema, held_blocks: held / BLOCK_TOKENS })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use overfill_kv::{Role, SamplingParams};

    use super::*;

    fn limits() -> RequestLimits {
        RequestLimits::of_a_small_node(Role::Prefill)
    }

    fn good() -> v1::PrefillRequest {
        v1::PrefillRequest {
            request_id: "r".into(),
            prompt_tokens: vec![1; 20],
            sampling: Some((&SamplingParams::greedy()).into()),
            handoff: Some(v1::HandoffTarget {
                ticket: vec![1; 16],
                kv_endpoint: Some(KvEndpoint::new("127.0.0.1:1".into()).into()),
                kv_schema: Some((&limits().identity.schema).into()),
                held_tokens: 16,
            }),
            ..Default::default()
        }
    }

    fn refused(change: impl FnOnce(&mut v1::HandoffTarget)) -> String {
        let mut wire = good();
        change(wire.handoff.as_mut().unwrap());
        check(&limits(), wire, Instant::now()).unwrap_err().to_string()
    }

    #[test]
    fn a_good_request_is_taken() {
        let now = Instant::now();
        let request = check(&limits(), good(), now).unwrap();
        assert_eq!(request.handoff.unwrap().held_blocks, 1);
        assert_eq!(request.deadline, now + Duration::from_secs(9));
    }

    #[test]
    fn refusals_name_field_limit_and_value() {
        let long = v1::PrefillRequest { prompt_tokens: vec![1; 65], ..good() };
        let refusal = check(&limits(), long, Instant::now()).unwrap_err().to_string();
        assert_eq!(refusal, "prompt_tokens must be 1 to 64 tokens, got 65 tokens");
        assert!(refused(|h| h.held_tokens = 15).starts_with("handoff.held_tokens must be a multiple of 16"));
        assert!(refused(|h| h.held_tokens = 32).starts_with("handoff.held_tokens must be"));
        assert!(refused(|h| h.ticket.clear()).starts_with("ticket must be 16 bytes"));
        assert!(refused(|h| h.kv_endpoint = None).starts_with("handoff.kv_endpoint must be present"));
        let empty = KvEndpoint::new(String::new());
        let refusal = refused(|h| h.kv_endpoint = Some(empty.into()));
        assert_eq!(refusal, "kv_endpoint.tcp.address must be 1 to 512 bytes, got 0 bytes");
        let unknown = refused(|h| h.kv_endpoint = Some(v1::KvEndpoint { transport: None }));
        assert_eq!(unknown, "kv_endpoint must be of a known transport: tcp, got nothing");
        assert!(refused(|h| h.kv_schema = None).starts_with("handoff.kv_schema must be present"));
        let other = |h: &mut v1::HandoffTarget| h.kv_schema.as_mut().unwrap().full_model = "g".into();
        assert!(refused(other).starts_with("kv schema mismatch: full_model is"));
    }
}
