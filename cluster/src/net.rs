//! Connections between services, and of clients: over TLS where that is configured.

use std::{
    fmt, io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::{
    FutureExt as _, Stream, StreamExt as _,
    future::BoxFuture,
    stream::{FuturesUnordered, unfold},
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use tokio_rustls::server;
use tonic::transport::{Channel, Endpoint, server::Connected};
use tracing::{debug, warn};

use crate::Tls;

/// How long a client may take over the handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Handshakes at once; more connections wait in the system's own queue.
const MAX_HANDSHAKES: usize = 256;
/// Wait after a connection could not be taken: out of file descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A connection, whatever it runs over.
pub trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

type Dialling = BoxFuture<'static, io::Result<Box<dyn Connection>>>;

/// How a service connects to another one, at `host:port`. Clones are the same.
#[derive(Clone)]
pub struct Dialer(Arc<dyn Fn(String) -> Dialling + Send + Sync>);

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
    pub fn new(dial: impl Fn(String) -> Dialling + Send + Sync + 'static) -> Self {
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

/// What a server reads and writes.
pub enum Accepted {
    /// A plain connection.
    Plain(TcpStream),
    /// An encrypted one.
    Tls(Box<server::TlsStream<TcpStream>>),
}

/// The connections of a listener, with their handshakes done; slow clients hold up nobody but themselves.
pub struct Incoming {
    listener: TcpListener,
    tls: Option<Tls>,
    handshakes: FuturesUnordered<BoxFuture<'static, Option<(Accepted, SocketAddr)>>>,
}

impl Incoming {
    /// Of a bound listener.
    pub fn new(listener: TcpListener, tls: Option<Tls>) -> Self {
        Self { listener, tls, handshakes: FuturesUnordered::new() }
    }

    /// The next one. May be dropped and called again.
    pub async fn next(&mut self) -> (Accepted, SocketAddr) {
        loop {
            tokio::select! {
                Some(done) = self.handshakes.next() => {
                    if let Some(accepted) = done {
                        return accepted;
                    }
                }
                accepted = self.listener.accept(), if self.handshakes.len() < MAX_HANDSHAKES => match accepted {
                    Ok((stream, peer)) => {
                        // A failure costs only latency.
                        let _ = stream.set_nodelay(true);
                        match &self.tls {
                            None => return (Accepted::Plain(stream), peer),
                            Some(tls) => self.handshakes.push(shake_hands(tls.clone(), stream, peer).boxed()),
                        }
                    }
                    Err(error) => {
                        warn!(%error, "accepting a connection");
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
    }

    /// All of them, for a gRPC server.
    pub fn into_stream(self) -> impl Stream<Item = io::Result<Accepted>> + Send {
        unfold(self, async |mut incoming| {
            let (accepted, _) = incoming.next().await;
            Some((Ok(accepted), incoming))
        })
    }
}

async fn shake_hands(tls: Tls, stream: TcpStream, peer: SocketAddr) -> Option<(Accepted, SocketAddr)> {
    match timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await {
        Ok(Ok(stream)) => Some((Accepted::Tls(Box::new(stream)), peer)),
        Ok(Err(error)) => {
            debug!(%peer, %error, "TLS handshake failed");
            None
        }
        Err(_) => {
            debug!(%peer, "TLS handshake took too long");
            None
        }
    }
}

impl axum::serve::Listener for Incoming {
    type Io = Accepted;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Accepted, SocketAddr) {
        self.next().await
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

impl Connected for Accepted {
    type ConnectInfo = Option<SocketAddr>;

    fn connect_info(&self) -> Self::ConnectInfo {
        match self {
            Self::Plain(stream) => stream.peer_addr(),
            Self::Tls(stream) => stream.get_ref().0.peer_addr(),
        }
        .ok()
    }
}

impl AsyncRead for Accepted {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
