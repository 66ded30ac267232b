//! The thread of an engine, and the result of one turn.

use std::{io, thread};

use overfill_kv::Role;
use tokio::sync::oneshot;

/// Result of one turn of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// The engine computed a step.
    Computed,
    /// There was nothing to compute. If requests wait, the engine must poll: no message tells it that a handoff has
    /// freed blocks, or that a client has read its events or disconnected.
    Idle,
    /// No work is left, and all handles are dropped, so no request can arrive: the engine ends.
    Over,
}

/// Runs an engine on a dedicated thread. The receiver resolves (with an error) when the thread has ended, also after a
/// panic.
pub fn spawn_engine(role: Role, run: impl FnOnce() + Send + 'static) -> io::Result<oneshot::Receiver<()>> {
    let (ended, end) = oneshot::channel();
    thread::Builder::new().name(format!("{role}-engine")).spawn(move || {
        let _ended: oneshot::Sender<()> = ended;
        run();
    })?;
    Ok(end)
}
