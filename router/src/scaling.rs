//! How much work each pool has, in units of its nodes: what an autoscaler needs in order to choose the number of nodes.
//!
//! Both figures are sums over the pool. They do not depend on the number of nodes that are ready, so nodes that are still
//! loading are never counted twice: an autoscaler divides the figure by its target per node. They have no upper limit, and
//! are 0 when the pool is idle.
//!
//! - **Prefill**: the seconds that one node would take for all queued prompt tokens, at the measured pace of the pool's
//!   nodes. Prompts that wait because decode nodes have no room do not count: more prefill nodes would not help them.
//! - **Decode**: the number of nodes that would be full. Each node counts with the larger of its used shares of KV blocks
//!   and of places in the batch. Waiting sequences count with what they will need. If a limit of the inter-token latency
//!   is configured, the pool counts at least with latency / limit for each node that decodes.
//!
//! A part of the work is known to all routers: what lies on the nodes. The rest waits in one router. They are separate
//! series: the first must be combined over routers by a maximum, the second by a sum.

use std::collections::BTreeMap;

use overfill_kv::Role;

use crate::{
    node::{Node, View},
    waiting::{WaitsFor, Work},
};

/// Assumed pace of a prefill node that has not computed a prompt yet, in tokens per second.
const UNKNOWN_PACE: f64 = 1000.0;

/// Work of one pool.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PoolWork {
    /// Work on the pool's nodes, as all routers see it.
    pub nodes: f64,
    /// Work that waits in this router.
    pub router: f64,
}

/// Work of every pool in the view, by role and name of the pool: seconds of one node for prefill pools, full nodes for
/// decode pools. `waiting` gives the work of a model's sequences in this router. `itl_limit_seconds` is the limit of the
/// inter-token latency, if there is one.
///
/// If several pools serve a model, its waiting work is divided among them by their number of nodes.
pub fn pool_work(
    view: &View,
    waiting: &dyn Fn(&str, WaitsFor) -> Work,
    itl_limit_seconds: Option<f64>,
) -> BTreeMap<(Role, String), PoolWork> {
    let mut pools: BTreeMap<(Role, &str), Vec<&Node>> = BTreeMap::new();
    for node in view.prefill.iter().chain(&view.decode) {
        pools.entry((node.info.role, &node.info.pool)).or_default().push(node);
    }
    let mut work: BTreeMap<(Role, String), PoolWork> = pools
        .iter()
        .map(|((role, name), nodes)| {
            let on_nodes = match role {
                Role::Prefill => nodes.iter().map(|node| node.load().queued_tokens as f64).sum::<f64>() / pace(nodes),
                Role::Decode => decode_load(nodes, itl_limit_seconds),
            };
            ((*role, (*name).to_owned()), PoolWork { nodes: on_nodes, router: 0.0 })
        })
        .collect();
    for model in view.models.keys() {
        let decode: Vec<&Node> = view.decode.iter().map(|node| &**node).filter(|d| d.info.serves(model)).collect();
        let serves = |p: &&Node| decode.iter().any(|d| View::check_pair(p, d).is_ok());
        let prefill: Vec<&Node> = view.prefill.iter().map(|node| &**node).filter(serves).collect();
        let turn = waiting(model, WaitsFor::Turn);
        let decode_is_full = !decode.is_empty() && decode.iter().all(|node| occupancy(node) >= 1.0);
        let of = |role| waiting(model, WaitsFor::Node(role));
        let prompts = of(Role::Prefill).plus(if decode_is_full { Work::default() } else { turn });
        let sequences = turn.plus(waiting(model, WaitsFor::Room)).plus(of(Role::Decode));
        add(&mut work, &prefill, |nodes| prompts.prompt_tokens as f64 / pace(nodes));
        add(&mut work, &decode, |nodes| full_nodes(sequences, nodes));
    }
    work
}

/// Divides waiting work among the pools of `nodes`. `amount` converts it to the unit of a pool's nodes.
fn add(work: &mut BTreeMap<(Role, String), PoolWork>, nodes: &[&Node], amount: impl Fn(&[&Node]) -> f64) {
    let mut pools: BTreeMap<(Role, &str), Vec<&Node>> = BTreeMap::new();
    for node in nodes {
        pools.entry((node.info.role, &node.info.pool)).or_default().push(node);
    }
    for ((role, name), pool) in pools {
        let share = pool.len() as f64 / nodes.len() as f64;
        if let Some(work) = work.get_mut(&(role, name.to_owned())) {
            work.router += amount(&pool) * share;
        }
    }
}

/// Mean pace of prefill nodes, in tokens per second, over the nodes that know theirs.
fn pace(nodes: &[&Node]) -> f64 {
    let known = nodes.iter().map(|node| f64::from(node.load().prefill_tokens_per_second)).filter(|pace| *pace > 0.0);
    mean(known).unwrap_or(UNKNOWN_PACE)
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / f64::from(count))
}

