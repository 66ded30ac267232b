//! Interfaces to open and accept connections between processes, over TCP, TLS or a simulated network.
//!
//! gRPC and HTTP run on the connections of `overfill_cluster::net`, KV runs on the links of `overfill_transport::tcp`. Both
//! use [`Dialer`] and [`Listen`].

use std::{fmt, future::Future, io, net::SocketAddr, sync::Arc};

use futures::future::BoxFuture;

/// Future that opens a connection of type `C`. It includes the handshake, if there is one.
pub type Opening<C> = BoxFuture<'static, io::Result<C>>;

/// Opens connections to `host:port` addresses. Clones share the same function.
pub struct Dialer<C>(Arc<dyn Fn(String) -> Opening<C> + Send + Sync>);

impl<C> Dialer<C> {
    /// A dialer that calls `dial` with the address.
    pub fn new(dial: impl Fn(String) -> Opening<C> + Send + Sync + 'static) -> Self {
        Self(Arc::new(dial))
    }

    /// Opens a connection to `address`, which is `host:port`.
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

/// Accepts connections.
pub trait Listen: Send + 'static {
    /// Type of the connections.
    type Connection: Send + 'static;

    /// Waits for the next connection. Returns a future that completes its handshake, and the peer's address. Dropping
    /// the call before it returns loses no connection.
    fn accept(&mut self) -> impl Future<Output = io::Result<(Opening<Self::Connection>, SocketAddr)>> + Send;
}
