//! Where KV comes in: over plain TCP, or TLS.

use std::{future::ready, io, net::SocketAddr};

use overfill_cluster::Tls;
use overfill_transport::{Link, Listen, Opening};
use tokio::net::TcpListener;

/// The KV plane's listener. Handshakes are the receiver's to wait for: it limits them as it limits hellos.
pub struct KvListener {
    listener: TcpListener,
    tls: Option<Tls>,
}

impl KvListener {
    /// Over a bound listener.
    pub fn new(listener: TcpListener, tls: Option<Tls>) -> Self {
        Self { listener, tls }
    }
}

impl Listen for KvListener {
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
