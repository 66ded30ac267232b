//! From the wire to a checked [`Request`]: every refusal names the field, its limit and its value, and nothing is
//! allocated before it.

use std::time::Duration;

use overfill_kv::{KvSchema, RequestId, SamplingParams, SchemaMismatch};
use overfill_proto::{InvalidField, v1};
use tokio::time::Instant;
use tonic::Status;

use crate::{args::MAX_DEADLINE_SECONDS, sequence::Request};

/// Most ids that may end a text.
const MAX_STOP_TOKENS: usize = 256;

/// What a request is checked against.
#[derive(Clone, Debug)]
pub struct RequestLimits {
    /// Schema of the KV that the node's model attends to.
    pub schema: KvSchema,
    /// Longest prompt and output: what the model allows and the pool holds.
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
    /// The node's model was not made for that full model's KV.
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
    pub fn check(&self, wire: v1::DecodeRequest, now: Instant) -> Result<Request, RequestError> {
        let v1::DecodeRequest {
            request_id,
            prompt_tokens: tokens,
            sampling,
            max_tokens,
            stop_token_ids,
            deadline_seconds,
            generated_tokens,
            producer,
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
        let room = max - count;
        let max_tokens = max_tokens as usize;
        if max_tokens < 2 || max_tokens > room {
            let limit = format!("in [2, {room}] after {count} prompt tokens in a context of {max}");
            return Err(InvalidField::new("max_tokens", limit, max_tokens).into());
        }
        let generated = generated_tokens as usize;
        if generated >= count {
            let limit = format!("less than the {count} prompt tokens");
            return Err(InvalidField::new("generated_tokens", limit, generated).into());
        }
        if stop_token_ids.len() > MAX_STOP_TOKENS {
            let limit = format!("at most {MAX_STOP_TOKENS} ids");
            return Err(InvalidField::new("stop_token_ids", limit, format!("{} ids", stop_token_ids.len())).into());
        }
        let sampling = sampling.map(SamplingParams::from).unwrap_or_default();
        sampling.validate(self.schema.vocab_size as usize).map_err(|e| InvalidField::new(e.field, e.limit, e.value))?;
        let deadline = now + self.check_deadline(deadline_seconds)?;
        let producer = self.check_producer(producer)?;
        Ok(Request {
            id: RequestId(request_id),
            tokens,
            generated,
            sampling,
            max_tokens,
            stop_token_ids,
            producer,
            deadline,
        })
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

    /// The model that will compute the prompt's KV: as asked, else as the own model names it.
    fn check_producer(&self, asked: String) -> Result<Option<String>, SchemaMismatch> {
        match (&self.schema.full_model, asked.is_empty()) {
            (own, true) => Ok(own.clone()),
            (Some(own), false) if *own != asked => {
                Err(SchemaMismatch { field: "full_model", producer: asked, consumer: own.clone() })
            }
            _ => Ok(Some(asked)),
        }
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

    fn good() -> v1::DecodeRequest {
        v1::DecodeRequest { request_id: "r".into(), prompt_tokens: vec![1; 20], max_tokens: 44, ..Default::default() }
    }

    fn refused(change: impl FnOnce(&mut v1::DecodeRequest)) -> String {
        let mut wire = good();
        change(&mut wire);
        limits().check(wire, Instant::now()).unwrap_err().to_string()
    }

    #[test]
    fn a_good_request_is_taken() {
        let now = Instant::now();
        let request = limits().check(good(), now).unwrap();
        assert_eq!(request.producer.as_deref(), Some("f"));
        assert_eq!(request.deadline, now + Duration::from_secs(9));
    }

    #[test]
    fn a_request_for_the_process_before_is_refused() {
        assert_eq!(refused(|r| r.incarnation = "0".into()), "incarnation 0 of this node is gone; this is 1");
    }

    #[test]
    fn refusals_name_field_limit_and_value() {
        assert_eq!(refused(|r| r.prompt_tokens.clear()), "prompt_tokens must be 1 to 64 tokens, got 0 tokens");
        assert!(refused(|r| r.prompt_tokens = vec![1; 65]).ends_with("got 65 tokens"));
        assert!(refused(|r| r.prompt_tokens[3] = 100).ends_with("below the vocabulary size 100, got 100"));
        let long = "max_tokens must be in [2, 44] after 20 prompt tokens in a context of 64, got 45";
        assert_eq!(refused(|r| r.max_tokens = 45), long);
        assert!(refused(|r| r.max_tokens = 1).starts_with("max_tokens must be"));
        assert!(refused(|r| r.generated_tokens = 20).starts_with("generated_tokens must be less than the 20"));
        assert!(refused(|r| r.deadline_seconds = -1.0).starts_with("deadline_seconds must be"));
        assert!(refused(|r| r.stop_token_ids = vec![0; 300]).ends_with("got 300 ids"));
        assert!(refused(|r| r.producer = "g".into()).starts_with("kv schema mismatch: full_model is g"));
    }
}
