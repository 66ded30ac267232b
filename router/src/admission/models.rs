//! Admission control of all models.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use parking_lot::Mutex;

use super::{Ask, ModelAdmission, Place, check_count};
use crate::{GenerateError, tenants::Tenant};

/// Limits and queues of all models. Clones share them.
#[derive(Clone)]
pub struct Admission {
    max_running: usize,
    max_waiting: usize,
    /// By model name. Entries are never removed, as in [`View::models`](crate::node::View::models). There are few models.
    models: Arc<Mutex<HashMap<String, ModelAdmission>>>,
}

impl Admission {
    /// Allows `max_running` running and `max_waiting` waiting sequences of each model.
    pub fn new(max_running: usize, max_waiting: usize) -> Self {
        Self { max_running, max_waiting, models: Arc::default() }
    }

    /// Sets how many sequences the model's nodes compute at once. Further sequences would wait on the nodes, which do not
    /// order them by priority and tenant. `None`: the model has no nodes. Sequences are then admitted up to `max_running`
    /// and get an error when they find no node.
    pub fn set_capacity(&self, model: &str, places: Option<usize>) {
        self.with(model, |admission| admission.set_capacity(places.unwrap_or(self.max_running)));
    }

    /// Queues all of these sequences of a model, or none. Does not wait.
    pub fn enter(&self, model: &str, tenant: &Arc<Tenant>, asks: &[Ask]) -> Result<Vec<Place>, GenerateError> {
        self.with(model, |admission| admission.enter(tenant, asks))
    }

    /// Returns an error if a request has more sequences than can run and wait at once. Callers check this before they build
    /// the sequences.
    pub fn check_count(&self, count: usize) -> Result<(), GenerateError> {
        check_count(count, self.max_running + self.max_waiting)
    }

    /// Number of running sequences.
    pub fn running(&self) -> usize {
        self.models.lock().values().map(ModelAdmission::running).sum()
    }

    /// Number of waiting sequences.
    pub fn waiting(&self) -> usize {
        self.models.lock().values().map(ModelAdmission::waiting).sum()
    }

    /// Numbers of running and waiting sequences by model.
    pub fn by_model(&self) -> BTreeMap<String, (usize, usize)> {
        let models = self.models.lock();
        models.iter().map(|(name, model)| (name.clone(), (model.running(), model.waiting()))).collect()
    }

    /// Numbers of running and waiting sequences by tenant, over all models.
    pub fn tenants(&self) -> BTreeMap<Arc<str>, (usize, usize)> {
        let mut all = BTreeMap::new();
        for admission in self.models.lock().values() {
            admission.count_tenants(&mut all);
        }
        all
    }

    fn with<T>(&self, model: &str, act: impl FnOnce(&ModelAdmission) -> T) -> T {
        let mut models = self.models.lock();
        match models.get(model) {
            Some(admission) => act(admission),
            None => {
                let new = ModelAdmission::new(self.max_running, self.max_waiting);
                act(models.entry(model.to_owned()).or_insert(new))
            }
        }
    }
}
