//! Settings in files that are read again when the files change.

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

/// Files are looked at when what they hold is asked for, but not more often than this.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// What some files hold, made usable.
pub struct Reloaded<T> {
    /// For logs.
    what: &'static str,
    files: Vec<PathBuf>,
    state: Mutex<State<T>>,
}

struct State<T> {
    looked: Instant,
    stamps: Vec<Stamp>,
    value: Arc<T>,
}

/// Tells whether a file has changed.
type Stamp = Option<(SystemTime, u64)>;

impl<T> Reloaded<T> {
    /// `value` is what `files` hold now.
    pub fn new(what: &'static str, files: Vec<PathBuf>, value: T) -> Self {
        let state = State { looked: Instant::now(), stamps: stamps(&files), value: Arc::new(value) };
        Self { what, files, state: Mutex::new(state) }
    }

    /// What the files hold; if they can't be used any more, what they last held. `read` gets that.
    pub fn get<E: Display>(&self, read: impl FnOnce(&T) -> Result<T, E>) -> Arc<T> {
        let mut state = self.state.lock();
        if state.looked.elapsed() >= LOOK_INTERVAL {
            state.looked = Instant::now();
            let stamps = stamps(&self.files);
            if stamps != state.stamps {
                match read(&state.value) {
                    Ok(value) => {
                        info!("{} have changed", self.what);
                        (state.value, state.stamps) = (Arc::new(value), stamps);
                    }
                    // Perhaps only one of two files has been replaced so far: they are tried again.
                    Err(error) => warn!(%error, "{} have changed, but can't be used", self.what),
                }
            }
        }
        state.value.clone()
    }
}

fn stamps(files: &[PathBuf]) -> Vec<Stamp> {
    files.iter().map(|path| fs::metadata(path).and_then(|m| Ok((m.modified()?, m.len()))).ok()).collect()
}
