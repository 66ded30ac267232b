//! Connections between services, and of clients: over TLS where that is configured.

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

/// A connection, whatever it runs over.
pub trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// A connection that is being opened.
pub type Opening = overfill_net::Opening<Box<dyn Connection>>;

/// How a service connects to another one.
pub type Dialer = overfill_net::Dialer<Box<dyn Connection>>;

/// Connects over TCP: plain, or with TLS.
pub fn tcp_dialer(tls: Option<Tls>) -> Dialer {
    Dialer::new(move |endpoint| {
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

/// A gRPC channel to `url` (`http://` or `https://`; the dialer decides what it runs over). `configure` has the last word on
/// its settings.
pub async fn channel(
    dialer: &Dialer,
    url: &str,
    configure: impl FnOnce(Endpoint) -> Endpoint,
) -> Result<Channel, tonic::transport::Error> {
    // To tonic it is plain: the connection that it is given is encrypted already.
    let plain = url.strip_prefix("https://").map_or_else(|| url.to_owned(), |rest| format!("http://{rest}"));
    let dialer = dialer.clone();
    let connector = tower::service_fn(move |uri: http::Uri| {
        let opening = dialer.dial(uri.authority().map(ToString::to_string).unwrap_or_default());
        async move { opening.await.map(TokioIo::new) }
    });
    configure(Endpoint::from_shared(plain)?).connect_with_connector(connector).await
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
    type Connection = Box<dyn Connection>;

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
