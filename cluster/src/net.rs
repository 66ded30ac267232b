//! Connections between services, and of clients: over TLS where that is configured.

use std::{fmt, future::Future, io, net::SocketAddr, sync::Arc};

use futures::{FutureExt as _, future::BoxFuture};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
};
use tonic::transport::{Channel, Endpoint};

use crate::Tls;

/// A connection, whatever it runs over.
pub trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// A connection that is being opened: with its handshake, where it has one.
pub type Opening = BoxFuture<'static, io::Result<Box<dyn Connection>>>;

/// How a service connects to another one, at `host:port`. Clones are the same.
#[derive(Clone)]
pub struct Dialer(Arc<dyn Fn(String) -> Opening + Send + Sync>);

impl Dialer {
    /// Over TCP: plain, or with TLS.
    pub fn tcp(tls: Option<Tls>) -> Self {
        Self::new(move |endpoint| {
            let tls = tls.clone();
            async move {
                let stream = TcpStream::connect(&endpoint).await?;
                // Tokens are small messages: they must not wait for more of them.
                stream.set_nodelay(true)?;
                let connection: Box<dyn Connection> = match tls {
                    Some(tls) => Box::new(tls.connect(&endpoint, stream).await?),
                    None => Box::new(stream),
                };
                Ok(connection)
            }
            .boxed()
        })
    }

    /// By any other way.
    pub fn new(dial: impl Fn(String) -> Opening + Send + Sync + 'static) -> Self {
        Self(Arc::new(dial))
    }

    /// Connects to `host:port`.
    pub async fn dial(&self, endpoint: String) -> io::Result<Box<dyn Connection>> {
        (self.0)(endpoint).await
    }

    /// A gRPC channel to `url` (`http://` or `https://`; what it runs over is the dialer's affair). `configure` has the
    /// last word on its settings.
    pub async fn channel(
        &self,
        url: &str,
        configure: impl FnOnce(Endpoint) -> Endpoint,
    ) -> Result<Channel, tonic::transport::Error> {
        // To tonic it is plain: the connection that it is given is encrypted already.
        let plain = url.strip_prefix("https://").map_or_else(|| url.to_owned(), |rest| format!("http://{rest}"));
        let dialer = self.clone();
        let connector = tower::service_fn(move |uri: http::Uri| {
            let dialer = dialer.clone();
            async move {
                let endpoint = uri.authority().map(ToString::to_string).unwrap_or_default();
                dialer.dial(endpoint).await.map(TokioIo::new)
            }
        });
        configure(Endpoint::from_shared(plain)?).connect_with_connector(connector).await
    }
}

impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Dialer")
    }
}

/// Where connections come in.
pub trait Listen: Send {
    /// The next connection, whose handshake is still to be made, and who makes it. May be dropped and called again.
    fn accept(&mut self) -> impl Future<Output = io::Result<(Opening, SocketAddr)>> + Send;
}

/// TCP connections, plain or with TLS.
pub struct Listener {
    listener: TcpListener,
    tls: Option<Tls>,
}

impl Listener {
    /// Over a bound listener.
    pub fn new(listener: TcpListener, tls: Option<Tls>) -> Self {
        Self { listener, tls }
    }
}

impl Listen for Listener {
    async fn accept(&mut self) -> io::Result<(Opening, SocketAddr)> {
        let (stream, peer) = self.listener.accept().await?;
        // A failure costs only latency.
        let _ = stream.set_nodelay(true);
        let tls = self.tls.clone();
        let opening = async move {
            let connection: Box<dyn Connection> = match tls {
                None => Box::new(stream),
                Some(tls) => Box::new(tls.accept(stream).await?),
            };
            Ok(connection)
        };
        Ok((opening.boxed(), peer))
    }
}
