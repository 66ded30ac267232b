//! Decides what follows a failed attempt: another attempt on other nodes, another attempt later, or an error.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout_at},
};
use tower::retry::budget::{Budget as _, TpsBudget};
use tracing::{debug, warn};

use crate::{
    GenerateError,
    attempt::AttemptError,
    nodes::Nodes,
    request::Generation,
    waiting::{Waiter, WaitsFor},
};

/// Minimum wait before the same nodes are tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(20);
/// Maximum wait before the same nodes are tried again, even if no node has reported a change.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// The kind of the next attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// No computed state is lost, because no node had computed anything for the sequence.
    Again,
    /// The sequence is computed again on other nodes.
    Migrated,
}

/// State of one sequence's failed attempts.
pub struct Retries {
    nodes: Nodes,
    /// Notifies when a node joins, leaves or reports its load.
    changes: watch::Receiver<u64>,
    /// Retry budget of all sequences. Retries beyond the budget wait.
    budget: Arc<TpsBudget>,
    max_attempts: u32,
    failures: u32,
    /// Keys of nodes that the next attempt avoids.
    avoid: Vec<u64>,
    /// Message of the last node without room, prefixed with `: `.
    refusal: String,
    /// Latest time until which the sequence waits for nodes.
    wait_end: Instant,
    waiter: Waiter,
}

impl Retries {
    /// Creates the state of a sequence before its first attempt. It waits for nodes until `wait_end` at most, and
    /// `waiter` counts it meanwhile.
    pub fn new(nodes: Nodes, budget: Arc<TpsBudget>, max_attempts: u32, wait_end: Instant, waiter: Waiter) -> Self {
        Self {
            changes: nodes.changes(),
            nodes,
            budget,
            max_attempts,
            failures: 0,
            avoid: Vec::new(),
            refusal: String::new(),
            wait_end,
            waiter,
        }
    }

    /// Begins an attempt. Returns the keys of nodes to avoid.
    pub fn begin(&mut self) -> Vec<u64> {
        self.changes.mark_unchanged();
        self.avoid.clone()
    }

    /// Records that an attempt has found nodes of both roles.
    pub fn found_nodes(&mut self) {
        self.waiter.found_nodes();
    }

    /// Records that a node has taken the sequence.
    pub fn placed(&mut self) {
        self.waiter.placed();
    }

    /// Records that a token was generated. From now on the sequence waits for nodes until `wait_end`, so that the time that
    /// it has already spent does not shorten the wait after a later failure.
    pub fn progressed(&mut self, wait_end: Instant) {
        self.wait_end = wait_end;
    }

    /// Waits until the next attempt may begin. An error ends the sequence. `begun`: whether the attempt's prefill node had
    /// begun to compute.
    pub async fn after(
        &mut self,
        generation: &Generation,
        failure: AttemptError,
        begun: bool,
    ) -> Result<Retry, GenerateError> {
        match failure {
            AttemptError::Deadline => Err(GenerateError::Deadline(generation.time)),
            AttemptError::Refused(message) => Err(GenerateError::Invalid { field: None, message }),
            AttemptError::Failed { nodes, message } => {
                self.withdraw(message).await?;
                self.avoid.extend(nodes);
                Ok(if begun { Retry::Migrated } else { Retry::Again })
            }
            AttemptError::Moved { node, message } => {
                debug!(%message, "draining node returned the request");
                self.avoid.push(node);
                Ok(if begun { Retry::Migrated } else { Retry::Again })
            }
            AttemptError::NoRoom { node, message } => {
                debug!(%message, "node has no room");
                self.waiter.wait(WaitsFor::Room);
                self.refusal = format!(": {message}");
                self.avoid.push(node);
                Ok(Retry::Again)
            }
            AttemptError::NoNode(role) => {
                if self.avoid.is_empty() {
                    let served = self.nodes.view().capacity(&generation.model.name).is_some();
                    self.waiter.wait(if served { WaitsFor::Room } else { WaitsFor::Node(role) });
                    return self.wait(GenerateError::Unavailable(self.nodes.trouble(role))).await;
                }
                // An avoided node is better than none. After a failure that involves both nodes, only one of them has
                // failed, and the other one may be the only node of its role.
                let avoided = self.avoid.len();
                let view = self.nodes.view();
                self.avoid.retain(|key| !view.of(role).iter().any(|node| node.key == *key));
                if !self.avoid.is_empty() && self.avoid.len() < avoided {
                    return Ok(Retry::Again);
                }
                self.avoid.clear();
                let (waited, detail) = (generation.arrived.elapsed(), self.refusal.clone());
                self.wait(GenerateError::NoRoom { waited, detail }).await
            }
        }
    }

    /// Waits until the retry budget allows another attempt after a failure.
    async fn withdraw(&mut self, message: String) -> Result<(), GenerateError> {
        self.failures += 1;
        let attempts = self.failures;
        if attempts >= self.max_attempts {
            return Err(GenerateError::Failed { attempts, last: message });
        }
        warn!(error = %message, attempts, "attempt failed, retrying");
        while !self.budget.withdraw() {
            if Instant::now() >= self.wait_end {
                let last = format!("{message} (not retried, because too many other requests failed)");
                return Err(GenerateError::Failed { attempts, last });
            }
            sleep(RETRY_PAUSE).await;
        }
        Ok(())
    }

    /// Waits for a change of the nodes. Returns `error` after `wait_end`.
    async fn wait(&mut self, error: GenerateError) -> Result<Retry, GenerateError> {
        if Instant::now() >= self.wait_end {
            return Err(error);
        }
        sleep_until(self.wait_end.min(Instant::now() + RETRY_PAUSE)).await;
        // The result of the wait does not matter: the next attempt looks at the nodes again.
        let _ = timeout_at(self.wait_end.min(Instant::now() + RETRY_INTERVAL), self.changes.changed()).await;
        Ok(Retry::Again)
    }
}
