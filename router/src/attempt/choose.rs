//! Chooses the nodes of an attempt. The only side effect is that the choice is recorded in the affinity.

use std::sync::Arc;

use overfill_kv::{
    BLOCK_TOKENS, Role, block_hashes,
    protocol::{CONSTRAINTS, EXTEND},
};
use parking_lot::Mutex;

use super::{Plan, blame::Pair};
use crate::{
    affinity::Affinity,
    node::{Node, View},
    pick,
};

/// Chooses the pair for `plan`. Also returns the number of tokens that its prefill node has probably cached. The error is
/// the role for which no node can be used.
pub(super) fn pair(view: &View, plan: &Plan, affinity: &Mutex<Affinity>) -> Result<(Pair, u64), Role> {
    let same =
        |prefill: &Node| plan.producer.as_deref() == Some(prefill.info.schema.full_model.as_deref().unwrap_or(""));
    if plan.producer.is_some()
        && let Ok(found) = pair_with(view, plan, affinity, &same)
    {
        return Ok(found);
    }
    pair_with(view, plan, affinity, &|_| true)
}

/// Chooses the prefill node of a chosen pair again, among nodes with the same full model. Also returns the number of tokens
/// that it has probably cached. `None` if no node can be used.
pub(super) fn prefill_again(
    view: &View,
    plan: &Plan,
    pair: &Pair,
    affinity: &Mutex<Affinity>,
) -> Option<(Arc<Node>, u64)> {
    let same = |prefill: &Node| prefill.info.schema.full_model == pair.prefill.info.schema.full_model;
    let (prefill, matched) = prefill_node(view, plan, &pair.decode, affinity, &same)?;
    Some((prefill.clone(), matched))
}

/// Chooses among the pairs whose prefill node is `eligible`.
fn pair_with(
    view: &View,
    plan: &Plan,
    affinity: &Mutex<Affinity>,
    eligible: &dyn Fn(&Node) -> bool,
) -> Result<(Pair, u64), Role> {
    let decode = decode_node(view, plan, eligible).ok_or(Role::Decode)?;
    let (prefill, matched) = prefill_node(view, plan, decode, affinity, eligible).ok_or(Role::Prefill)?;
    Ok((Pair { prefill: prefill.clone(), decode: decode.clone() }, matched))
}

/// The least occupied decode node of the model that has a compatible prefill node.
fn decode_node<'a>(view: &'a View, plan: &Plan, eligible: &dyn Fn(&Node) -> bool) -> Option<&'a Arc<Node>> {
    let prefill: Vec<_> = view.prefill.iter().filter(|prefill| eligible(prefill)).collect();
    let paired = |decode: &&Arc<Node>| prefill.iter().any(|prefill| View::check_pair(prefill, decode).is_ok());
    let nodes = view.decode.iter().filter(|node| node.info.serves(&plan.generation.model.name));
    let nodes: Vec<_> = nodes.filter(paired).filter(|node| usable(node, plan)).collect();
    let candidates: Vec<_> = nodes.iter().map(|node| node.decode_candidate()).collect();
    let needed_blocks = plan.generation.model.windows.needed_blocks(plan.length() as usize) as u32;
    Some(nodes[pick::decode(needed_blocks, &candidates)?])
}

/// The prefill node that will finish the prompt first, and the number of prompt tokens that it has probably cached.
fn prefill_node<'a>(
    view: &'a View,
    plan: &Plan,
    decode: &Node,
    affinity: &Mutex<Affinity>,
    eligible: &dyn Fn(&Node) -> bool,
) -> Option<(&'a Arc<Node>, u64)> {
    let nodes = view.prefill.iter().filter(|prefill| eligible(prefill) && View::check_pair(prefill, decode).is_ok());
    let nodes: Vec<_> = nodes.filter(|node| usable(node, plan)).collect();
    let producer = nodes.first()?.info.schema.full_model.clone().unwrap_or_default();
    let hashes = block_hashes(&plan.tokens, &producer);
    let mut affinity = affinity.lock();
    let matched = |node: &Node| (affinity.matched(&hashes, node.key) * BLOCK_TOKENS) as u64;
    let candidates: Vec<_> = nodes.iter().map(|node| node.prefill_candidate(matched(node))).collect();
    let chosen = pick::prefill(plan.tokens.len() as u64, &candidates)?;
    affinity.record(&hashes, nodes[chosen].key);
    Some((nodes[chosen], candidates[chosen].matched_tokens))
}

