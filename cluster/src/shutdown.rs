//! Shutdown of a process: a token signals that it has begun, and a tracker that all tasks have ended.

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

/// The shutdown of a process, shared by all its parts. Clones share the state.
///
/// [`begin`](Self::begin) asks every part to accept nothing new and to finish its work. [`wait`](Self::wait) returns
/// when all tasks started by [`spawn`](Self::spawn) have ended.
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

    /// Begins the shutdown. Further calls have no effect.
    pub fn begin(&self) {
        self.token.cancel();
    }

    /// Whether the shutdown has begun.
    pub fn has_begun(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Resolves when the shutdown has begun.
    pub fn cancelled(&self) -> WaitForCancellationFuture<'_> {
        self.token.cancelled()
    }

    /// Returns the token, for code that does not use this type.
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

    /// Waits until all tasks have ended, for at most `limit`. Returns false if some still run.
    pub async fn wait(&self, limit: Duration) -> bool {
        self.tracker.close();
        tokio::time::timeout(limit, self.tracker.wait()).await.is_ok()
    }

    /// Handles SIGTERM and SIGINT from now on: the first one begins the shutdown, a further one ends the process at
    /// once.
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
                    warn!(signal = name, "second signal: exiting immediately");
                    std::process::exit(128 + number);
                }
                info!(signal = name, "shutting down; a second signal exits immediately");
                shutdown.begin();
            }
        });
        Ok(())
    }

    /// Begins the shutdown when standard input closes. So a child process ends with its parent, even if the parent was
    /// killed.
    pub fn follow_stdin(&self) -> io::Result<()> {
        let shutdown = self.clone();
        // A separate thread, which the process exit ends. tokio's stdin would block the shutdown of the runtime.
        std::thread::Builder::new().name("stdin".into()).spawn(move || {
            let mut sink = [0; 256];
            loop {
                match io::stdin().read(&mut sink) {
                    Ok(0) => break,
                    Ok(_) => {}
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => {
                        warn!(error = %e, "reading standard input failed");
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
