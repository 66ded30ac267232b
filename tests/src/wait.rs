//! Waits for a state.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Maximum time to wait for a state. It is generous, since loaded machines are slow.
pub const PATIENCE: Duration = Duration::from_secs(60);

const INTERVAL: Duration = Duration::from_millis(10);

/// Polls until `look` returns `None`. `Some` describes what is still missing.
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
