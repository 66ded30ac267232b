//! Connection limit of a receiver.
//!
//! A client that opens connections and sends nothing occupies each for the hello timeout. So connections that have not
//! presented a valid ticket yet are newcomers. At the limit, the oldest newcomer is evicted for each new connection. A
//! real sender presents its ticket at once.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

/// The connections of one receiver.
pub(crate) struct Newcomers {
    slots: Arc<Semaphore>,
    /// Newcomers, oldest first.
    waiting: Mutex<VecDeque<Waiting>>,
    next_key: AtomicU64,
}

struct Waiting {
    key: u64,
    slot: OwnedSemaphorePermit,
    sent_away: CancellationToken,
}

/// One connection. Dropping it frees its slot.
pub(crate) struct Newcomer {
    all: Arc<Newcomers>,
    key: u64,
    sent_away: CancellationToken,
    slot: Mutex<Option<OwnedSemaphorePermit>>,
}

impl Newcomers {
    /// Slots for `max` connections.
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { slots: Arc::new(Semaphore::new(max)), waiting: Mutex::default(), next_key: AtomicU64::new(0) })
    }

    /// Admits a connection. If no slot is free, evicts the oldest newcomer. `None` if all connections have handoffs.
    pub fn enter(self: &Arc<Self>) -> Option<Newcomer> {
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
        Some(Newcomer { all: self.clone(), key, sent_away, slot: Mutex::new(None) })
    }
}

impl Newcomer {
    /// Resolves when this connection is evicted.
    pub async fn sent_away(&self) {
        self.sent_away.cancelled().await;
    }

    /// Protects this connection from eviction. False if it was evicted already.
    pub fn stay(&self) -> bool {
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

impl Drop for Newcomer {
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
        assert!(first.stay());
        let third = all.enter().unwrap();
        assert!(second.sent_away.is_cancelled() && !second.stay());
        assert!(!first.sent_away.is_cancelled() && third.stay());
        // Both connections have handoffs now.
        assert!(all.enter().is_none());
        drop(second);
        assert!(all.enter().is_none(), "the slot of an evicted connection was freed twice");
        drop(first);
        let fourth = all.enter().unwrap();
        drop((third, fourth));
        assert_eq!((all.slots.available_permits(), all.waiting.lock().len()), (2, 0));
    }
}
