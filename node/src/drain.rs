//! How a node empties itself: it takes nothing new, ends what runs, and gives away what runs too long.

use std::{sync::Arc, time::Duration};

use overfill_cluster::Shutdown;
use tokio::{sync::watch, time::Instant};

/// A node's shutdown with a time for what still runs. Clones are the same drain.
#[derive(Clone, Debug)]
pub struct Drain {
    shutdown: Shutdown,
    timeout: Duration,
    /// When what still runs has to go, once somebody has said so.
    end: Arc<watch::Sender<Option<Instant>>>,
}

impl Drain {
    /// When `shutdown` begins by itself (a signal), what runs has `timeout`.
    pub fn new(shutdown: &Shutdown, timeout: Duration) -> Self {
        Self { shutdown: shutdown.clone(), timeout, end: Arc::new(watch::Sender::new(None)) }
    }

    /// Begins the shutdown; what runs has `timeout` from now on, else the usual time. The last call counts.
    pub fn begin(&self, timeout: Option<Duration>) {
        self.end.send_replace(Some(Instant::now() + timeout.unwrap_or(self.timeout)));
        self.shutdown.begin();
    }

    /// Resolves when what still runs has to go elsewhere.
    pub async fn is_over(&self) {
        self.shutdown.cancelled().await;
        self.end.send_if_modified(|end| end.is_none() && end.replace(Instant::now() + self.timeout).is_none());
        let mut end = self.end.subscribe();
        loop {
            let Some(at) = *end.borrow_and_update() else { return };
            tokio::select! {
                () = tokio::time::sleep_until(at) => return,
                // The sender is in `self`.
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
