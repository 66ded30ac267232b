//! Checks of the request fields that both roles have. An error names the field, its limit and its value. Nothing is
//! allocated for a request before it has passed.

use std::{sync::Arc, time::Duration};

use overfill_kv::{RequestId, SamplingParams, SchemaMismatch};
use overfill_proto::{InvalidField, v1};
use tokio::time::Instant;
use tonic::Status;

use crate::{Identity, MAX_DEADLINE_SECONDS};

/// The limits for requests.
#[derive(Clone, Debug)]
pub struct RequestLimits {
    /// Identity of the node: incarnation, context length, schema.
    pub identity: Arc<Identity>,
    /// Time limit of a request that sets no deadline.
    pub default_deadline: Duration,
}

/// Why a request is invalid for this node.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// A field has an invalid value.
    #[error(transparent)]
    Field(#[from] InvalidField),
    /// The KV of the prefill node does not fit the model of the decode node.
    #[error(transparent)]
    Schema(#[from] SchemaMismatch),
    /// The request names another incarnation, usually an earlier process at this address.
    #[error("incarnation {asked} of this node is gone; this is {own}")]
    Restarted {
        /// Incarnation that the request names.
        asked: String,
        /// Incarnation of this process.
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

/// Why an engine refused a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The maximum number of requests, the field, is waiting already.
    #[error("the queue is full: {0} requests are waiting")]
    QueueFull(usize),
    /// The node is shutting down, or the engine has ended.
    #[error("the node is shutting down")]
    Draining,
}

impl From<Refused> for Status {
    fn from(e: Refused) -> Self {
        match e {
            Refused::QueueFull(_) => Status::resource_exhausted(e.to_string()),
            Refused::Draining => Status::unavailable(e.to_string()),
        }
    }
}

/// Request fields that both roles have, unchecked.
#[derive(Clone, Debug, Default)]
pub struct CommonFields {
    /// Id of the request.
    pub request_id: String,
    /// Token ids of the prompt, followed by those of earlier output.
    pub prompt_tokens: Vec<u32>,
    /// Sampling parameters; `None`: the defaults.
    pub sampling: Option<v1::SamplingParams>,
    /// Deadline in seconds after the arrival of the request; 0: the node's default.
    pub deadline_seconds: f64,
    /// Number of tokens at the end of `prompt_tokens` that are earlier output.
    pub generated_tokens: u32,
    /// Incarnation of the node that the request is meant for; empty: any.
    pub incarnation: String,
}

/// Request fields that both roles have, checked.
#[derive(Clone, Debug)]
pub struct Common {
    /// Id of the request.
    pub id: RequestId,
    /// Token ids of the prompt, followed by those of earlier output; at least one token.
    pub tokens: Vec<u32>,
    /// Sampling parameters.
    pub sampling: SamplingParams,
    /// Number of tokens at the end of `tokens` that are earlier output. Penalties treat them as output.
    pub generated: usize,
    /// Time at which the request fails if it has not ended.
    pub deadline: Instant,
}

impl RequestLimits {
    /// Checks the common fields of a request that arrived at `now`.
    ///
    /// # Errors
    /// The request names another incarnation, or a field has an invalid value.
    pub fn check(&self, fields: CommonFields, now: Instant) -> Result<Common, RequestError> {
        let CommonFields {
            request_id,
            prompt_tokens: tokens,
            sampling,
            deadline_seconds,
            generated_tokens,
            incarnation,
        } = fields;
        if !incarnation.is_empty() && incarnation != self.identity.incarnation {
            return Err(RequestError::Restarted { asked: incarnation, own: self.identity.incarnation.clone() });
        }
        if request_id.is_empty() || request_id.len() > 256 {
            let length = format!("{} bytes", request_id.len());
            return Err(InvalidField::new("request_id", "1 to 256 bytes", length).into());
        }
        let (count, max) = (tokens.len(), self.identity.max_context_tokens);
        if count == 0 || count > max {
            return Err(
                InvalidField::new("prompt_tokens", format!("1 to {max} tokens"), format!("{count} tokens")).into()
            );
        }
        let vocab_size = self.identity.schema.vocab_size;
        if let Some(id) = tokens.iter().find(|id| **id >= vocab_size) {
            let limit = format!("of ids below the vocabulary size {vocab_size}");
            return Err(InvalidField::new("prompt_tokens", limit, id).into());
        }
        let generated = generated_tokens as usize;
        if generated >= count {
            let limit = format!("less than the {count} prompt tokens");
            return Err(InvalidField::new("generated_tokens", limit, generated).into());
        }
        let sampling = sampling.map(SamplingParams::try_from).transpose()?.unwrap_or_default();
        sampling.validate(vocab_size as usize).map_err(|e| InvalidField::new(e.field, e.limit, e.value))?;
        let deadline = now + self.check_deadline(deadline_seconds)?;
        Ok(Common { id: RequestId(request_id), tokens, sampling, generated, deadline })
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

    /// For tests: limits of a node with incarnation `1` and a context of 64 tokens.
    #[doc(hidden)]
    pub fn of_a_small_node(role: overfill_kv::Role) -> Self {
        use overfill_kv::{KvDtype, KvSchema, RopeSpec};
        let schema = KvSchema {
            layers: vec![0, 1],
            kv_heads: 2,
            head_dim: 8,
            rope: RopeSpec { theta: 1e4, scaling: "none".into() },
            layer_attention: Vec::new(),
            dtype: KvDtype::F32,
            block_tokens: 16,
            vocab_size: 100,
            tokenizer_sha256: "aa".into(),
            full_model: Some("f".into()),
        };
        let identity = Identity {
            role,
            node_id: "n".into(),
            incarnation: "1".into(),
            pool: "pool".into(),
            cluster: String::new(),
            variants: Vec::new(),
            model: "m".into(),
            schema,
            max_context_tokens: 64,
            total_blocks: 4,
            max_running: 1,
            kv_endpoint: None,
            kv_transports: "tcp".into(),
            weights: "f32".into(),
            eos_token_ids: vec![],
        };
        Self { identity: Arc::new(identity), default_deadline: Duration::from_secs(9) }
    }
}

#[cfg(test)]
mod tests {
    use overfill_kv::Role;

    use super::*;

    fn check(change: impl FnOnce(&mut CommonFields)) -> Result<Common, String> {
        let mut fields = CommonFields { request_id: "r".into(), prompt_tokens: vec![1; 20], ..CommonFields::default() };
        change(&mut fields);
        let now = Instant::now();
        let checked = RequestLimits::of_a_small_node(Role::Decode).check(fields, now);
        assert!(checked.as_ref().is_ok_and(|r| r.deadline <= now + Duration::from_secs(9)) || checked.is_err());
        checked.map_err(|e| e.to_string())
    }

    fn refused(change: impl FnOnce(&mut CommonFields)) -> String {
        check(change).unwrap_err()
    }

    #[test]
    fn a_good_request_is_taken() {
        let request = check(|r| r.generated_tokens = 3).unwrap();
        assert_eq!((request.tokens.len(), request.generated), (20, 3));
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
        assert!(refused(|r| r.deadline_seconds = -1.0).starts_with("deadline_seconds must be"));
        let hot = v1::SamplingParams { top_p: 1.0, repetition_penalty: 1.0, temperature: -1.0, ..Default::default() };
        assert_eq!(refused(|r| r.sampling = Some(hot)), "temperature must be in [0, 100], got -1");
    }
}
