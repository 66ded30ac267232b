//! Conversions between generated messages and domain types. Conversions from messages reject values that the domain
//! type does not allow.

use overfill_kv::{
    FinishReason, Grammar, KvDtype, KvEndpoint, KvSchema, Mode, OutputToken, ProtocolVersions, Role, RopeSpec,
    SamplingParams, Ticket, TransferStats,
};

use crate::v1;

/// Maximum length of a KV endpoint's address, in bytes.
const MAX_ADDRESS_BYTES: usize = 512;

/// Error: a field of a received message has a value that is not allowed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{field} must be {limit}, got {value}")]
pub struct InvalidField {
    /// Name of the field, as in the .proto file, with dots for nested messages.
    pub field: &'static str,
    /// The allowed values, for the error text.
    pub limit: String,
    /// The value received.
    pub value: String,
}

impl InvalidField {
    /// An error for `field`, which must be `limit` but is `value`.
    pub fn new(field: &'static str, limit: impl Into<String>, value: impl ToString) -> Self {
        Self { field, limit: limit.into(), value: value.to_string() }
    }
}

impl From<InvalidField> for tonic::Status {
    fn from(e: InvalidField) -> Self {
        tonic::Status::invalid_argument(e.to_string())
    }
}

/// A ticket from a message field. Returns an error unless there are exactly 16 bytes.
pub fn ticket_from_wire(bytes: &[u8]) -> Result<Ticket, InvalidField> {
    Ticket::from_bytes(bytes).ok_or_else(|| InvalidField::new("ticket", "16 bytes", format!("{} bytes", bytes.len())))
}

impl From<Role> for v1::Role {
    fn from(role: Role) -> Self {
        match role {
            Role::Prefill => Self::Prefill,
            Role::Decode => Self::Decode,
        }
    }
}

impl TryFrom<v1::Role> for Role {
    type Error = InvalidField;

    fn try_from(wire: v1::Role) -> Result<Self, InvalidField> {
        match wire {
            v1::Role::Prefill => Ok(Self::Prefill),
            v1::Role::Decode => Ok(Self::Decode),
            v1::Role::Unspecified => Err(InvalidField::new("role", "prefill or decode", wire.as_str_name())),
        }
    }
}

impl From<Mode> for v1::Mode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Draft => Self::Draft,
            Mode::Refresh => Self::Refresh,
            Mode::Exact => Self::Exact,
        }
    }
}

impl v1::Mode {
    /// The mode that the message names; `None` if it names none.
    pub fn named(self) -> Option<Mode> {
        match self {
            Self::Unspecified => None,
            Self::Draft => Some(Mode::Draft),
            Self::Refresh => Some(Mode::Refresh),
            Self::Exact => Some(Mode::Exact),
        }
    }
}

impl From<FinishReason> for v1::FinishReason {
    fn from(reason: FinishReason) -> Self {
        match reason {
            FinishReason::Stop => Self::Stop,
            FinishReason::Length => Self::Length,
        }
    }
}

impl TryFrom<v1::FinishReason> for FinishReason {
    type Error = InvalidField;

    fn try_from(wire: v1::FinishReason) -> Result<Self, InvalidField> {
        match wire {
            v1::FinishReason::Stop => Ok(Self::Stop),
            v1::FinishReason::Length => Ok(Self::Length),
            v1::FinishReason::Unspecified => Err(InvalidField::new("reason", "stop or length", wire.as_str_name())),
        }
    }
}

impl From<ProtocolVersions> for v1::ProtocolVersions {
    fn from(ProtocolVersions { oldest, newest }: ProtocolVersions) -> Self {
        Self { oldest, newest }
    }
}

impl From<v1::ProtocolVersions> for ProtocolVersions {
    fn from(v1::ProtocolVersions { oldest, newest }: v1::ProtocolVersions) -> Self {
        Self { oldest, newest }
    }
}

