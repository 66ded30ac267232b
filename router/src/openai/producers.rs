//! The extension `stream_options.include_overfill`: which stage made each token, and where a sequence's time went.

use overfill_kv::Role;
use serde_json::{Value, json};

use crate::{
    legs::Leg,
    node::ServedModel,
    request::{Finished, Timings},
};

/// The `overfill` field of a chunk with one token from a node of role `stage`.
pub fn token(model: &ServedModel, stage: Role) -> Value {
    let name = match stage {
        Role::Prefill => &model.full_model,
        Role::Decode => &model.name,
    };
    json!({"tokens": [{"stage": stage.as_str(), "model": name}]})
}

/// The `overfill` field of a choice's last chunk.
pub fn timings(finished: &Finished) -> Value {
    let Timings {
        queue_seconds,
        ttft_seconds,
        mean_itl_seconds,
        total_seconds,
        handoff,
        prefill_cached_tokens,
        decode_held_tokens,
        prefill_node,
        decode_node,
        migrations,
        mode,
        drafted_tokens,
        accepted_tokens,
        legs,
    } = &finished.timings;
    let handoff = handoff.map(|handoff| {
        json!({"bytes": handoff.bytes, "seconds": handoff.seconds, "exposed_seconds": handoff.exposed_seconds})
    });
    let legs = Leg::ALL.map(|leg| json!({"leg": leg.as_str(), "seconds": legs.seconds(leg)}));
    json!({"tokens": [], "timings": {
        "queue_seconds": queue_seconds,
        "ttft_seconds": ttft_seconds,
        "mean_itl_seconds": mean_itl_seconds,
        "total_seconds": total_seconds,
        "migrations": migrations,
        "mode": mode.as_str(),
        "drafted_tokens": drafted_tokens,
        "accepted_tokens": accepted_tokens,
        "prefill_node": prefill_node,
        "decode_node": decode_node,
        "prefill_cached_tokens": prefill_cached_tokens,
        "decode_held_tokens": decode_held_tokens,
        "handoff": handoff,
        "legs": legs,
    }})
}
