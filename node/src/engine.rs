//! How an engine is driven.

use std::{io, thread};

use overfill_kv::Role;
use tokio::sync::oneshot;

/// What a turn of an engine came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It computed a step.
    Computed,
    /// There was nothing to compute. What the engine waits for (blocks that a handoff lets go, a client that reads, a
    /// client that goes away) sends it no message.
    Idle,
    /// Nothing is left, and nothing can come: the engine is done.
    Over,
}

/// Runs an engine on a thread of its own. The receiver resolves when the thread has ended, for whatever reason.
pub fn spawn_engine(role: Role, run: impl FnOnce() + Send + 'static) -> io::Result<oneshot::Receiver<()>> {
    let (ended, end) = oneshot::channel();
    thread::Builder::new().name(format!("{role}-engine")).spawn(move || {
        let _ended: oneshot::Sender<()> = ended;
        run();
    })?;
    Ok(end)
}
