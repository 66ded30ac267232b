//! How many connections a receiver has, and who goes when there are too many.
//!
//! A stranger who opens connections and sends nothing keeps each for as long as a hello may take. So those that have
//! not shown a ticket of ours yet have to give way, the oldest first: a sender shows its ticket at once.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

/// The connections of one receiver.
pub(crate) struct Newcomers {
    slots: Arc<Semaphore>,
    /// Those that have no attempt yet, in the order in which they came.
    waiting: Mutex<VecDeque<Waiting>>,
    next_key: AtomicU64,
}

struct Waiting {
    key: u64,
    slot: OwnedSemaphorePermit,
    sent_away: CancellationToken,
}

/// One connection's place among them. Dropping it gives the place back.
pub(crate) struct Place {
    all: Arc<Newcomers>,
    key: u64,
    sent_away: CancellationToken,
    slot: Mutex<Option<OwnedSemaphorePermit>>,
}

impl Newcomers {
    /// Room for `max` connections.
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { slots: Arc::new(Semaphore::new(max)), waiting: Mutex::default(), next_key: AtomicU64::new(0) })
    }

    /// A place for a connection; `None` if there is none, and everybody who has one has a handoff.
    pub fn enter(self: &Arc<Self>) -> Option<Place> {
        let (key, sent_away) = (self.next_key.fetch_add(1, Ordering::Relaxed), CancellationToken::new());
        let mut waiting = self.waiting.lock();
        let slot = match self.slots.clone().try_acquire_owned() {
            Ok(slot) => slot,
            Err(_) => {
                let oldest = waiting.pop_front()?;
                oldest.sent_away.cancel();
                oldest.slot
            }
        };
        waiting.push_back(Waiting { key, slot, sent_away: sent_away.clone() });
        Some(Place { all: self.clone(), key, sent_away, slot: Mutex::new(None) })
    }
}

impl Place {
    /// Resolves when another connection has taken the place.
    pub async fn taken(&self) {
        self.sent_away.cancelled().await;
    }

    /// From now on nobody takes it; false if somebody has.
    pub fn keep(&self) -> bool {
        let slot = self.leave_queue();
        let kept = slot.is_some();
        *self.slot.lock() = slot;
        kept
    }

    fn leave_queue(&self) -> Option<OwnedSemaphorePermit> {
        let mut waiting = self.all.waiting.lock();
        let at = waiting.iter().position(|other| other.key == self.key)?;
        waiting.remove(at).map(|found| found.slot)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(self.leave_queue());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_without_a_handoff_gives_way() {
        let all = Newcomers::new(2);
        let (first, second) = (all.enter().unwrap(), all.enter().unwrap());
        assert!(first.keep());
        let third = all.enter().unwrap();
        assert!(second.sent_away.is_cancelled() && !second.keep());
        assert!(!first.sent_away.is_cancelled() && third.keep());
        // Both have handoffs now.
        assert!(all.enter().is_none());
        drop(second);
        assert!(all.enter().is_none(), "a place that was taken was given back again");
        drop(first);
        let fourth = all.enter().unwrap();
        drop((third, fourth));
        assert_eq!((all.slots.available_permits(), all.waiting.lock().len()), (2, 0));
    }
}
