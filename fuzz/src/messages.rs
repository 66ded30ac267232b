//! Targets for protobuf messages and their conversion: `proto/src/convert.rs` and the nodes' `request.rs`.

use std::sync::LazyLock;
use std::time::Duration;

use overfill_kv::{KvSchema, Role, SamplingParams};
use overfill_node::RequestLimits;
use overfill_proto::{ticket_from_wire, v1};
use overfill_router::parts::{MAX_STOPS, NodeInfo, check_length, check_prompt, check_stops};
use prost::Message;
use tokio::time::Instant;

use crate::http::MODEL;
use crate::input::Input;

/// Context length in tokens of the nodes that validate requests.
pub(crate) const CONTEXT: usize = 64;

pub(crate) static SCHEMA: LazyLock<KvSchema> =
    LazyLock::new(|| RequestLimits::of_a_small_node(Role::Decode).identity.schema.clone());

const DAY: Duration = Duration::from_secs(86_400);

/// Decodes a message. The first byte selects its type.
pub fn messages(data: &[u8]) {
    let mut input = Input::new(data);
    match input.below(10) {
        0 => decode_request(input.rest()),
        1 => prefill_request(input.rest()),
        2 => generate_request(input.rest()),
        3 => schema(input.rest()),
        4 => sampling(input.rest()),
        5 => same_again::<v1::NodeInfo>(input.rest(), |wire| {
            // The router's view of a node.
            if let Ok(info) = NodeInfo::try_from(wire) {
                assert!(!info.model.is_empty() && info.max_running_requests > 0);
                assert!(NodeInfo::try_from(v1::NodeInfo::from(&info)).is_ok());
            }
        }),
        6 => same_again::<v1::DecodeEvent>(input.rest(), |event| match event.event {
            Some(v1::decode_event::Event::Reserved(reserved)) => {
                assert_eq!(ticket_from_wire(&reserved.ticket).is_ok(), reserved.ticket.len() == 16);
            }
            Some(v1::decode_event::Event::Token(token)) => drop(overfill_kv::OutputToken::from(token)),
            _ => {}
        }),
        8 => extend_request(input.rest()),
        9 => verdict_request(input.rest()),
        10 => score_request(input.rest()),
        _ => same_again::<v1::PrefillEvent>(input.rest(), |event| {
            if let Some(v1::prefill_event::Event::FirstToken(v1::FirstToken { token: Some(token), .. })) = event.event {
                drop(overfill_kv::OutputToken::from(token));
            }
        }),
    }
}

/// Decodes a message, checks that it survives encoding, and passes it to `using`.
fn same_again<M: Message + Default + Clone>(bytes: &[u8], using: impl FnOnce(M)) {
    let Ok(message) = M::decode(bytes) else { return };
    let encoded = message.encode_to_vec();
    // Compares encodings, since NaN differs from itself, and only their length, since maps have no order.
    let again = M::decode(&*encoded).expect("a message that was encoded here").encode_to_vec();
    assert_eq!(again.len(), encoded.len());
    using(message);
}

fn check_tokens(tokens: &[u32], generated: usize, deadline: Instant, now: Instant) {
    assert!((1..=CONTEXT).contains(&tokens.len()) && generated < tokens.len());
    assert!(tokens.iter().all(|id| *id < SCHEMA.vocab_size));
    // A deadline may be as early as now.
    assert!(deadline >= now && deadline <= now + DAY);
}

fn decode_request(bytes: &[u8]) {
    same_again::<v1::DecodeRequest>(bytes, |wire| {
        let limits = RequestLimits::of_a_small_node(Role::Decode);
        let now = Instant::now();
        match overfill_decode_node::request::check(&limits, wire, now) {
            Ok(request) => {
                check_tokens(&request.tokens, request.generated, request.deadline, now);
                assert!(request.max_tokens >= 2 && request.tokens.len() + request.max_tokens <= CONTEXT);
                assert_eq!(request.sampling.validate(SCHEMA.vocab_size as usize), Ok(()));
                assert_eq!(request.producer, SCHEMA.full_model);
            }
            Err(e) => check_refusal(&e.to_string()),
        }
    });
}

fn prefill_request(bytes: &[u8]) {
    same_again::<v1::PrefillRequest>(bytes, |wire| {
        let limits = RequestLimits::of_a_small_node(Role::Prefill);
        let now = Instant::now();
        match overfill_prefill_node::request::check(&limits, wire, now) {
            Ok(request) => {
                check_tokens(&request.tokens, request.generated, request.deadline, now);
                assert_eq!(request.sampling.validate(SCHEMA.vocab_size as usize), Ok(()));
                if let Some(handoff) = request.handoff {
                    assert!(handoff.held_blocks * overfill_kv::BLOCK_TOKENS < request.tokens.len());
                    assert_eq!(SCHEMA.check_consumer(&handoff.schema), Ok(()));
                }
            }
            Err(e) => check_refusal(&e.to_string()),
        }
    });
}

