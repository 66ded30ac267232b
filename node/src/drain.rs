//! Draining a node. It accepts no new requests and finishes the running ones. At the drain timeout it aborts the rest, and
//! their router moves them to other nodes.

use std::{sync::Arc, time::Duration};

use overfill_cluster::Shutdown;
use tokio::{sync::watch, time::Instant};

/// A node's shutdown with a time limit for the running requests. Clones share it.
#[derive(Clone, Debug)]
pub struct Drain {
    shutdown: Shutdown,
    timeout: Duration,
    /// End of the time limit; `None` until the drain begins.
    end: Arc<watch::Sender<Option<Instant>>>,
}

impl Drain {
    /// Creates a drain of `shutdown`. `timeout` applies unless [`begin`](Self::begin) sets another one, for example
    /// when a signal begins the shutdown.
    pub fn new(shutdown: &Shutdown, timeout: Duration) -> Self {
        Self { shutdown: shutdown.clone(), timeout, end: Arc::new(watch::Sender::new(None)) }
    }

    /// Begins the shutdown. Running requests may take `timeout` from now, or the default if it is `None`. A further
    /// call replaces the time limit.
    pub fn begin(&self, timeout: Option<Duration>) {
        self.end.send_replace(Some(Instant::now() + timeout.unwrap_or(self.timeout)));
        self.shutdown.begin();
    }

    /// Resolves when the time limit is over and the remaining requests must be aborted.
    pub async fn is_over(&self) {
        self.shutdown.cancelled().await;
        self.end.send_if_modified(|end| end.is_none() && end.replace(Instant::now() + self.timeout).is_none());
        let mut end = self.end.subscribe();
        loop {
            let Some(at) = *end.borrow_and_update() else { return };
            tokio::select! {
                () = tokio::time::sleep_until(at) => return,
                // It can't fail: `self` owns the sender.
                _ = end.changed() => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    #[tokio::test(start_paused = true)]
    async fn what_runs_has_the_time_last_given() {
        let shutdown = Shutdown::new();
        let drain = Drain::new(&shutdown, LONG);
        assert!(timeout(LONG, drain.is_over()).await.is_err(), "over before it began");
        shutdown.begin();
        assert!(timeout(LONG / 2, drain.is_over()).await.is_err(), "over before its time");
        drain.begin(Some(Duration::from_secs(1)));
        timeout(Duration::from_secs(2), drain.is_over()).await.unwrap();
        drain.begin(None);
        assert!(timeout(LONG / 2, drain.is_over()).await.is_err(), "the last call does not count");
    }
}
