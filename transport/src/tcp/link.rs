//! A connection that carries KV, with one interface for plain TCP sockets and other streams.
//!
//! A plain TCP socket moves bytes directly between the kernel and KV memory. Any other stream (TLS, or a simulated
//! network) uses a small buffer in each direction.

use std::future::poll_fn;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use overfill_net::Listen;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};

/// Buffer size in bytes per direction of a stream that is not a plain socket: four TLS records.
const BUFFER_BYTES: usize = 64 * 1024;

/// Connects a sender to a receiver. [`plain_dialer`] is the default.
pub type Dialer = overfill_net::Dialer<Link>;

/// Future that opens a link.
pub type Opening = overfill_net::Opening<Link>;

/// A dialer that connects over plain TCP.
pub fn plain_dialer() -> Dialer {
    Dialer::new(|address| Box::pin(async move { Link::tcp(TcpStream::connect(address).await?) }))
}

/// Accepts plain TCP connections.
pub struct PlainListener(pub TcpListener);

impl Listen for PlainListener {
    type Connection = Link;

    async fn accept(&mut self) -> io::Result<(Opening, SocketAddr)> {
        let (stream, peer) = self.0.accept().await?;
        Ok((Box::pin(std::future::ready(Link::tcp(stream))), peer))
    }
}

/// A connection, used by one task. Reads and writes never wait; [`readable`](Self::readable) and
/// [`writable`](Self::writable) do.
pub struct Link(Kind);

enum Kind {
    Tcp(TcpStream),
    Stream(Mutex<Buffered>),
}

/// A stream without readiness methods, and its buffers.
struct Buffered {
    io: Box<dyn Duplex>,
    incoming: Box<[u8]>,
    /// `incoming[taken..have]` has not been read by the caller yet.
    taken: usize,
    have: usize,
    ended: bool,
    outgoing: Vec<u8>,
    /// Bytes of `outgoing` already written to `io`.
    sent: usize,
    flushed: bool,
}

trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

impl Link {
    /// A link over a plain TCP socket. Sets `TCP_NODELAY`.
    pub fn tcp(stream: TcpStream) -> io::Result<Self> {
        // Answers have a few bytes and must be sent without delay.
        stream.set_nodelay(true)?;
        Ok(Self(Kind::Tcp(stream)))
    }

    /// A link over any other stream.
    pub fn stream(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Self {
        Self(Kind::Stream(Mutex::new(Buffered {
            io: Box::new(io),
            incoming: vec![0; BUFFER_BYTES].into(),
            taken: 0,
            have: 0,
            ended: false,
            outgoing: Vec::with_capacity(BUFFER_BYTES),
            sent: 0,
            flushed: true,
        })))
    }

    pub(crate) fn try_read(&self, buf: &mut [u8]) -> io::Result<usize> {
        match &self.0 {
            Kind::Tcp(stream) => stream.try_read(buf),
            Kind::Stream(buffered) => buffered.lock().try_read(buf),
        }
    }

    pub(crate) fn try_read_vectored(&self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        match &self.0 {
            Kind::Tcp(stream) => stream.try_read_vectored(bufs),
            Kind::Stream(buffered) => match bufs.iter_mut().find(|buf| !buf.is_empty()) {
                Some(buf) => buffered.lock().try_read(buf),
                None => Ok(0),
            },
        }
    }

    pub(crate) fn try_write_vectored(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match &self.0 {
            Kind::Tcp(stream) => stream.try_write_vectored(bufs),
            Kind::Stream(buffered) => buffered.lock().try_write_vectored(bufs),
        }
    }

    /// Writes to a connection that was just accepted. Bypasses tokio, which has not registered it as writable yet.
    pub(crate) fn write_at_once(&self, bytes: &[u8]) -> io::Result<usize> {
        match &self.0 {
            Kind::Tcp(stream) => socket2::SockRef::from(stream).send(bytes),
            Kind::Stream(buffered) => buffered.lock().try_write_vectored(&[IoSlice::new(bytes)]),
        }
    }

    /// Resolves when a read may make progress.
    pub(crate) async fn readable(&self) -> io::Result<()> {
        match &self.0 {
            Kind::Tcp(stream) => stream.readable().await,
            Kind::Stream(buffered) => poll_fn(|cx| buffered.lock().poll_fill(cx)).await,
        }
    }

    /// Resolves when a write may make progress.
    pub(crate) async fn writable(&self) -> io::Result<()> {
        match &self.0 {
            Kind::Tcp(stream) => stream.writable().await,
            Kind::Stream(buffered) => poll_fn(|cx| buffered.lock().poll_drain(cx)).await,
        }
    }

    /// Resolves when all written bytes have left the buffer of this link.
    pub(crate) async fn flushed(&self) -> io::Result<()> {
        match &self.0 {
            Kind::Tcp(_) => Ok(()),
            Kind::Stream(buffered) => poll_fn(|cx| buffered.lock().poll_drain(cx)).await,
        }
    }

    /// Shuts down the writing direction.
    pub(crate) async fn end_writing(&self) -> io::Result<()> {
        match &self.0 {
            Kind::Tcp(stream) => socket2::SockRef::from(stream).shutdown(std::net::Shutdown::Write),
            Kind::Stream(buffered) => {
                poll_fn(|cx| {
                    let mut buffered = buffered.lock();
                    ready!(buffered.poll_drain(cx))?;
                    Pin::new(&mut *buffered.io).poll_shutdown(cx)
                })
                .await
            }
        }
    }
}

/// Context for polling a stream without waiting. A later wait polls again with a real waker.
fn no_waker() -> Context<'static> {
    Context::from_waker(Waker::noop())
}

impl Buffered {
    fn try_read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.taken == self.have && !self.ended {
            match self.poll_fill(&mut no_waker()) {
                Poll::Ready(filled) => filled?,
                Poll::Pending => return Err(ErrorKind::WouldBlock.into()),
            }
        }
        let n = buf.len().min(self.have - self.taken);
        buf[..n].copy_from_slice(&self.incoming[self.taken..][..n]);
        self.taken += n;
        Ok(n)
    }

    /// Ready when there are bytes to read or the stream has ended.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.taken == self.have && !self.ended {
            let mut space = ReadBuf::new(&mut self.incoming);
            ready!(Pin::new(&mut *self.io).poll_read(cx, &mut space))?;
            (self.taken, self.have) = (0, space.filled().len());
            self.ended = self.have == 0;
        }
        Poll::Ready(Ok(()))
    }

    fn try_write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        if !self.outgoing.is_empty() && self.poll_drain(&mut no_waker())?.is_pending() && !self.outgoing.is_empty() {
            return Err(ErrorKind::WouldBlock.into());
        }
        for buf in bufs {
            let room = BUFFER_BYTES - self.outgoing.len();
            self.outgoing.extend_from_slice(&buf[..room.min(buf.len())]);
        }
        let taken = self.outgoing.len();
        // If this is pending, `writable` and `flushed` write the rest.
        let _: Poll<()> = self.poll_drain(&mut no_waker())?;
        Ok(taken)
    }

    /// Ready when the buffer is empty and the stream is flushed.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.outgoing.len() {
            self.flushed = false;
            match ready!(Pin::new(&mut *self.io).poll_write(cx, &self.outgoing[self.sent..]))? {
                0 => return Poll::Ready(Err(ErrorKind::WriteZero.into())),
                n => self.sent += n,
            }
        }
        self.outgoing.clear();
        self.sent = 0;
        if !self.flushed {
            ready!(Pin::new(&mut *self.io).poll_flush(cx))?;
            self.flushed = true;
        }
        Poll::Ready(Ok(()))
    }
}