impl From<TransferStats> for v1::TransferStats {
    fn from(TransferStats { bytes, seconds, exposed_seconds }: TransferStats) -> Self {
        Self { bytes, seconds, exposed_seconds }
    }
}

impl From<v1::TransferStats> for TransferStats {
    fn from(v1::TransferStats { bytes, seconds, exposed_seconds }: v1::TransferStats) -> Self {
        Self { bytes, seconds, exposed_seconds }
    }
}

impl From<KvEndpoint> for v1::KvEndpoint {
    fn from(endpoint: KvEndpoint) -> Self {
        let KvEndpoint { address, versions } = endpoint;
        let tcp = v1::TcpEndpoint { address, versions: Some(versions.into()) };
        Self { transport: Some(v1::kv_endpoint::Transport::Tcp(tcp)) }
    }
}

impl TryFrom<v1::KvEndpoint> for KvEndpoint {
    type Error = InvalidField;

    fn try_from(wire: v1::KvEndpoint) -> Result<Self, InvalidField> {
        match wire.transport {
            Some(v1::kv_endpoint::Transport::Tcp(v1::TcpEndpoint { address, versions })) => {
                if !(1..=MAX_ADDRESS_BYTES).contains(&address.len()) {
                    let (limit, length) =
                        (format!("1 to {MAX_ADDRESS_BYTES} bytes"), format!("{} bytes", address.len()));
                    return Err(InvalidField::new("kv_endpoint.tcp.address", limit, length));
                }
                let versions = versions.map_or(ProtocolVersions::UNSTATED, Into::into);
                Ok(Self { address, versions })
            }
            None => Err(InvalidField::new("kv_endpoint", "of a known transport: tcp", "nothing")),
        }
    }
}

impl From<KvDtype> for v1::KvDtype {
    fn from(dtype: KvDtype) -> Self {
        match dtype {
            KvDtype::F32 => Self::F32,
            KvDtype::Bf16 => Self::Bf16,
            KvDtype::F16 => Self::F16,
            KvDtype::Fp8 => Self::Fp8,
        }
    }
}

impl From<&KvSchema> for v1::KvSchema {
    fn from(schema: &KvSchema) -> Self {
        let KvSchema {
            layers,
            kv_heads,
            head_dim,
            rope,
            layer_attention,
            dtype,
            block_tokens,
            vocab_size,
            tokenizer_sha256,
            full_model,
        } = schema;
        Self {
            layers: layers.clone(),
            kv_heads: *kv_heads,
            head_dim: *head_dim,
            rope: Some(v1::RopeSpec { theta: rope.theta, scaling: rope.scaling.clone() }),
            layer_attention: layer_attention.iter().map(ToString::to_string).collect(),
            dtype: v1::KvDtype::from(*dtype).into(),
            block_tokens: *block_tokens,
            vocab_size: *vocab_size,
            tokenizer_sha256: tokenizer_sha256.clone(),
            full_model: full_model.clone().unwrap_or_default(),
        }
    }
}

impl TryFrom<v1::KvSchema> for KvSchema {
    type Error = InvalidField;

