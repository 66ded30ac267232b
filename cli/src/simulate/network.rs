//! Connections between the services of a simulation: pipes in memory. A host that is killed resets its connections. KV
//! leaves a host at the speed of its link.

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::FutureExt as _;
use overfill_cluster::net;
use overfill_net::Listen;
use overfill_transport::tcp;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf, duplex},
    sync::mpsc,
    time::{Instant, Sleep, sleep_until},
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// Capacity of a pipe in each direction, in bytes.
const PIPE_BYTES: usize = 64 * 1024;
/// Connections that wait for being accepted.
const BACKLOG: usize = 1024;
/// A link accepts bytes ahead of time for this long: the resolution of timers.
const AHEAD: Duration = Duration::from_millis(1);

/// The listening addresses of all hosts. Clones share them.
#[derive(Clone, Default)]
pub struct Network(Arc<Mutex<HashMap<String, mpsc::Sender<DuplexStream>>>>);

impl Network {
    /// Listens on `host:port` until the port is dropped. Connections end when `off` is cancelled.
    pub fn listen(&self, address: String, off: &CancellationToken) -> Port {
        let (sender, incoming) = mpsc::channel(BACKLOG);
        self.0.lock().insert(address, sender);
        Port { incoming, off: off.clone() }
    }

    async fn connect(&self, address: String) -> io::Result<DuplexStream> {
        let port = self.0.lock().get(&address).cloned();
        let refused = || io::Error::new(io::ErrorKind::ConnectionRefused, format!("{address} is not listening"));
        let (here, there) = duplex(PIPE_BYTES);
        port.ok_or_else(refused)?.send(there).await.map_err(|_| refused())?;
        Ok(here)
    }

    /// Opens the router's connections to nodes.
    pub fn dialer(&self) -> net::Dialer {
        let network = self.clone();
        net::Dialer::new(move |address| {
            let network = network.clone();
            async move {
                let connection: Box<dyn net::Connection> = Box::new(network.connect(address).await?);
                Ok(connection)
            }
            .boxed()
        })
    }

    /// Opens the KV connections of a prefill node.
    pub fn kv_dialer(&self, uplink: &Uplink, off: &CancellationToken) -> tcp::Dialer {
        let (network, uplink, off) = (self.clone(), uplink.clone(), off.clone());
        tcp::Dialer::new(move |address| {
            let (network, uplink, off) = (network.clone(), uplink.clone(), off.clone());
            async move { Ok(tcp::Link::stream(Wire::new(network.connect(address).await?, &off, Some(uplink)))) }.boxed()
        })
    }
}

/// A listening address.
pub struct Port {
    incoming: mpsc::Receiver<DuplexStream>,
    off: CancellationToken,
}

impl Port {
    async fn next(&mut self) -> Wire {
        match self.incoming.recv().await {
            Some(stream) => Wire::new(stream, &self.off, None),
            // The address listens again in another process.
            None => std::future::pending().await,
        }
    }
}

/// All peers have this address.
const PEER: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 1);

/// Accepts gRPC connections.
pub struct GrpcPort(pub Port);

impl Listen for GrpcPort {
    type Connection = Box<dyn net::Connection>;

    async fn accept(&mut self) -> io::Result<(net::Opening, SocketAddr)> {
        let connection: Box<dyn net::Connection> = Box::new(self.0.next().await);
        Ok((std::future::ready(Ok(connection)).boxed(), PEER))
    }
}

/// Accepts KV connections.
pub struct KvPort(pub Port);

impl Listen for KvPort {
    type Connection = tcp::Link;

    async fn accept(&mut self) -> io::Result<(tcp::Opening, SocketAddr)> {
        let link = tcp::Link::stream(self.0.next().await);
        Ok((std::future::ready(Ok(link)).boxed(), PEER))
    }
}

/// The speed at which a host sends KV, over all its connections. Clones share it.
#[derive(Clone)]
pub struct Uplink {
    bytes_per_second: f64,
    /// When the bytes that were accepted so far have been sent.
    free_at: Arc<Mutex<Instant>>,
}

impl Uplink {
    /// A link of this speed.
    pub fn new(bytes_per_second: f64) -> Self {
        Self { bytes_per_second, free_at: Arc::new(Mutex::new(Instant::now())) }
    }
}

/// One end of a connection.
struct Wire {
    stream: DuplexStream,
    off: Pin<Box<WaitForCancellationFutureOwned>>,
    uplink: Option<Uplink>,
    wait: Option<Pin<Box<Sleep>>>,
}

impl Wire {
    fn new(stream: DuplexStream, off: &CancellationToken, uplink: Option<Uplink>) -> Self {
        Self { stream, off: Box::pin(off.clone().cancelled_owned()), uplink, wait: None }
    }

    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.off.poll_unpin(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::ConnectionReset.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        let this = &mut *self;
        let Some(uplink) = &this.uplink else { return Pin::new(&mut this.stream).poll_write(cx, buf) };
        loop {
            if let Some(wait) = &mut this.wait {
                ready!(wait.poll_unpin(cx));
                this.wait = None;
            }
            let now = Instant::now();
            let mut free_at = uplink.free_at.lock();
            if *free_at > now + AHEAD {
                this.wait = Some(Box::pin(sleep_until(*free_at - AHEAD)));
                continue;
            }
            let most = ((uplink.bytes_per_second * AHEAD.as_secs_f64()) as usize).max(1);
            let written = ready!(Pin::new(&mut this.stream).poll_write(cx, &buf[..buf.len().min(most)]))?;
            *free_at = (*free_at).max(now) + Duration::from_secs_f64(written as f64 / uplink.bytes_per_second);
            return Poll::Ready(Ok(written));
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
