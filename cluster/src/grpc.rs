//! Limits and listeners of gRPC servers.

use std::{io, net::SocketAddr, time::Duration};

use tokio::net::TcpListener;

use crate::http::ConnectionLimits;

/// Maximum number of concurrent requests of one connection. A router sends all requests to a node over one connection.
/// The engine's queue limits them and refuses the excess. The transport's default limit (200) would delay it silently.
const MAX_STREAMS: u32 = 1 << 16;
/// Connection limit of a node's gRPC server. Its clients are routers and diagnostic tools.
pub const NODE_CONNECTIONS: usize = 1024;

/// Limits of a gRPC server with `connections` connections. Client channels may be idle for up to an hour. HTTP/2 pings
/// detect clients that are gone.
pub fn limits(connections: usize) -> ConnectionLimits {
    ConnectionLimits {
        streams: MAX_STREAMS,
        http1: false,
        idle: Duration::from_secs(3600),
        ..ConnectionLimits::http(connections)
    }
}

/// Binding a listen address failed.
#[derive(Debug, thiserror::Error)]
#[error("listening on {address} (--{flag}): {source}")]
pub struct BindError {
    flag: &'static str,
    address: SocketAddr,
    source: io::Error,
}

/// Listens on `address`. Port 0 picks a free port. An error names `--flag`.
pub async fn bind(flag: &'static str, address: SocketAddr) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|source| BindError { flag, address, source })
}