    fn try_from(wire: v1::KvSchema) -> Result<Self, InvalidField> {
        const MAX_LAYERS: usize = 1024;
        let dtype = match wire.dtype() {
            v1::KvDtype::F32 => KvDtype::F32,
            v1::KvDtype::Bf16 => KvDtype::Bf16,
            v1::KvDtype::F16 => KvDtype::F16,
            v1::KvDtype::Fp8 => KvDtype::Fp8,
            v1::KvDtype::Unspecified => {
                return Err(InvalidField::new("kv_schema.dtype", "one of the KvDtype values", wire.dtype));
            }
        };
        if wire.layers.is_empty() || wire.layers.len() > MAX_LAYERS {
            return Err(InvalidField::new("kv_schema.layers", "1 to 1024 layers", wire.layers.len()));
        }
        if wire.layers.windows(2).any(|pair| pair[0] >= pair[1]) {
            return Err(InvalidField::new("kv_schema.layers", "ascending", format!("{:?}", wire.layers)));
        }
        if !wire.layer_attention.is_empty() && wire.layer_attention.len() != wire.layers.len() {
            let expected = format!("empty or one for each layer ({})", wire.layers.len());
            return Err(InvalidField::new("kv_schema.layer_attention", expected, wire.layer_attention.len()));
        }
        for (field, value, max) in [
            ("kv_schema.kv_heads", wire.kv_heads, 4096),
            ("kv_schema.head_dim", wire.head_dim, 4096),
            ("kv_schema.block_tokens", wire.block_tokens, 4096),
            ("kv_schema.vocab_size", wire.vocab_size, u32::MAX),
        ] {
            if value == 0 || value > max {
                return Err(InvalidField::new(field, format!("in [1, {max}]"), value));
            }
        }
        let rope = wire.rope.ok_or_else(|| InvalidField::new("kv_schema.rope", "present", "nothing"))?;
        let attention = |text: String| match text.parse() {
            Ok(attention) => Ok(attention),
            Err(limit) => Err(InvalidField::new("kv_schema.layer_attention", limit, text)),
        };
        let layer_attention = wire.layer_attention.into_iter().map(attention).collect::<Result<_, _>>()?;
        Ok(Self {
            layers: wire.layers,
            kv_heads: wire.kv_heads,
            head_dim: wire.head_dim,
            rope: RopeSpec { theta: rope.theta, scaling: rope.scaling },
            layer_attention,
            dtype,
            block_tokens: wire.block_tokens,
            vocab_size: wire.vocab_size,
            tokenizer_sha256: wire.tokenizer_sha256,
            full_model: (!wire.full_model.is_empty()).then_some(wire.full_model),
        })
    }
}

impl From<&SamplingParams> for v1::SamplingParams {
    fn from(params: &SamplingParams) -> Self {
        let SamplingParams {
            temperature,
            top_p,
            top_k,
            min_p,
            seed,
            presence_penalty,
            frequency_penalty,
            repetition_penalty,
            logit_bias,
            logprobs,
            grammar,
            allowed_token_ids,
            bad_words,
            min_tokens,
            end_token_ids,
        } = params;
        Self {
            temperature: *temperature,
            top_p: *top_p,
            top_k: *top_k,
            min_p: *min_p,
            seed: *seed,
            presence_penalty: *presence_penalty,
            frequency_penalty: *frequency_penalty,
            repetition_penalty: *repetition_penalty,
            logit_bias: logit_bias.iter().map(|(token, bias)| (*token, *bias)).collect(),
            logprobs: *logprobs,
            grammar: grammar.clone().map(Into::into),
            allowed_token_ids: allowed_token_ids.clone(),
            bad_words: bad_words.iter().map(|ids| v1::TokenIds { ids: ids.clone() }).collect(),
            min_tokens: *min_tokens,
            end_token_ids: end_token_ids.clone(),
        }
    }
}

