//! How a process stops: a token says that shutdown began, a tracker that everything has ended.

use std::{future::Future, io, io::Read, time::Duration};

use tokio::{
    signal::unix::{SignalKind, signal},
    task::JoinHandle,
};
use tokio_util::{
    sync::{CancellationToken, WaitForCancellationFuture},
    task::TaskTracker,
};
use tracing::{Instrument, error_span, info, warn};

/// Shared by all parts of a process; clones are the same shutdown.
///
/// [`begin`](Self::begin) asks every part to take nothing new and end what runs; [`wait`](Self::wait) returns when all
/// tasks started by [`spawn`](Self::spawn) have.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    token: CancellationToken,
    tracker: TaskTracker,
}

impl Shutdown {
    /// A shutdown that has not begun.
    pub fn new() -> Self {
        Self::default()
    }

    /// Begins it. Beginning twice is the same as once.
    pub fn begin(&self) {
        self.token.cancel();
    }

    /// Has it begun?
    pub fn has_begun(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Resolves when it has begun.
    pub fn cancelled(&self) -> WaitForCancellationFuture<'_> {
        self.token.cancelled()
    }

    /// The token, for code that knows nothing of this type.
    pub fn token(&self) -> CancellationToken {
        self.token.clone()
    }

    /// Starts a task that [`wait`](Self::wait) waits for.
    pub fn spawn<F>(&self, name: &'static str, task: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.tracker.spawn(task.instrument(error_span!("task", name)))
    }

    /// Waits until every task has ended, at most `limit`. False if some still run.
    pub async fn wait(&self, limit: Duration) -> bool {
        self.tracker.close();
        tokio::time::timeout(limit, self.tracker.wait()).await.is_ok()
    }

    /// From now on the first SIGTERM or SIGINT begins the shutdown, and the second ends the process at once.
    pub fn follow_signals(&self) -> io::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let shutdown = self.clone();
        // Not tracked: it listens until the process ends.
        tokio::spawn(async move {
            loop {
                let (name, number) = tokio::select! {
                    _ = terminate.recv() => ("SIGTERM", 15),
                    _ = interrupt.recv() => ("SIGINT", 2),
                };
                if shutdown.has_begun() {
                    warn!(signal = name, "ending at once");
                    std::process::exit(128 + number);
                }
                info!(signal = name, "shutting down; once more ends at once");
                shutdown.begin();
            }
        });
        Ok(())
    }

    /// Begins the shutdown when standard input closes: a child then ends with its parent, however that one ended.
    pub fn follow_stdin(&self) -> io::Result<()> {
        let shutdown = self.clone();
        // A thread of its own, left behind at exit: tokio's stdin would hold up the end of the runtime.
        std::thread::Builder::new().name("stdin".into()).spawn(move || {
            let mut sink = [0; 256];
            loop {
                match io::stdin().read(&mut sink) {
                    Ok(0) => break,
                    Ok(_) => {}
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => {
                        warn!(error = %e, "reading standard input");
                        break;
                    }
                }
            }
            shutdown.begin();
        })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn wait_returns_when_every_task_has_ended() {
        let shutdown = Shutdown::new();
        let inner = shutdown.clone();
        let task = shutdown.spawn("test", async move { inner.cancelled().await });
        assert!(!shutdown.has_begun());
        assert!(!shutdown.wait(Duration::ZERO).await);
        shutdown.begin();
        assert!(shutdown.wait(Duration::from_secs(60)).await);
        task.await.unwrap();
    }
}
