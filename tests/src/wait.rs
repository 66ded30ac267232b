//! Waiting on state.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Longest wait for a state that must come. Generous: a loaded machine is slow, and only a fault reaches it.
pub const PATIENCE: Duration = Duration::from_secs(60);

const INTERVAL: Duration = Duration::from_millis(10);

/// Looks until `look` gives `None`; while it gives `Some`, that says what is still missing.
pub fn wait_for(what: &str, mut look: impl FnMut() -> Result<Option<String>>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let Some(missing) = look()? else { return Ok(()) };
        if Instant::now() >= deadline {
            bail!("waited {} s for {what}: {missing}", PATIENCE.as_secs());
        }
        std::thread::sleep(INTERVAL);
    }
}