/// Whether the node takes requests, knows the request's parameters, and the request fits its context.
fn usable(node: &Node, plan: &Plan) -> bool {
    let least = match (plan.generation.mode().extends(), plan.generation.sampling.is_constrained()) {
        (true, _) => EXTEND,
        (false, true) => CONSTRAINTS,
        (false, false) => 0,
    };
    let understands = node.info.protocol.newest >= least;
    node.admits() && understands && !plan.avoid.contains(&node.key) && node.info.max_context_tokens >= plan.length()
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::Duration;

    use overfill_kv::{KvDtype, KvSchema, PROTOCOL, RequestId, RopeSpec, SamplingParams, Windows};
    use overfill_simulated::text_files;
    use overfill_text::TextModel;
    use tokio::time::Instant;
    use tonic::transport::Endpoint;

    use super::*;
    use crate::{
        node::{NodeInfo, NodeLoad, ServedModel},
        request::Generation,
    };

    pub fn node(key: u64, role: Role, change: impl FnOnce(&mut NodeInfo)) -> Arc<Node> {
        let mut info = NodeInfo {
            node_id: key.to_string(),
            incarnation: key.to_string(),
            role,
            model: "m".into(),
            variants: Vec::new(),
            schema: KvSchema {
                layers: vec![0],
                kv_heads: 1,
                head_dim: 8,
                rope: RopeSpec { theta: 1e4, scaling: "none".into() },
                layer_attention: Vec::new(),
                dtype: KvDtype::F32,
                block_tokens: 16,
                vocab_size: 259,
                tokenizer_sha256: "aa".into(),
                full_model: Some("f".into()),
            },
            max_context_tokens: 64,
            total_blocks: 100,
            max_running_requests: 4,
            kv_endpoint: None,
            version: String::new(),
            weights: String::new(),
            eos_token_ids: Vec::new(),
            protocol: PROTOCOL,
            pool: role.to_string(),
            cluster: String::new(),
            kv_transports: String::new(),
        };
        change(&mut info);
        let channel = Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
        let load = NodeLoad { free_blocks: info.total_blocks, ..NodeLoad::default() };
        Arc::new(Node::new(key, String::new(), info, None, channel, load))
    }

    pub fn plan(tokens: usize, remaining: u32, avoid: &[u64]) -> Plan {
        let model = ServedModel {
            name: "m".into(),
            full_model: "f".into(),
            text: Arc::new(TextModel::from_files(&text_files()).unwrap()),
            vocab_size: 259,
            max_context_tokens: 64,
            windows: Windows::NONE,
            eos_token_ids: [].into(),
            created: 0,
        };
        let tokens: Arc<[u32]> = vec![5; tokens].into();
        let generation = Generation {
            request_id: RequestId("r".into()),
            model: Arc::new(model),
            prompt: tokens.clone(),
            sampling: SamplingParams::greedy(),
            max_tokens: remaining,
            stop_token_ids: [].into(),
            stop: Vec::new(),
            include_stop: false,
            skip_special: true,
            shown_special: [].into(),
            prompt_logprobs: false,
            mode: None,
            priority: 0,
            arrived: Instant::now(),
            time: Duration::from_secs(9),
        };
        Plan {
            generation: Arc::new(generation),
            tokens,
            generated: 0,
            remaining,
            prompt_logprobs: false,
            producer: None,
            avoid: avoid.to_vec(),
            progress_timeout: Duration::from_secs(9),
        }
    }

    /// The keys of the chosen prefill and decode node.
    fn chosen(view: &View, plan: &Plan, affinity: &Mutex<Affinity>) -> Result<(u64, u64, u64), Role> {
        pair(view, plan, affinity).map(|(pair, matched)| (pair.prefill.key, pair.decode.key, matched))
    }

    #[tokio::test]
    async fn nodes_that_fit_the_request_are_chosen() {
        let short = |info: &mut NodeInfo| info.max_context_tokens = 20;
        let view = View {
            prefill: vec![node(1, Role::Prefill, short), node(2, Role::Prefill, |_| {})],
            decode: vec![
                node(3, Role::Decode, |info| info.model = "other".into()),
                node(4, Role::Decode, |info| info.schema.dtype = KvDtype::Bf16),
                node(5, Role::Decode, short),
                node(6, Role::Decode, |_| {}),
            ],
            ..View::default()
        };
        let affinity = Mutex::new(Affinity::new(64));
        assert_eq!(chosen(&view, &plan(40, 24, &[]), &affinity), Ok((2, 6, 0)));
        // The cached prefix attracts the next prompt with the same prefix.
        assert_eq!(chosen(&view, &plan(40, 24, &[]), &affinity), Ok((2, 6, 32)));
        assert_eq!(chosen(&view, &plan(40, 25, &[]), &affinity), Err(Role::Decode));
        assert_eq!(chosen(&view, &plan(10, 10, &[5]), &affinity), Ok((1, 6, 0)));
        assert_eq!(chosen(&view, &plan(10, 10, &[5, 6]), &affinity), Err(Role::Decode));
        assert_eq!(chosen(&view, &plan(10, 10, &[1, 2]), &affinity), Err(Role::Prefill));
    }

    #[tokio::test]
    async fn nodes_without_a_common_transport_are_no_pair() {
        let with = |key, role, names: &'static str| node(key, role, |info| info.kv_transports = names.into());
        let (rdma, either) = (with(1, Role::Prefill, "rdma"), with(2, Role::Prefill, "rdma,tcp"));
        let (tcp, silent) = (with(3, Role::Decode, "tcp"), node(4, Role::Decode, |_| {}));
        let mismatch = View::check_pair(&rdma, &tcp).unwrap_err();
        assert_eq!(mismatch.to_string(), "kv transports do not overlap: rdma and tcp");
        assert!(View::check_pair(&rdma, &silent).is_err());
        assert!(View::check_pair(&either, &tcp).is_ok() && View::check_pair(&either, &silent).is_ok());
    }

    #[tokio::test]
    async fn a_prefill_node_is_chosen_again_by_its_present_load() {
        let view = View {
            prefill: vec![
                node(1, Role::Prefill, |_| {}),
                node(2, Role::Prefill, |_| {}),
                node(3, Role::Prefill, |info| info.schema.full_model = Some("other".into())),
            ],
            decode: vec![node(4, Role::Decode, |_| {})],
            ..View::default()
        };
        let (affinity, plan) = (Mutex::new(Affinity::new(64)), plan(10, 10, &[]));
        let (mut chosen, _) = pair(&view, &plan, &affinity).unwrap();
        assert_eq!(chosen.prefill.key, 1);
        let busy = [view.prefill[0].occupy(500), view.prefill[1].occupy(20)];
        chosen.prefill = prefill_again(&view, &plan, &chosen, &affinity).unwrap().0;
        assert_eq!(chosen.prefill.key, 2);
        drop(busy);
        view.prefill[1].set_load(NodeLoad { draining: true, ..view.prefill[1].load() });
        assert_eq!(prefill_again(&view, &plan, &chosen, &affinity).unwrap().0.key, 1);
        view.prefill[0].failed();
        assert!(prefill_again(&view, &plan, &chosen, &affinity).is_none());
    }

    #[tokio::test]
    async fn a_sequence_stays_with_its_full_model_while_there_is_a_node_of_it() {
        let of = |name: &'static str| move |info: &mut NodeInfo| info.schema.full_model = Some(name.into());
        let prefill = vec![node(1, Role::Prefill, of("old")), node(2, Role::Prefill, of("new"))];
        let decode = vec![node(3, Role::Decode, of("old")), node(4, Role::Decode, of("new"))];
        let view = View { prefill, decode, ..View::default() };
        let affinity = Mutex::new(Affinity::new(64));
        for (producer, expected) in [("old", (1, 3)), ("new", (2, 4))] {
            let plan = Plan { producer: Some(producer.into()), ..plan(10, 10, &[]) };
            let (prefill, decode, _) = chosen(&view, &plan, &affinity).unwrap();
            assert_eq!((prefill, decode), expected);
        }
        let gone = Plan { producer: Some("old".into()), ..plan(10, 10, &[3]) };
        assert_eq!(chosen(&view, &gone, &affinity), Ok((2, 4, 0)));
    }

    #[tokio::test(start_paused = true)]
    async fn nodes_that_drain_or_have_failed_are_left_alone() {
        let (prefill, decode) = (node(1, Role::Prefill, |_| {}), node(2, Role::Decode, |_| {}));
        let view = View { prefill: vec![prefill.clone()], decode: vec![decode.clone()], ..View::default() };
        let affinity = Mutex::new(Affinity::new(64));
        decode.set_load(NodeLoad { draining: true, ..decode.load() });
        assert_eq!(chosen(&view, &plan(10, 10, &[]), &affinity), Err(Role::Decode));
        decode.set_load(NodeLoad { draining: false, ..decode.load() });
        prefill.failed();
        assert_eq!(chosen(&view, &plan(10, 10, &[]), &affinity), Err(Role::Prefill));
        prefill.succeeded();
        assert_eq!(chosen(&view, &plan(10, 10, &[]), &affinity), Ok((1, 2, 0)));
    }
}
