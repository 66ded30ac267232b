//! The nodes of one role over time: started, scaled, killed and replaced.

use std::sync::Arc;

use anyhow::Result;
use overfill_cluster::discovery::Members;
use tokio::sync::watch;

use super::{
    node::{Node, NodeSetup},
    scaler::Scaler,
};

/// Seconds after which discovery drops a node that was killed: the lease of its registration.
const LEASE_SECONDS: f64 = 10.0;

/// A pool of nodes.
pub struct Pool {
    setup: NodeSetup,
    members: Arc<watch::Sender<Members>>,
    /// Seconds from the creation of a node until it serves.
    start_seconds: f64,
    /// Chooses the number of nodes. `None`: it is fixed.
    pub scaler: Option<Scaler>,
    /// Number of nodes that the pool should have.
    wanted: usize,
    /// Nodes that serve, the oldest first.
    serving: Vec<Node>,
    /// When nodes that were created will serve, the oldest first.
    starting: Vec<f64>,
    draining: Vec<Node>,
    /// Registrations of killed nodes, and when their leases end.
    lost: Vec<(f64, String)>,
    /// Nodes that a rollout has still to replace.
    outdated: usize,
    /// A new node of the rollout is on its way.
    surge: bool,
    created: usize,
    /// Seconds of all nodes that existed, added up.
    pub node_seconds: f64,
    /// Most nodes at one time.
    pub most: usize,
}

impl Pool {
    /// A pool whose first `nodes` nodes already serve.
    ///
    /// # Errors
    /// A node can't be started.
    pub fn new(
        setup: NodeSetup,
        members: &Arc<watch::Sender<Members>>,
        start_seconds: f64,
        nodes: usize,
        scaler: Option<Scaler>,
    ) -> Result<Self> {
        let mut pool = Self {
            setup,
            members: members.clone(),
            start_seconds,
            scaler,
            wanted: nodes,
            serving: Vec::new(),
            starting: vec![0.0; nodes],
            draining: Vec::new(),
            lost: Vec::new(),
            outdated: 0,
            surge: false,
            created: 0,
            node_seconds: 0.0,
            most: 0,
        };
        pool.advance(0.0, 0.0)?;
        Ok(pool)
    }

    /// Nodes that serve.
    pub fn serving(&self) -> &[Node] {
        &self.serving
    }

    /// Number of nodes that exist and do not drain, as the autoscaler counts them.
    pub fn nodes(&self) -> usize {
        self.serving.len() + self.starting.len() - usize::from(self.surge)
    }

    /// Capacity of a node's KV cache in blocks.
    pub fn kv_blocks(&self) -> usize {
        self.setup.kv_blocks
    }

    /// Numbers of starting and draining nodes.
    pub fn in_between(&self) -> (usize, usize) {
        (self.starting.len(), self.draining.len())
    }

    /// Sets the number of nodes.
    pub fn resize(&mut self, wanted: usize) {
        self.wanted = wanted;
    }

    /// One node, the oldest, is gone from one moment to the next.
    pub fn kill(&mut self, now: f64) {
        if self.serving.is_empty() {
            return;
        }
        let node = self.serving.remove(0);
        node.kill();
        self.outdated = self.outdated.saturating_sub(1);
        self.lost.push((now + LEASE_SECONDS, node.registration.grpc));
    }

    /// All nodes are replaced, one at a time: first a new node starts, then an old one drains.
    pub fn roll_out(&mut self) {
        self.outdated = self.serving.len();
    }

    /// Does what is due. `passed`: seconds since the last call.
    ///
    /// # Errors
    /// A node can't be started.
    pub fn advance(&mut self, now: f64, passed: f64) -> Result<()> {
        let all = self.serving.len() + self.starting.len() + self.draining.len();
        self.node_seconds += passed * all as f64;
        self.draining.retain(|node| !node.has_ended());
        let due = self.starting.iter().filter(|at| **at <= now).count();
        for _ in self.starting.drain(..due).collect::<Vec<_>>() {
            self.created += 1;
            let node = self.setup.start(&format!("{}-{}", self.setup.role, self.created))?;
            let registration = node.registration.clone();
            self.members.send_modify(|members| drop(members.insert(registration.grpc.clone(), registration)));
            self.serving.push(node);
        }
        let (ended, lost) = std::mem::take(&mut self.lost).into_iter().partition::<Vec<_>, _>(|(at, _)| *at <= now);
        self.lost = lost;
        ended.iter().for_each(|(_, address)| self.forget(address));
        // A rollout: the surplus node has come, so the oldest one goes.
        if self.surge && self.starting.is_empty() {
            self.surge = false;
            if self.outdated > 0 {
                self.outdated -= 1;
                self.drain_oldest();
            }
        }
        if self.outdated > 0 && !self.surge && self.starting.is_empty() {
            self.surge = true;
            self.starting.push(now + self.start_seconds);
        }
        while self.nodes() < self.wanted {
            self.starting.push(now + self.start_seconds);
        }
        while self.nodes() > self.wanted {
            if self.starting.len() > usize::from(self.surge) {
                self.starting.pop();
            } else {
                self.drain_oldest();
            }
        }
        self.most = self.most.max(self.serving.len() + self.starting.len());
        Ok(())
    }

    fn drain_oldest(&mut self) {
        if self.serving.is_empty() {
            return;
        }
        let node = self.serving.remove(0);
        self.forget(&node.registration.grpc);
        node.drain();
        self.draining.push(node);
    }

    fn forget(&self, address: &str) {
        self.members.send_modify(|members| drop(members.remove(address)));
    }
}
