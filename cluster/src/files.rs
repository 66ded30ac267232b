//! The limit of open file descriptors. Every connection uses one.

use tracing::{info, warn};

/// File descriptors needed besides those of incoming connections: outgoing connections, files, and the runtime's own.
const OTHERS: usize = 256;

/// Raises the limit of open files to the maximum that the system allows. Shells and service managers often set it to
/// 1024.
///
/// `connections` is the number of connections that the process's servers may have open. Logs a warning if the limit is
/// too low for them.
pub fn raise(connections: usize) {
    let needed = (connections + OTHERS) as u64;
    match rlimit::increase_nofile_limit(u64::MAX) {
        Ok(limit) if limit < needed => {
            warn!(limit, needed, "the hard limit of open files (ulimit -Hn) is below what connections may need");
        }
        Ok(limit) => info!(limit, needed, "limit of open files"),
        Err(error) => warn!(%error, needed, "raising the limit of open files failed"),
    }
}
