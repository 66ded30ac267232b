//! From the wire to a checked [`Request`]: every refusal names the field, its limit and its value, and nothing is
//! allocated before it.

use std::time::Duration;

use overfill_kv::{BLOCK_TOKENS, KvSchema, RequestId, SamplingParams, SchemaMismatch};
use overfill_proto::{InvalidField, ticket_from_wire, v1};
use tokio::time::Instant;
use tonic::Status;

use crate::{
    args::MAX_DEADLINE_SECONDS,
    job::{Handoff, Request},
};

/// What a request is checked against.
#[derive(Clone, Debug)]
pub struct RequestLimits {
    /// Schema of the KV that the node computes.
    pub schema: KvSchema,
    /// Longest prompt: what the model allows and the pool holds.
    pub max_context_tokens: usize,
    /// For requests without a deadline of their own.
    pub default_deadline: Duration,
    /// This process: a request for another one, at the same address, is not for it.
    pub incarnation: String,
}

/// A request that can't be served.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// A field with a value it may not have.
    #[error(transparent)]
    Field(#[from] InvalidField),
    /// The decode node can't use this node's KV.
    #[error(transparent)]
    Schema(#[from] SchemaMismatch),
    /// The request was meant for the process that was here before.
    #[error("incarnation {asked} of this node is gone; this is {own}")]
    Restarted {
        /// Which was meant.
        asked: String,
        /// Which this is.
        own: String,
    },
}

impl From<RequestError> for Status {
    fn from(e: RequestError) -> Self {
        match e {
            RequestError::Field(e) => e.into(),
            RequestError::Schema(_) | RequestError::Restarted { .. } => Status::failed_precondition(e.to_string()),
        }
    }
}

impl RequestLimits {
    /// Checks a request that arrived at `now`.
    pub fn check(&self, wire: v1::PrefillRequest, now: Instant) -> Result<Request, RequestError> {
        let v1::PrefillRequest {
            request_id,
            prompt_tokens: tokens,
            sampling,
            handoff,
            prompt_logprobs,
            deadline_seconds,
            generated_tokens,
            incarnation,
        } = wire;
        if !incarnation.is_empty() && incarnation != self.incarnation {
            return Err(RequestError::Restarted { asked: incarnation, own: self.incarnation.clone() });
        }
        if request_id.is_empty() || request_id.len() > 256 {
            let length = format!("{} bytes", request_id.len());
            return Err(InvalidField::new("request_id", "1 to 256 bytes", length).into());
        }
        let (count, max) = (tokens.len(), self.max_context_tokens);
        if count == 0 || count > max {
            return Err(
                InvalidField::new("prompt_tokens", format!("1 to {max} tokens"), format!("{count} tokens")).into()
            );
        }
        if let Some(id) = tokens.iter().find(|id| **id >= self.schema.vocab_size) {
            let limit = format!("of ids below the vocabulary size {}", self.schema.vocab_size);
            return Err(InvalidField::new("prompt_tokens", limit, id).into());
        }
        let generated = generated_tokens as usize;
        if generated >= count {
            let limit = format!("less than the {count} prompt tokens");
            return Err(InvalidField::new("generated_tokens", limit, generated).into());
        }
        let sampling = sampling.map(SamplingParams::from).unwrap_or_default();
        sampling.validate(self.schema.vocab_size as usize).map_err(|e| InvalidField::new(e.field, e.limit, e.value))?;
        let handoff = handoff.map(|handoff| self.check_handoff(handoff, count)).transpose()?;
        let deadline = now + self.check_deadline(deadline_seconds)?;
        Ok(Request { id: RequestId(request_id), tokens, generated, sampling, prompt_logprobs, handoff, deadline })
    }

    fn check_deadline(&self, seconds: f64) -> Result<Duration, InvalidField> {
        if seconds == 0.0 {
            return Ok(self.default_deadline);
        }
        if seconds > 0.0 && seconds <= MAX_DEADLINE_SECONDS {
            return Ok(Duration::from_secs_f64(seconds));
        }
        Err(InvalidField::new("deadline_seconds", format!("in [0, {MAX_DEADLINE_SECONDS}]"), seconds))
    }

    fn check_handoff(&self, wire: v1::HandoffTarget, prompt_tokens: usize) -> Result<Handoff, RequestError> {
        let v1::HandoffTarget { ticket, kv_endpoint, kv_schema, held_tokens } = wire;
        let ticket = ticket_from_wire(&ticket)?;
        if kv_endpoint.is_empty() || kv_endpoint.len() > 512 {
            let length = format!("{} bytes", kv_endpoint.len());
            return Err(InvalidField::new("handoff.kv_endpoint", "1 to 512 bytes", length).into());
        }
        let schema = kv_schema.ok_or_else(|| InvalidField::new("handoff.kv_schema", "present", "nothing"))?;
        let schema = KvSchema::try_from(schema)?;
        self.schema.check_consumer(&schema)?;
        let held = held_tokens as usize;
        if !held.is_multiple_of(BLOCK_TOKENS) || held >= prompt_tokens {
            let limit = format!("a multiple of {BLOCK_TOKENS} below the {prompt_tokens} prompt tokens");
            return Err(InvalidField::new("handoff.held_tokens", limit, held).into());
        }
        Ok(Handoff { ticket, endpoint: kv_endpoint, schema, held_blocks: held / BLOCK_TOKENS })
    }
}

#[cfg(test)]
mod tests {
    use overfill_kv::{KvDtype, RopeSpec};

    use super::*;

    fn limits() -> RequestLimits {
        RequestLimits {
            schema: KvSchema {
                layers: vec![0, 1],
                kv_heads: 2,
                head_dim: 8,
                rope: RopeSpec { theta: 1e4, scaling: "none".into() },
                dtype: KvDtype::F32,
                block_tokens: 16,
                vocab_size: 100,
                tokenizer_sha256: "aa".into(),
                full_model: Some("f".into()),
            },
            max_context_tokens: 64,
            default_deadline: Duration::from_secs(9),
            incarnation: "1".into(),
        }
    }

    fn good() -> v1::PrefillRequest {
        v1::PrefillRequest {
            request_id: "r".into(),
            prompt_tokens: vec![1; 20],
            sampling: Some((&SamplingParams::greedy()).into()),
            handoff: Some(v1::HandoffTarget {
                ticket: vec![1; 16],
                kv_endpoint: "127.0.0.1:1".into(),
                kv_schema: Some((&limits().schema).into()),
                held_tokens: 16,
            }),
            ..Default::default()
        }
    }

    fn refused(change: impl FnOnce(&mut v1::PrefillRequest)) -> String {
        let mut wire = good();
        change(&mut wire);
        limits().check(wire, Instant::now()).unwrap_err().to_string()
    }

    #[test]
    fn a_good_request_is_taken() {
        let now = Instant::now();
        let request = limits().check(good(), now).unwrap();
        assert_eq!(request.handoff.unwrap().held_blocks, 1);
        assert_eq!(request.deadline, now + Duration::from_secs(9));
    }

    #[test]
    fn a_request_for_the_process_before_is_refused() {
        assert_eq!(refused(|r| r.incarnation = "0".into()), "incarnation 0 of this node is gone; this is 1");
    }

    #[test]
    fn refusals_name_field_limit_and_value() {
        assert_eq!(refused(|r| r.prompt_tokens.clear()), "prompt_tokens must be 1 to 64 tokens, got 0 tokens");
        assert_eq!(refused(|r| r.prompt_tokens = vec![1; 65]), "prompt_tokens must be 1 to 64 tokens, got 65 tokens");
        let outside = refused(|r| r.prompt_tokens[3] = 100);
        assert_eq!(outside, "prompt_tokens must be of ids below the vocabulary size 100, got 100");
        assert!(refused(|r| r.request_id.clear()).starts_with("request_id must be"));
        assert!(refused(|r| r.generated_tokens = 20).starts_with("generated_tokens must be less than the 20"));
        assert!(refused(|r| r.deadline_seconds = f64::NAN).starts_with("deadline_seconds must be"));
        let hot = v1::SamplingParams { top_p: 1.0, repetition_penalty: 1.0, temperature: -1.0, ..Default::default() };
        assert_eq!(refused(|r| r.sampling = Some(hot)), "temperature must be in [0, 100], got -1");
        fn target(r: &mut v1::PrefillRequest) -> &mut v1::HandoffTarget {
            r.handoff.as_mut().unwrap()
        }
        assert!(refused(|r| target(r).held_tokens = 15).starts_with("handoff.held_tokens must be a multiple of 16"));
        assert!(refused(|r| target(r).held_tokens = 32).starts_with("handoff.held_tokens must be"));
        assert!(refused(|r| target(r).ticket.clear()).starts_with("ticket must be 16 bytes"));
        assert!(refused(|r| target(r).kv_schema = None).starts_with("handoff.kv_schema must be present"));
        let other = |r: &mut v1::PrefillRequest| target(r).kv_schema.as_mut().unwrap().full_model = "g".into();
        assert!(refused(other).starts_with("kv schema mismatch: full_model is"));
    }
}
