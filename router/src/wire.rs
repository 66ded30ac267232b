//! Protobuf conversions of node descriptions and loads: from nodes, and to clients.

use overfill_kv::{KvSchema, Role};
use overfill_proto::{InvalidField, v1};

use crate::{
    legs::{Leg, LegTimes},
    node::{NodeInfo, NodeLoad},
    nodes::NodeStatus,
    request::Timings,
};

/// Maximum length of the name of a node, an incarnation or a model, in bytes.
const MAX_NAME_BYTES: usize = 512;
/// Maximum of a node's `max_running_requests`. The limit prevents an overflow when the router sums over nodes.
const MAX_RUNNING: u32 = 1 << 20;

fn name(field: &'static str, name: String) -> Result<String, InvalidField> {
    if name.is_empty() || name.len() > MAX_NAME_BYTES {
        let limit = format!("1 to {MAX_NAME_BYTES} bytes");
        return Err(InvalidField::new(field, limit, format!("{} bytes", name.len())));
    }
    Ok(name)
}

fn count(field: &'static str, count: u32, max: u32) -> Result<u32, InvalidField> {
    if count == 0 || count > max {
        return Err(InvalidField::new(field, format!("in [1, {max}]"), count));
    }
    Ok(count)
}

/// Maximum number of further models of a node.
const MAX_VARIANTS: usize = 256;
/// Maximum length of a list of transports, in bytes.
const MAX_TRANSPORTS_BYTES: usize = 64;

impl TryFrom<v1::NodeInfo> for NodeInfo {
    type Error = InvalidField;

    fn try_from(wire: v1::NodeInfo) -> Result<Self, InvalidField> {
        let role = Role::try_from(wire.role())?;
        let v1::NodeInfo {
            node_id,
            incarnation,
            role: _,
            model,
            kv_schema,
            max_context_tokens,
            total_blocks,
            max_running_requests,
            kv_endpoint,
            version,
            weights,
            eos_token_ids,
            protocol,
            pool,
            cluster,
            kv_transports,
            variants,
        } = wire;
        let schema = kv_schema.ok_or_else(|| InvalidField::new("kv_schema", "present", "nothing"))?;
        Ok(Self {
            node_id: name("node_id", node_id)?,
            incarnation: name("incarnation", incarnation)?,
            role,
            model: name("model", model)?,
            variants: match variants.len() {
                0..=MAX_VARIANTS => {
                    variants.into_iter().map(|variant| name("variants", variant)).collect::<Result<_, _>>()?
                }
                count => return Err(InvalidField::new("variants", format!("at most {MAX_VARIANTS}"), count)),
            },
            schema: KvSchema::try_from(schema)?,
            max_context_tokens: count("max_context_tokens", max_context_tokens, u32::MAX)?,
            total_blocks: count("total_blocks", total_blocks, u32::MAX)?,
            max_running_requests: count("max_running_requests", max_running_requests, MAX_RUNNING)?,
            // The router only displays the endpoint, so it accepts nodes with an unknown transport.
            kv_endpoint: kv_endpoint.and_then(|endpoint| endpoint.try_into().ok()),
            version,
            weights,
            eos_token_ids,
            protocol: protocol.unwrap_or_default().into(),
            pool: name("pool", pool)?,
            cluster,
            kv_transports: match kv_transports.len() {
                0..=MAX_TRANSPORTS_BYTES => kv_transports,
                length => {
                    let limit = format!("at most {MAX_TRANSPORTS_BYTES} bytes");
                    return Err(InvalidField::new("kv_transports", limit, length));
                }
            },
        })
    }
}

impl From<&NodeInfo> for v1::NodeInfo {
    fn from(info: &NodeInfo) -> Self {
        let NodeInfo {
            node_id,
            incarnation,
            role,
            model,
            schema,
            max_context_tokens,
            total_blocks,
            max_running_requests,
            kv_endpoint,
            version,
            weights,
            eos_token_ids,
            protocol,
            pool,
            cluster,
            kv_transports,
            variants,
        } = info;
        Self {
            node_id: node_id.clone(),
            incarnation: incarnation.clone(),
            role: v1::Role::from(*role).into(),
            model: model.clone(),
            variants: variants.clone(),
            kv_schema: Some(schema.into()),
            max_context_tokens: *max_context_tokens,
            total_blocks: *total_blocks,
            max_running_requests: *max_running_requests,
            kv_endpoint: kv_endpoint.clone().map(Into::into),
            version: version.clone(),
            weights: weights.clone(),
            eos_token_ids: eos_token_ids.clone(),
            protocol: Some((*protocol).into()),
            pool: pool.clone(),
            cluster: cluster.clone(),
            kv_transports: kv_transports.clone(),
        }
    }
}

impl From<v1::NodeLoad> for NodeLoad {
    fn from(wire: v1::NodeLoad) -> Self {
        let v1::NodeLoad {
            free_blocks,
            running_requests,
            waiting_requests,
            queued_tokens,
            stranded_bytes,
            draining,
            open_handoffs,
            stalled,
            prefill_tokens_per_second,
            decode_step_microseconds,
        } = wire;
        Self {
            free_blocks,
            running_requests,
            waiting_requests,
            queued_tokens,
            stranded_bytes,
            draining,
            open_handoffs,
            stalled,
            prefill_tokens_per_second,
            decode_step_microseconds,
        }
    }
}

