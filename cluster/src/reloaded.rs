//! Settings from files that are reloaded when the files change.

use std::{
    fmt::Display,
    fs,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use tokio::time::Instant;
use tracing::{info, warn};

/// Minimum interval between two checks of the files. A check happens when the value is read.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// A value read from files, and reloaded after they change.
pub struct Reloaded<T> {
    /// Description of the files for logs, in the plural.
    what: &'static str,
    files: Vec<PathBuf>,
    state: Mutex<State<T>>,
}

struct State<T> {
    looked: Instant,
    stamps: Vec<Stamp>,
    value: Arc<T>,
}

/// Modification time and size of a file, to detect changes. `None` if they can't be read.
type Stamp = Option<(SystemTime, u64)>;

impl<T> Reloaded<T> {
    /// Creates it with `value`, the current content of `files`.
    pub fn new(what: &'static str, files: Vec<PathBuf>, value: T) -> Self {
        let state = State { looked: Instant::now(), stamps: stamps(&files), value: Arc::new(value) };
        Self { what, files, state: Mutex::new(state) }
    }

    /// Returns the current value. If the files have changed, calls `read` with the last value to reload them. If `read`
    /// fails, keeps the last value.
    pub fn get<E: Display>(&self, read: impl FnOnce(&T) -> Result<T, E>) -> Arc<T> {
        let mut state = self.state.lock();
        if state.looked.elapsed() >= LOOK_INTERVAL {
            state.looked = Instant::now();
            let stamps = stamps(&self.files);
            if stamps != state.stamps {
                match read(&state.value) {
                    Ok(value) => {
                        info!("{} reloaded", self.what);
                        (state.value, state.stamps) = (Arc::new(value), stamps);
                    }
                    // The stamps stay the old ones, so the next check reads again: perhaps only some of the files have
                    // been replaced so far.
                    Err(error) => warn!(%error, "{} have changed but can't be loaded", self.what),
                }
            }
        }
        state.value.clone()
    }
}

fn stamps(files: &[PathBuf]) -> Vec<Stamp> {
    files.iter().map(|path| fs::metadata(path).and_then(|m| Ok((m.modified()?, m.len()))).ok()).collect()
}
