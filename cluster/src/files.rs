//! File descriptors: every connection takes one.

use tracing::{info, warn};

/// What a process has open besides the connections that its servers grant: those that it makes, files, and the runtime's
/// own.
const OTHERS: usize = 256;

/// Raises the limit of open files as far as the system lets it: what shells and service managers begin with is often 1024.
/// `connections`: what its servers may have open, about which a warning is given if it is more than that.
pub fn raise(connections: usize) {
    let needed = (connections + OTHERS) as u64;
    match rlimit::increase_nofile_limit(u64::MAX) {
        Ok(limit) if limit < needed => {
            warn!(limit, needed, "the system allows fewer open files than connections may need (ulimit -Hn)");
        }
        Ok(limit) => info!(limit, needed, "open files"),
        Err(error) => warn!(%error, needed, "the limit of open files could not be raised"),
    }
}
