//! The admission of all models.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;

use super::{Ask, ModelAdmission, Place, check_count};
use crate::{GenerateError, tenants::Tenant};

/// Each model's bounds and queue. Clones share them.
#[derive(Clone)]
pub struct Admission {
    max_running: usize,
    max_waiting: usize,
    /// By name. A model that was known once stays, as it does among the nodes. There are few models.
    models: Arc<Mutex<HashMap<String, ModelAdmission>>>,
}

impl Admission {
    /// At most `max_running` sequences of each model run, and at most `max_waiting` wait.
    pub fn new(max_running: usize, max_waiting: usize) -> Self {
        Self { max_running, max_waiting, models: Arc::default() }
    }

    /// Sets how many sequences the model's nodes compute at once. More would wait on the nodes, which know no turns.
    /// `None`: the model has no nodes, and sequences that are admitted are told so.
    pub fn set_capacity(&self, model: &str, places: Option<usize>) {
        self.with(model, |admission| admission.set_capacity(places.unwrap_or(self.max_running)));
    }

    /// A place for each of these sequences of a model, or for none. Does not wait.
    pub fn enter(&self, model: &str, tenant: &Arc<Tenant>, asks: &[Ask]) -> Result<Vec<Place>, GenerateError> {
        self.with(model, |admission| admission.enter(tenant, asks))
    }

    /// Refuses a request of more sequences than can ever have places, before anything is made of them.
    pub fn check_count(&self, count: usize) -> Result<(), GenerateError> {
        check_count(count, self.max_running + self.max_waiting)
    }

    /// Sequences on the nodes now.
    pub fn running(&self) -> usize {
        self.models.lock().values().map(ModelAdmission::running).sum()
    }

    /// Sequences waiting now.
    pub fn waiting(&self) -> usize {
        self.models.lock().values().map(ModelAdmission::waiting).sum()
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