impl From<NodeLoad> for v1::NodeLoad {
    fn from(load: NodeLoad) -> Self {
        let NodeLoad {
            free_blocks,
            running_requests,
            waiting_requests,
            queued_tokens,
            stranded_bytes,
            draining,
            open_handoffs,
            stalled,
            prefill_tokens_per_second,
            decode_step_microseconds,
        } = load;
        Self {
            free_blocks,
            running_requests,
            waiting_requests,
            queued_tokens,
            stranded_bytes,
            draining,
            open_handoffs,
            stalled,
            prefill_tokens_per_second,
            decode_step_microseconds,
        }
    }
}

impl From<NodeStatus> for v1::ListedNode {
    fn from(status: NodeStatus) -> Self {
        let healthy = status.is_healthy();
        let NodeStatus { url, role, node, error, pool: _, state: _ } = status;
        let info = match &node {
            Some(node) => (&node.info).into(),
            None => v1::NodeInfo { role: v1::Role::from(role).into(), ..Default::default() },
        };
        Self { url, info: Some(info), load: node.map(|node| node.load().into()), healthy, error }
    }
}

impl From<Timings> for v1::Timings {
    fn from(timings: Timings) -> Self {
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
        } = timings;
        Self {
            queue_seconds,
            ttft_seconds,
            mean_itl_seconds,
            total_seconds,
            handoff: handoff.map(Into::into),
            prefill_cached_tokens,
            decode_held_tokens,
            prefill_node,
            decode_node,
            migrations,
            mode: v1::Mode::from(mode).into(),
            drafted_tokens,
            accepted_tokens,
            legs: Some(legs.into()),
        }
    }
}

impl From<LegTimes> for v1::Legs {
    fn from(times: LegTimes) -> Self {
        Self {
            tokenize_seconds: times.seconds(Leg::Tokenize),
            queue_seconds: times.seconds(Leg::Queue),
            reserve_seconds: times.seconds(Leg::Reserve),
            prefill_queue_seconds: times.seconds(Leg::PrefillQueue),
            prefill_seconds: times.seconds(Leg::Prefill),
            handoff_seconds: times.seconds(Leg::Handoff),
            first_decode_step_seconds: times.seconds(Leg::FirstDecodeStep),
            decode_seconds: times.seconds(Leg::Decode),
        }
    }
}

#[cfg(test)]
mod tests {
    use overfill_kv::{KvDtype, KvEndpoint, PROTOCOL, RopeSpec};

    use super::*;

    fn info() -> NodeInfo {
        NodeInfo {
            node_id: "n".into(),
            incarnation: "1".into(),
            role: Role::Decode,
            model: "m".into(),
            variants: vec!["v".into()],
            schema: KvSchema {
                layers: vec![0],
                kv_heads: 1,
                head_dim: 8,
                rope: RopeSpec { theta: 1e4, scaling: "none".into() },
                layer_attention: Vec::new(),
                dtype: KvDtype::F32,
                block_tokens: 16,
                vocab_size: 10,
                tokenizer_sha256: "aa".into(),
                full_model: None,
            },
            max_context_tokens: 64,
            total_blocks: 4,
            max_running_requests: 2,
            kv_endpoint: Some(KvEndpoint::new("a:1".into())),
            version: "1".into(),
            weights: "f32".into(),
            eos_token_ids: vec![1],
            protocol: PROTOCOL,
            pool: "p".into(),
            cluster: "c".into(),
            kv_transports: "tcp".into(),
        }
    }

    #[test]
    fn a_description_survives_the_wire() {
        assert_eq!(NodeInfo::try_from(v1::NodeInfo::from(&info())), Ok(info()));
    }

    #[test]
    fn impossible_descriptions_are_refused_by_field() {
        let refused = |change: &dyn Fn(&mut v1::NodeInfo)| {
            let mut wire = v1::NodeInfo::from(&info());
            change(&mut wire);
            NodeInfo::try_from(wire).unwrap_err().field
        };
        assert_eq!(refused(&|w| w.role = 0), "role");
        assert_eq!(refused(&|w| w.role = 99), "role");
        assert_eq!(refused(&|w| w.node_id.clear()), "node_id");
        assert_eq!(refused(&|w| w.incarnation.clear()), "incarnation");
        assert_eq!(refused(&|w| w.model = "m".repeat(1000)), "model");
        assert_eq!(refused(&|w| w.kv_transports = "t".repeat(65)), "kv_transports");
        assert_eq!(refused(&|w| w.kv_schema = None), "kv_schema");
        assert_eq!(refused(&|w| w.max_context_tokens = 0), "max_context_tokens");
        assert_eq!(refused(&|w| w.total_blocks = 0), "total_blocks");
        assert_eq!(refused(&|w| w.max_running_requests = u32::MAX), "max_running_requests");
    }
}
