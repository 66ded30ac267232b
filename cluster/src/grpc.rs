//! How gRPC is served here.

use std::{io, net::SocketAddr, time::Duration};

use tokio::net::TcpListener;

use crate::http::ConnectionLimits;

/// Requests that one connection may have: a router sends all of its requests over one, and what is too much is the
/// queue's to say, not the transport's (whose default would hold up the two hundred and first in silence).
const MAX_STREAMS: u32 = 1 << 16;
/// Connections to a node: those of routers, and of who looks at it.
pub const NODE_CONNECTIONS: usize = 1024;

/// What a gRPC server grants. Channels of clients may be idle for long; pings end those whose clients have gone.
pub fn limits(connections: usize) -> ConnectionLimits {
    ConnectionLimits {
        streams: MAX_STREAMS,
        http1: false,
        idle: Duration::from_secs(3600),
        ..ConnectionLimits::http(connections)
    }
}

/// An address that could not be listened on.
#[derive(Debug, thiserror::Error)]
#[error("listening on {address} (--{flag}): {source}")]
pub struct BindError {
    flag: &'static str,
    address: SocketAddr,
    source: io::Error,
}

/// Listens on the `address` that `--flag` gave; port 0 takes a free one.
pub async fn bind(flag: &'static str, address: SocketAddr) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|source| BindError { flag, address, source })
}
