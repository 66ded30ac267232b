//! Connections of the KV plane: plain TCP or TLS.

use std::{future::ready, io, net::SocketAddr};

use overfill_cluster::{Tls, net};
use overfill_net::Listen;
use overfill_transport::tcp::{Dialer, Link, Opening, plain_dialer};
use tokio::net::TcpListener;

/// KV listener of a decode node. `accept` does not wait for the TLS handshake. The receiver awaits the handshake and
/// applies its limits to it, as it does to hello frames.
pub struct KvListener {
    listener: TcpListener,
    tls: Option<Tls>,
}

impl KvListener {
    /// Accepts connections from a bound `listener`.
    pub fn new(listener: TcpListener, tls: Option<Tls>) -> Self {
        Self { listener, tls }
    }
}

impl Listen for KvListener {
    type Connection = Link;

    async fn accept(&mut self) -> io::Result<(Opening, SocketAddr)> {
        let (stream, peer) = self.listener.accept().await?;
        let opening: Opening = match self.tls.clone() {
            None => Box::pin(ready(Link::tcp(stream))),
            Some(tls) => Box::pin(async move {
                stream.set_nodelay(true)?;
                Ok(Link::stream(tls.accept(stream).await?))
            }),
        };
        Ok((opening, peer))
    }
}

/// Dialer with which a prefill node connects to the KV listeners of decode nodes.
pub fn kv_dialer(tls: Option<Tls>) -> Dialer {
    let Some(tls) = tls else { return plain_dialer() };
    let dialer = net::tcp_dialer(Some(tls));
    Dialer::new(move |address| {
        let opening = dialer.dial(address);
        Box::pin(async move { Ok(Link::stream(opening.await?)) })
    })
}
