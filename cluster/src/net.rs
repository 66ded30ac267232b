//! TCP connections of services and their clients, with TLS if configured.

use std::{io, net::SocketAddr};

use futures::FutureExt as _;
use hyper_util::rt::TokioIo;
use overfill_net::Listen;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
};
use tonic::transport::{Channel, Endpoint};

use crate::Tls;

/// A byte stream: plain TCP, TLS, or a simulated network.
pub trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// A connection that is being opened: the future includes its TLS handshake.
pub type Opening = overfill_net::Opening<Box<dyn Connection>>;

/// Opens connections to other services.
pub type Dialer = overfill_net::Dialer<Box<dyn Connection>>;

/// Creates a dialer for TCP connections, with TLS if `tls` is set.
pub fn tcp_dialer(tls: Option<Tls>) -> Dialer {
    Dialer::new(move |endpoint| {
        let tls = tls.clone();
        async move {
            let stream = TcpStream::connect(&endpoint).await?;
            // Tokens are small messages. Nagle's algorithm would delay them.
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

/// Opens a gRPC channel to `url` (`http://` or `https://`). The dialer alone decides whether TLS is used. `configure`
/// may change the endpoint's settings.
pub async fn channel(
    dialer: &Dialer,
    url: &str,
    configure: impl FnOnce(Endpoint) -> Endpoint,
) -> Result<Channel, tonic::transport::Error> {
    // tonic must not add TLS of its own: the dialer returns connections that are already encrypted.
    let plain = url.strip_prefix("https://").map_or_else(|| url.to_owned(), |rest| format!("http://{rest}"));
    let dialer = dialer.clone();
    let connector = tower::service_fn(move |uri: http::Uri| {
        let opening = dialer.dial(uri.authority().map(ToString::to_string).unwrap_or_default());
        async move { opening.await.map(TokioIo::new) }
    });
    configure(Endpoint::from_shared(plain)?).connect_with_connector(connector).await
}

/// Listener for TCP connections, with TLS if configured.
pub struct Listener {
    listener: TcpListener,
    tls: Option<Tls>,
}

impl Listener {
    /// Accepts connections from a bound `listener`.
    pub fn new(listener: TcpListener, tls: Option<Tls>) -> Self {
        Self { listener, tls }
    }
}

impl Listen for Listener {
    type Connection = Box<dyn Connection>;

    async fn accept(&mut self) -> io::Result<(Opening, SocketAddr)> {
        let (stream, peer) = self.listener.accept().await?;
        // Ignored: without TCP_NODELAY the connection works, with a higher latency.
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
