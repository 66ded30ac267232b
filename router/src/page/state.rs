//! The state of the cluster as the page shows it.

use serde_json::{Map, Value, json};

use crate::{
    generate::Core,
    history::{self, Handoff, INTERVAL_SECONDS, Point},
    nodes::NodeStatus,
    watch::Summary,
};

/// Maximum number of tenants that are listed.
const MAX_TENANTS: usize = 20;

pub fn state(core: &Core) -> Value {
    let history = &core.metrics.history;
    let models = core.catalog.list().into_iter().map(|model| {
        let served = model.served.as_ref();
        json!({"name": model.name, "served": served.is_some(), "full_model": served.map(|m| &m.full_model),
               "max_context_tokens": served.map(|m| m.max_context_tokens),
               "watch": core.watch.summary(&model.name).map(watch)})
    });
    let tenants = core.admission.tenants();
    let mut tenants: Vec<_> = tenants.into_iter().collect();
    tenants.sort_by_key(|(_, (running, waiting))| std::cmp::Reverse(running + waiting));
    let tenants = tenants
        .into_iter()
        .take(MAX_TENANTS)
        .map(|(tenant, (running, waiting))| json!({"tenant": tenant.as_ref(), "running": running, "waiting": waiting}));
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "now": history::now().as_secs_f64(),
        "uptime_seconds": core.started.elapsed().as_secs_f64(),
        "keys_required": core.has_keys(),
        "nodes": core.nodes.statuses().iter().map(node).collect::<Vec<_>>(),
        "models": models.collect::<Vec<_>>(),
        "queue": {
            "running": core.admission.running(),
            "waiting": core.admission.waiting() + core.catalog.waiting(),
            "by_tenant": tenants.collect::<Vec<_>>(),
        },
        "handoffs": history.handoffs().iter().map(handoff).collect::<Vec<_>>(),
        "history": {
            "interval_seconds": INTERVAL_SECONDS,
            "points": history.points().iter().map(point).collect::<Vec<_>>(),
        },
    })
}

fn node(status: &NodeStatus) -> Value {
    let draining = status.node.as_ref().is_some_and(|node| node.load().draining);
    let state = match (draining, status.is_healthy()) {
        (true, _) => "draining",
        (false, true) => "serving",
        (false, false) => "away",
    };
    let mut all = Map::new();
    let mut add = |fields: Value| {
        if let Value::Object(fields) = fields {
            all.extend(fields);
        }
    };
    add(json!({"url": status.url, "role": status.role.as_str(), "state": state, "error": status.error}));
    if let Some(node) = &status.node {
        let (info, load) = (&node.info, node.load());
        add(json!({"node_id": info.node_id, "pool": info.pool, "model": info.model, "version": info.version,
                   "weights": info.weights, "max_running_requests": info.max_running_requests,
                   "total_blocks": info.total_blocks}));
        add(json!({"running_requests": load.running_requests, "waiting_requests": load.waiting_requests,
                   "queued_tokens": load.queued_tokens, "free_blocks": load.free_blocks,
                   "open_handoffs": load.open_handoffs, "stranded_bytes": load.stranded_bytes,
                   "prefill_tokens_per_second": load.prefill_tokens_per_second,
                   "decode_step_microseconds": load.decode_step_microseconds}));
    }
    Value::Object(all)
}

fn watch(summary: Summary) -> Value {
    let Summary { answers, tokens, agreement, logprob_gap_nats, parted_answers, median_parted_at_tokens } = summary;
    json!({"answers": answers, "tokens": tokens, "agreement": agreement, "logprob_gap_nats": logprob_gap_nats,
           "parted_answers": parted_answers, "median_parted_at_tokens": median_parted_at_tokens})
}

fn handoff(handoff: &Handoff) -> Value {
    let Handoff { id, ended, prefill_node, decode_node, stats } = handoff;
    json!({"id": id, "ended": ended, "prefill_node": prefill_node, "decode_node": decode_node, "bytes": stats.bytes,
           "seconds": stats.seconds, "exposed_seconds": stats.exposed_seconds})
}

fn point(point: &Point) -> Value {
    let Point { begin, requests, tokens, waiting, ttft, itl } = point;
    json!({"t": begin, "requests": requests, "tokens": tokens, "waiting": waiting,
           "ttft_p50": ttft.quantile_seconds(0.5), "ttft_p95": ttft.quantile_seconds(0.95),
           "itl_p50": itl.quantile_seconds(0.5), "itl_p95": itl.quantile_seconds(0.95)})
}