impl From<Grammar> for v1::Grammar {
    fn from(grammar: Grammar) -> Self {
        use v1::grammar::Kind;
        let kind = match grammar {
            Grammar::Json(schema) => Kind::JsonSchema(schema),
            Grammar::Regex(regex) => Kind::Regex(regex),
            Grammar::Choice(texts) => Kind::Choice(v1::Choice { texts }),
            Grammar::Lark(lark) => Kind::Lark(lark),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<v1::Grammar> for Grammar {
    type Error = InvalidField;

    fn try_from(wire: v1::Grammar) -> Result<Self, InvalidField> {
        use v1::grammar::Kind;
        match wire.kind {
            Some(Kind::JsonSchema(schema)) => Ok(Self::Json(schema)),
            Some(Kind::Regex(regex)) => Ok(Self::Regex(regex)),
            Some(Kind::Choice(v1::Choice { texts })) => Ok(Self::Choice(texts)),
            Some(Kind::Lark(lark)) => Ok(Self::Lark(lark)),
            None => Err(InvalidField::new("grammar", "of a known kind: json_schema, regex, choice or lark", "nothing")),
        }
    }
}

/// Does not check limits, because that needs the vocabulary size. See [`SamplingParams::validate`].
impl TryFrom<v1::SamplingParams> for SamplingParams {
    type Error = InvalidField;

    fn try_from(wire: v1::SamplingParams) -> Result<Self, InvalidField> {
        let v1::SamplingParams {
            temperature,
            top_p,
            top_k,
            min_p,
            seed,
            presence_penalty,
            frequency_penalty,
            repetition_penalty,
            logit_bias,
            logprobs,
            grammar,
            allowed_token_ids,
            bad_words,
            min_tokens,
            end_token_ids,
        } = wire;
        Ok(Self {
            temperature,
            top_p,
            top_k,
            min_p,
            seed,
            presence_penalty,
            frequency_penalty,
            repetition_penalty,
            logit_bias: logit_bias.into_iter().collect(),
            logprobs,
            grammar: grammar.map(Grammar::try_from).transpose()?,
            allowed_token_ids,
            bad_words: bad_words.into_iter().map(|word| word.ids).collect(),
            min_tokens,
            end_token_ids,
        })
    }
}

impl From<OutputToken> for v1::OutputToken {
    fn from(token: OutputToken) -> Self {
        Self {
            token: token.token,
            logprob: token.logprob,
            top: token.top.into_iter().map(|(token, logprob)| v1::TokenLogprob { token, logprob }).collect(),
        }
    }
}

impl From<v1::OutputToken> for OutputToken {
    fn from(wire: v1::OutputToken) -> Self {
        Self {
            token: wire.token,
            logprob: wire.logprob,
            top: wire.top.into_iter().map(|t| (t.token, t.logprob)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schema() -> KvSchema {
        KvSchema {
            layers: vec![0, 1, 3],
            kv_heads: 2,
            head_dim: 16,
            rope: RopeSpec { theta: 1e4, scaling: "none".into() },
            layer_attention: Vec::new(),
            dtype: KvDtype::Bf16,
            block_tokens: 16,
            vocab_size: 320,
            tokenizer_sha256: "ab".into(),
            full_model: None,
        }
    }

    #[test]
    fn a_schema_survives_the_wire() {
        let windows = [Some(512), None, Some(7)].map(|window| schema().rope.of_layer(window)).to_vec();
        for schema in [schema(), KvSchema { layer_attention: windows, ..schema() }] {
            assert_eq!(KvSchema::try_from(v1::KvSchema::from(&schema)).unwrap(), schema);
        }
    }

    #[test]
    fn impossible_schemas_are_refused_by_field() {
        let wire = v1::KvSchema::from(&schema());
        let refused = |change: &dyn Fn(&mut v1::KvSchema)| {
            let mut wire = wire.clone();
            change(&mut wire);
            KvSchema::try_from(wire).unwrap_err().field
        };
        assert_eq!(refused(&|w| w.kv_heads = 0), "kv_schema.kv_heads");
        assert_eq!(refused(&|w| w.head_dim = 1 << 20), "kv_schema.head_dim");
        assert_eq!(refused(&|w| w.layers.clear()), "kv_schema.layers");
        assert_eq!(refused(&|w| w.layers = vec![2, 1]), "kv_schema.layers");
        assert_eq!(refused(&|w| w.dtype = 99), "kv_schema.dtype");
        assert_eq!(refused(&|w| w.rope = None), "kv_schema.rope");
        assert_eq!(
            refused(&|w| w.layer_attention = vec!["theta=1 none window=0".into(); 3]),
            "kv_schema.layer_attention"
        );
    }

    #[test]
    fn a_ticket_is_16_bytes() {
        assert!(ticket_from_wire(&[7; 16]).is_ok());
        assert_eq!(ticket_from_wire(&[7; 15]).unwrap_err().to_string(), "ticket must be 16 bytes, got 15 bytes");
    }
}
