//! How connections between processes are made, whatever they run over and whatever runs on them.
//!
//! gRPC and HTTP run on [`overfill-cluster`'s connections](../overfill_cluster/net/index.html), KV on the transport's links.
//! Both are opened and accepted in the same way: over TCP, over TLS, or over a simulated network.

use std::{fmt, future::Future, io, net::SocketAddr, sync::Arc};

use futures::future::BoxFuture;

/// A connection `C` that is being opened: with its handshake, where it has one.
pub type Opening<C> = BoxFuture<'static, io::Result<C>>;

/// How a connection to `host:port` is opened. Clones are the same.
pub struct Dialer<C>(Arc<dyn Fn(String) -> Opening<C> + Send + Sync>);

impl<C> Dialer<C> {
    /// Opens connections with `dial`, which gets the address.
    pub fn new(dial: impl Fn(String) -> Opening<C> + Send + Sync + 'static) -> Self {
        Self(Arc::new(dial))
    }

    /// Opens a connection to `host:port`.
    pub fn dial(&self, address: String) -> Opening<C> {
        (self.0)(address)
    }
}

impl<C> Clone for Dialer<C> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<C> fmt::Debug for Dialer<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Dialer")
    }
}

/// Where connections come in.
pub trait Listen: Send + 'static {
    /// What comes in.
    type Connection: Send + 'static;

    /// The next connection, which is still to be opened, and its peer. Nothing is lost if this is dropped.
    fn accept(&mut self) -> impl Future<Output = io::Result<(Opening<Self::Connection>, SocketAddr)>> + Send;
}
