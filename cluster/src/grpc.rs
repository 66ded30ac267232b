//! How gRPC is served here: keep-alive that notices vanished clients.

use std::{io, net::SocketAddr, time::Duration};

use tokio::net::TcpListener;
use tonic::transport::Server;

/// A client that does not answer a ping for this long is gone, and its requests with it.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// Requests that one connection may have: a router sends all of its requests over one, and what is too much is the
/// queue's to say, not the transport's (whose default would hold up the two hundred and first in silence).
const MAX_STREAMS: u32 = 1 << 16;

/// A server with this project's connection settings.
pub fn server() -> Server {
    Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
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
