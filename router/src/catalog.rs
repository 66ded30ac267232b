//! The catalog of models: models that nodes serve, and configured models.
//!
//! A router may start before its nodes, and may lose all of them. A request for a model that no node serves at the moment
//! waits for a node.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use overfill_kv::Role;
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::{Instant, timeout_at},
};

use crate::{
    GenerateError,
    node::ServedModel,
    nodes::Nodes,
    waiting::{Waiter, Waiting},
};

/// Retry-after time for clients if the queue is full.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The models of one router. Clones share them.
#[derive(Clone)]
pub struct Catalog {
    nodes: Nodes,
    configured: Arc<BTreeSet<String>>,
    /// One permit for each request that may wait for a model.
    places: Arc<Semaphore>,
    max_waiting: usize,
    waiting: Waiting,
    /// Start time of the router, in seconds since 1970.
    started: u64,
}

/// A model as [`Catalog::list`] returns it.
pub struct Listed {
    /// The name that clients use.
    pub name: String,
    /// When the model was first seen, in seconds since 1970. For a configured model that was never seen, this is the start
    /// time of the router.
    pub created: u64,
    /// Description from the model's nodes. `None` for a configured model that was never served.
    pub served: Option<Arc<ServedModel>>,
}

impl Catalog {
    /// Creates a catalog in which at most `max_waiting` requests wait for models that no node serves yet. `waiting` counts
    /// them.
    pub fn new(nodes: Nodes, configured: &[String], max_waiting: usize, waiting: Waiting) -> Self {
        Self {
            nodes,
            configured: Arc::new(configured.iter().cloned().collect()),
            places: Arc::new(Semaphore::new(max_waiting)),
            max_waiting,
            waiting,
            started: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        }
    }

    /// The model `name`. An empty name stands for the only model. Waits until `until` if no node serves the model yet.
    pub async fn find(&self, name: &str, until: Instant) -> Result<Arc<ServedModel>, GenerateError> {
        let mut changes = self.nodes.changes();
        let mut place = None;
        loop {
            changes.mark_unchanged();
            let missing = match self.look_up(name) {
                Ok(Some(model)) => return Ok(model),
                Ok(None) => GenerateError::Unavailable(self.trouble()),
                // A waiting request keeps waiting if another model is served first, because nodes join one by one.
                Err(unknown) if place.is_some() => unknown,
                Err(unknown) => return Err(unknown),
            };
            if self.max_waiting == 0 {
                return Err(missing);
            }
            if place.is_none() {
                place = Some(self.wait(name)?);
            }
            if !matches!(timeout_at(until, changes.changed()).await, Ok(Ok(()))) {
                return Err(missing);
            }
        }
    }

    /// The model `name`. `None` if no node serves it yet. An error if no node is expected to serve it.
    fn look_up(&self, name: &str) -> Result<Option<Arc<ServedModel>>, GenerateError> {
        let known = &self.nodes.view().models;
        let names: BTreeSet<&String> = known.keys().chain(self.configured.iter()).collect();
        let name = match (name, names.first()) {
            ("", Some(only)) if names.len() == 1 => only.as_str(),
            (name, _) => name,
        };
        match known.get(name) {
            Some(model) => Ok(Some(model.clone())),
            None if names.is_empty() || self.configured.contains(name) => Ok(None),
            None => Err(GenerateError::UnknownModel {
                model: name.to_owned(),
                served: names.into_iter().cloned().collect::<Vec<_>>().join(", "),
            }),
        }
    }

    fn wait(&self, name: &str) -> Result<(SemaphorePermit<'_>, Waiter), GenerateError> {
        let full = |_| GenerateError::QueueFull { limit: self.max_waiting, retry_after: RETRY_AFTER };
        let place = self.places.try_acquire().map_err(full)?;
        Ok((place, self.waiting.begin_unknown(&self.label(name))))
    }

    /// The label of a requested model in metrics: its name if it is served or configured, else empty. Clients choose
    /// names, so others are not counted apart. An empty name stands for the only model.
    pub fn label(&self, name: &str) -> String {
        let known = &self.nodes.view().models;
        match name {
            "" => {
                let names: BTreeSet<&String> = known.keys().chain(self.configured.iter()).collect();
                names.first().filter(|_| names.len() == 1).map_or_else(String::new, |only| (*only).clone())
            }
            name if known.contains_key(name) || self.configured.contains(name) => name.to_owned(),
            _ => String::new(),
        }
    }

    /// Number of requests that wait for a model.
    pub fn waiting(&self) -> usize {
        self.max_waiting - self.places.available_permits()
    }

    /// Why every request would have to wait. `None` if the nodes of at least one model take requests.
    pub fn missing(&self) -> Option<String> {
        let view = self.nodes.view();
        (view.prefill.is_empty() || view.decode.is_empty() || view.models.is_empty()).then(|| self.trouble())
    }

    fn trouble(&self) -> String {
        let role = if self.nodes.view().prefill.is_empty() { Role::Prefill } else { Role::Decode };
        self.nodes.trouble(role)
    }

    /// All served or configured models, sorted by name.
    pub fn list(&self) -> Vec<Listed> {
        let configured = self.configured.iter().map(|name| (name.clone(), None));
        let known = self.nodes.view();
        let known = known.models.iter().map(|(name, model)| (name.clone(), Some(model.clone())));
        let all: BTreeMap<_, _> = configured.chain(known).collect();
        let created = |served: &Option<Arc<ServedModel>>| served.as_ref().map_or(self.started, |model| model.created);
        all.into_iter().map(|(name, served)| Listed { name, created: created(&served), served }).collect()
    }
}
