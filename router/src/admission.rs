//! Who may run: a bounded number of sequences on the nodes, a bounded number waiting, in order of arrival.

use std::sync::Arc;

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout_at},
};

use crate::GenerateError;

/// The bounds. Clones share them.
#[derive(Clone)]
pub struct Admission {
    places: Arc<Semaphore>,
    running: Arc<Semaphore>,
    max_running: usize,
    max_places: usize,
}

/// The right to wait. Dropping it leaves.
pub struct Place {
    running: Arc<Semaphore>,
    place: OwnedSemaphorePermit,
}

/// The right to use the nodes. Dropping it lets the next one in.
pub struct Running {
    _running: OwnedSemaphorePermit,
    _place: OwnedSemaphorePermit,
}

impl Admission {
    /// `max_running` may run and `max_waiting` more may wait.
    pub fn new(max_running: usize, max_waiting: usize) -> Self {
        let max_places = max_running + max_waiting;
        Self {
            places: Arc::new(Semaphore::new(max_places)),
            running: Arc::new(Semaphore::new(max_running)),
            max_running,
            max_places,
        }
    }

    /// A place for each of `n` sequences, or for none. Does not wait.
    pub fn enter(&self, n: usize) -> Result<Vec<Place>, GenerateError> {
        if n > self.max_places {
            let message = format!("n times the number of prompts must be at most {}, got {n}", self.max_places);
            return Err(GenerateError::invalid("n", message));
        }
        let full = GenerateError::QueueFull { limit: self.max_places };
        let all = self.places.clone().try_acquire_many_owned(n as u32).map_err(|_| full)?;
        let mut rest = all;
        let mut places = Vec::with_capacity(n);
        while let Some(place) = rest.split(1) {
            places.push(Place { running: self.running.clone(), place });
        }
        Ok(places)
    }

    /// Sequences on the nodes now.
    pub fn running(&self) -> usize {
        self.max_running - self.running.available_permits()
    }

    /// Sequences waiting now.
    pub fn waiting(&self) -> usize {
        (self.max_places - self.places.available_permits()).saturating_sub(self.running())
    }
}

impl Place {
    /// Waits for its turn, at most until `until`; `None` if that passes first.
    pub async fn run(self, until: Instant) -> Option<Running> {
        let running = timeout_at(until, self.running.acquire_owned()).await.ok()?.ok()?;
        Some(Running { _running: running, _place: self.place })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bounds_hold_and_places_come_back() {
        let admission = Admission::new(1, 1);
        let until = Instant::now() + std::time::Duration::from_secs(60);
        let mut places = admission.enter(2).unwrap();
        assert_eq!(admission.enter(1).err(), Some(GenerateError::QueueFull { limit: 2 }));
        let second = places.pop().unwrap();
        let first = places.pop().unwrap().run(until).await.unwrap();
        assert_eq!((admission.running(), admission.waiting()), (1, 1));
        assert!(second.run(Instant::now()).await.is_none());
        assert_eq!((admission.running(), admission.waiting()), (1, 0));
        drop(first);
        assert_eq!((admission.running(), admission.waiting()), (0, 0));
        assert!(matches!(admission.enter(3), Err(GenerateError::Invalid { .. })));
        assert!(admission.enter(1).unwrap().pop().unwrap().run(until).await.is_some());
    }
}
