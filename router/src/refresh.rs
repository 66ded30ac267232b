//! Sets the router's gauges to its current state, before they are exported.

use std::{collections::BTreeMap, time::Duration};

use overfill_cluster::{http::OpenConnections, metrics::CertificateExpiry};
use overfill_kv::Role;

use crate::{generate::Core, node::NodeState};

/// The open connections of the router's ports.
#[derive(Clone, Default)]
pub struct Open {
    /// Those of HTTP.
    pub http: OpenConnections,
    /// Those of gRPC.
    pub grpc: OpenConnections,
}

/// The state that gauges are set to.
pub struct Refresher {
    /// The state that requests share.
    pub core: Core,
    /// Limit of the inter-token latency for scaling decode pools.
    pub itl_limit: Option<Duration>,
    /// The open connections.
    pub open: Open,
    /// When certificates expire.
    pub expiry: CertificateExpiry,
}

impl Refresher {
    /// Sets the gauges to the current state.
    pub fn refresh(&self) {
        let metrics = &self.core.metrics;
        for (port, open) in [("http", &self.open.http), ("grpc", &self.open.grpc)] {
            metrics.connections.with_label_values(&[port]).set(open.get() as i64);
        }
        self.expiry.refresh();
        self.requests();
        self.nodes();
        self.tenants();
        self.scaling();
    }

    /// Requests by model. The empty name stands for all models that the router does not know.
    fn requests(&self) {
        let Core { metrics, admission, catalog, waiting, .. } = &self.core;
        let mut counts: BTreeMap<String, (usize, usize)> = admission.by_model();
        counts.entry(String::new()).or_default();
        for model in catalog.list() {
            metrics.model_known(&model.name);
            counts.entry(model.name).or_default();
        }
        for (model, requests) in waiting.without_model() {
            counts.entry(model).or_default().1 += requests as usize;
        }
        for (model, (running, waiting)) in counts {
            metrics.running.with_label_values(&[&model]).set(running as i64);
            metrics.waiting.with_label_values(&[&model]).set(waiting as i64);
        }
        metrics.without_nodes.reset();
        for model in catalog.list() {
            // Creates the series, so that it is exported with value 0.
            metrics.without_nodes.with_label_values(&[&model.name]);
        }
        for (model, count) in waiting.without_nodes() {
            metrics.without_nodes.with_label_values(&[&model]).set(count as i64);
        }
    }

    /// Nodes in every state, also with value 0. A role without nodes has an empty pool.
    fn nodes(&self) {
        let nodes = &self.core.metrics.nodes;
        nodes.reset();
        let statuses = self.core.nodes.statuses();
        for role in [Role::Prefill, Role::Decode] {
            let of_role = || statuses.iter().filter(|status| status.role == role);
            let empty = of_role().next().is_none().then_some("");
            for pool in of_role().map(|status| status.pool.as_str()).chain(empty) {
                for state in NodeState::ALL {
                    nodes.with_label_values(&[role.as_str(), pool, state.as_str()]);
                }
            }
            for status in of_role() {
                nodes.with_label_values(&[role.as_str(), &status.pool, status.state.as_str()]).inc();
            }
        }
    }

    fn tenants(&self) {
        let tenants = &self.core.metrics.tenants;
        tenants.reset();
        for tenant in self.core.counted_tenants() {
            for state in ["running", "waiting"] {
                tenants.with_label_values(&[&tenant, state]);
            }
        }
        for (tenant, (running, waiting)) in self.core.admission.tenants() {
            // Without a file of keys, clients choose names. They are not counted apart, so that the series stay few.
            let tenant = if self.core.has_keys() { tenant.as_ref() } else { "" };
            tenants.with_label_values(&[tenant, "running"]).add(running as i64);
            tenants.with_label_values(&[tenant, "waiting"]).add(waiting as i64);
        }
    }

    fn scaling(&self) {
        let metrics = &self.core.metrics;
        let limit_seconds = self.itl_limit.map(|limit| limit.as_secs_f64());
        metrics.prefill_backlog.reset();
        metrics.decode_load.reset();
        for ((role, pool), work) in self.core.pool_work(limit_seconds) {
            let gauge = match role {
                Role::Prefill => &metrics.prefill_backlog,
                Role::Decode => &metrics.decode_load,
            };
            gauge.with_label_values(&[pool.as_str(), "nodes"]).set(work.nodes);
            gauge.with_label_values(&[pool.as_str(), "router"]).set(work.router);
        }
    }
}
