//! What follows a failed attempt: another one, on other nodes or later, or the end.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout_at},
};
use tower::retry::budget::{Budget as _, TpsBudget};
use tracing::{debug, warn};

use crate::{GenerateError, attempt::AttemptError, nodes::Nodes, request::Generation};

/// Shortest wait before the same nodes are asked again.
const RETRY_PAUSE: Duration = Duration::from_millis(20);
/// Longest wait before they are asked again, even if nothing seems to have changed.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// What the next attempt is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// No node has computed anything for the sequence: nothing is lost.
    Again,
    /// The sequence is begun anew on other nodes.
    Migrated,
}

/// The attempts of one sequence, as far as they failed.
pub struct Retries {
    nodes: Nodes,
    /// Changes whenever a node comes, goes or reports its load.
    changes: watch::Receiver<u64>,
    /// Keeps retries from keeping a failing cluster failing. Beyond it, retries wait.
    budget: Arc<TpsBudget>,
    max_attempts: u32,
    failures: u32,
    /// Keys of nodes that the next attempt avoids.
    avoid: Vec<u64>,
    /// What the last node without room said.
    refusal: String,
    /// Nothing is waited for beyond this moment.
    wait_end: Instant,
}

impl Retries {
    /// Of a sequence that has not yet been attempted, which waits for nodes until `wait_end`.
    pub fn new(nodes: Nodes, budget: Arc<TpsBudget>, max_attempts: u32, wait_end: Instant) -> Self {
        let changes = nodes.changes();
        Self { nodes, changes, budget, max_attempts, failures: 0, avoid: Vec::new(), refusal: String::new(), wait_end }
    }

    /// An attempt begins: the keys of nodes to avoid.
    pub fn begin(&mut self) -> Vec<u64> {
        self.changes.mark_unchanged();
        self.avoid.clone()
    }

    /// A token came. A long text may survive more failures than one prompt may cause, so from now on nodes are waited
    /// for until `wait_end`.
    pub fn progressed(&mut self, wait_end: Instant) {
        self.wait_end = wait_end;
    }

    /// Waits until the next attempt may begin. An error ends the sequence. `begun`: the attempt's prefill node had
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
                debug!(%message, "moved away");
                self.avoid.push(node);
                Ok(Retry::Migrated)
            }
            AttemptError::NoRoom { node, message } => {
                debug!(%message, "no room");
                self.refusal = format!(": {message}");
                self.avoid.push(node);
                Ok(Retry::Again)
            }
            AttemptError::NoNode(role) => {
                if self.avoid.is_empty() {
                    return self.wait(GenerateError::Unavailable(self.nodes.trouble(role))).await;
                }
                // A node that was avoided is better than none. Of two avoided nodes one had failed: the other one may
                // be the only one of its role.
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

    /// Waits until the budget of all sequences allows a retry after a failure.
    async fn withdraw(&mut self, message: String) -> Result<(), GenerateError> {
        self.failures += 1;
        let attempts = self.failures;
        if attempts >= self.max_attempts {
            return Err(GenerateError::Failed { attempts, last: message });
        }
        warn!(error = %message, attempts, "attempt failed, trying again");
        while !self.budget.withdraw() {
            if Instant::now() >= self.wait_end {
                let last = format!("{message} (and too many other requests failed, too)");
                return Err(GenerateError::Failed { attempts, last });
            }
            sleep(RETRY_PAUSE).await;
        }
        Ok(())
    }

    /// Waits until the nodes may have changed. After `wait_end`, `error` ends the sequence.
    async fn wait(&mut self, error: GenerateError) -> Result<Retry, GenerateError> {
        if Instant::now() >= self.wait_end {
            return Err(error);
        }
        sleep_until(self.wait_end.min(Instant::now() + RETRY_PAUSE)).await;
        // Whatever ended the wait, the next attempt shows what has become of the nodes.
        let _ = timeout_at(self.wait_end.min(Instant::now() + RETRY_INTERVAL), self.changes.changed()).await;
        Ok(Retry::Again)
    }
}