/// The larger of a node's used shares of KV blocks and of places in the batch. Requests that wait on the node count as
/// well, so the result may exceed 1.
fn occupancy(node: &Node) -> f64 {
    let load = node.load();
    let requests = f64::from(load.requests()) / f64::from(node.info.max_running_requests);
    let blocks = 1.0 - f64::from(load.free_blocks) / f64::from(node.info.total_blocks);
    requests.max(blocks)
}

fn decode_load(nodes: &[&Node], itl_limit_seconds: Option<f64>) -> f64 {
    let occupied: f64 = nodes.iter().map(|node| occupancy(node)).sum();
    let steps = nodes.iter().map(|node| f64::from(node.load().decode_step_microseconds) / 1e6);
    let slow = itl_limit_seconds.map_or(0.0, |limit| steps.map(|step| step / limit).sum());
    occupied.max(slow)
}

/// The number of nodes, each as large as the mean of `nodes`, that these waiting sequences would fill.
fn full_nodes(work: Work, nodes: &[&Node]) -> f64 {
    let blocks = mean(nodes.iter().map(|node| f64::from(node.info.total_blocks))).unwrap_or(1.0);
    let places = mean(nodes.iter().map(|node| f64::from(node.info.max_running_requests))).unwrap_or(1.0);
    (work.blocks as f64 / blocks).max(work.sequences as f64 / places)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        attempt::choose::tests::{node, plan},
        node::NodeLoad,
    };

    fn view(prefill: Vec<Arc<Node>>, decode: Vec<Arc<Node>>) -> View {
        let model = plan(1, 1, &[]).generation.model.clone();
        View { prefill, decode, models: [("m".to_owned(), model)].into() }
    }

    fn load(node: &Arc<Node>, change: impl FnOnce(&mut NodeLoad)) {
        let mut load = node.load();
        change(&mut load);
        node.set_load(load);
    }

    /// Work of the pools `prefill` and `decode` as (nodes, router), if `turn` waits for its turn.
    fn work(view: &View, turn: Work, limit: Option<f64>) -> [(f64, f64); 2] {
        let waiting = |_: &str, reason| if reason == WaitsFor::Turn { turn } else { Work::default() };
        let pools = pool_work(view, &waiting, limit);
        Role::ALL.map(|role| {
            let pool = pools[&(role, role.to_string())];
            (pool.nodes, pool.router)
        })
    }

    #[tokio::test]
    async fn idle_pools_have_no_work_and_backlog_has_no_limit() {
        // Each decode node has 100 blocks and 4 places.
        let (p, d) = (node(1, Role::Prefill, |_| {}), node(2, Role::Decode, |_| {}));
        let view = view(vec![p.clone()], vec![d.clone()]);
        assert_eq!(work(&view, Work::default(), Some(0.1)), [(0.0, 0.0); 2]);
        let turn = Work { sequences: 6, prompt_tokens: 6000, blocks: 50 };
        assert_eq!(work(&view, turn, None), [(0.0, 6.0), (0.0, 1.5)]);
        load(&p, |load| (load.queued_tokens, load.prefill_tokens_per_second) = (3000, 500));
        load(&d, |load| (load.running_requests, load.waiting_requests, load.free_blocks) = (2, 0, 25));
        assert_eq!(work(&view, turn, None), [(6.0, 12.0), (0.75, 1.5)]);
        // Decode is full: more prefill nodes would not help the waiting sequences.
        load(&d, |load| (load.running_requests, load.waiting_requests) = (4, 4));
        assert_eq!(work(&view, turn, None), [(6.0, 0.0), (2.0, 1.5)]);
        // Slow steps count as well, but only against a limit.
        load(&d, |load| load.decode_step_microseconds = 500_000);
        assert_eq!(work(&view, turn, Some(0.125))[1], (4.0, 1.5));
    }

    #[tokio::test]
    async fn pools_of_a_model_share_its_waiting_work_and_others_get_none() {
        let pool = |name: &'static str| move |info: &mut crate::node::NodeInfo| info.pool = name.into();
        let other = |info: &mut crate::node::NodeInfo| (info.pool, info.model) = ("other".into(), "o".into());
        let decode = vec![
            node(2, Role::Decode, pool("a")),
            node(3, Role::Decode, pool("b")),
            node(4, Role::Decode, pool("b")),
            node(5, Role::Decode, other),
        ];
        let view = view(vec![node(1, Role::Prefill, |_| {})], decode);
        let turn = Work { sequences: 12, prompt_tokens: 0, blocks: 0 };
        let waiting = |_: &str, reason| if reason == WaitsFor::Turn { turn } else { Work::default() };
        let pools = pool_work(&view, &waiting, None);
        let of = |name: &str| pools[&(Role::Decode, name.to_owned())].router;
        assert_eq!((of("a"), of("b"), of("other")), (1.0, 2.0, 0.0));
    }
}