fn extend_request(bytes: &[u8]) {
    same_again::<v1::ExtendRequest>(bytes, |wire| {
        let limits = RequestLimits::of_a_small_node(Role::Prefill);
        let (reply, _answer) = tokio::sync::oneshot::channel();
        let now = Instant::now();
        match overfill_prefill_node::request::check_extension(&limits, wire, now, reply) {
            Ok(extension) => {
                check_tokens(&extension.tokens, 0, extension.deadline, now);
                assert!(extension.position + extension.tokens.len() <= CONTEXT);
                assert!((1..=extension.tokens.len()).contains(&extension.standing));
                assert!(extension.choose || extension.standing == extension.tokens.len());
                if let Some(handoff) = extension.handoff {
                    let end = extension.handoff_end_blocks;
                    assert!(handoff.held_blocks < end);
                    assert!(end * overfill_kv::BLOCK_TOKENS <= extension.position + extension.standing);
                }
            }
            Err(e) => check_refusal(&e.to_string()),
        }
    });
}

fn score_request(bytes: &[u8]) {
    same_again::<v1::ScoreRequest>(bytes, |wire| {
        let limits = RequestLimits::of_a_small_node(Role::Prefill);
        let now = Instant::now();
        match overfill_prefill_node::request::check_score(&limits, wire, now) {
            Ok(score) => {
                check_tokens(&score.tokens, score.generated, score.deadline, now);
                assert!((1..score.tokens.len()).contains(&score.generated));
            }
            Err(e) => check_refusal(&e.to_string()),
        }
    });
}

fn verdict_request(bytes: &[u8]) {
    same_again::<v1::VerdictRequest>(bytes, |wire| {
        let limits = RequestLimits::of_a_small_node(Role::Decode);
        let now = Instant::now();
        match overfill_decode_node::request::check_verdict(&limits, wire) {
            Ok((_, Some(chosen))) => {
                check_tokens(&chosen.tokens, 0, now, now);
                assert!(chosen.seconds_per_draft.is_none_or(f64::is_finite));
            }
            Ok((_, None)) => {}
            Err(e) => check_refusal(&e.to_string()),
        }
    });
}

/// Checks that an error message is not empty and not too long for a client.
fn check_refusal(message: &str) {
    assert!(!message.is_empty() && message.len() <= 64 << 10, "a message of {} bytes", message.len());
}

/// Runs the checks of `router/src/grpc.rs` that need no node.
fn generate_request(bytes: &[u8]) {
    same_again::<v1::GenerateRequest>(bytes, |wire| {
        if check_stops(&wire.stop).is_ok() {
            assert!(wire.stop.len() <= MAX_STOPS);
        }
        if let Some(v1::generate_request::Prompt::TokenIds(ids)) = &wire.prompt
            && check_prompt(&MODEL, &ids.ids).is_ok()
        {
            assert!(ids.ids.iter().all(|id| *id < MODEL.vocab_size));
            let asked = (wire.max_tokens > 0).then_some(wire.max_tokens);
            if let Ok(tokens) = check_length(&MODEL, ids.ids.len(), asked) {
                assert!(ids.ids.len() as u64 + u64::from(tokens) <= u64::from(MODEL.max_context_tokens));
            }
        }
    });
}

fn schema(bytes: &[u8]) {
    same_again::<v1::KvSchema>(bytes, |wire| {
        let Ok(schema) = KvSchema::try_from(wire) else { return };
        let again = KvSchema::try_from(v1::KvSchema::from(&schema)).expect("a schema that was checked");
        assert_eq!((again.digest(), again.full_model.clone()), (schema.digest(), schema.full_model.clone()));
        assert!(schema.block_bytes() > 0);
        let _ = SCHEMA.check_consumer(&schema);
        // A schema with NaN differs from itself, so it matches no schema.
        if !schema.rope.theta.is_nan() {
            assert_eq!(schema.check_consumer(&again), Ok(()));
        }
    });
}

fn sampling(bytes: &[u8]) {
    same_again::<v1::SamplingParams>(bytes, |wire| {
        let Ok(params) = SamplingParams::try_from(wire) else { return };
        if params.validate(SCHEMA.vocab_size as usize).is_ok() {
            assert_eq!(SamplingParams::try_from(v1::SamplingParams::from(&params)), Ok(params.clone()));
            assert!(params.logit_bias.len() <= SCHEMA.vocab_size as usize);
        }
    });
}
