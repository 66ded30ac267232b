//! Runs services over the simulated network.

use std::{
    collections::BTreeSet,
    io,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures::FutureExt as _;
use overfill_cluster::net;
use overfill_net::Listen;
use overfill_transport::tcp::{
    Dialer, Link, Opening,
    frame::{ANSWER_BYTES, Answer, decode_answer},
    hello::{self, HELLO_2_BYTES},
};
use parking_lot::Mutex;
use rand::{Rng as _, rngs::StdRng};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use turmoil::net::{TcpListener, TcpStream};

use crate::guard::Witness;

/// gRPC port of the nodes.
pub const GRPC_PORT: u16 = 7000;
/// KV port of the decode nodes.
pub const KV_PORT: u16 = 7001;
/// Maximum KV bytes per segment.
const MAX_SEGMENT_BYTES: usize = 700;

/// Listens on all addresses of the current host.
pub async fn listen(port: u16) -> io::Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await
}

/// Accepts gRPC connections.
pub struct GrpcListener(pub TcpListener);

impl Listen for GrpcListener {
    type Connection = Box<dyn net::Connection>;

    async fn accept(&mut self) -> io::Result<(net::Opening, SocketAddr)> {
        let (stream, peer) = self.0.accept().await?;
        let connection: Box<dyn net::Connection> = Box::new(stream);
        Ok((std::future::ready(Ok(connection)).boxed(), peer))
    }
}

/// Accepts KV connections.
pub struct KvListener(pub TcpListener);

impl Listen for KvListener {
    type Connection = Link;

    async fn accept(&mut self) -> io::Result<(Opening, SocketAddr)> {
        let (stream, peer) = self.0.accept().await?;
        Ok((std::future::ready(Ok(Link::stream(stream))).boxed(), peer))
    }
}

/// Returns the dialer with which the router connects to nodes.
pub fn grpc_dialer() -> net::Dialer {
    net::Dialer::new(|endpoint| {
        async move {
            let connection: Box<dyn net::Connection> = Box::new(TcpStream::connect(endpoint).await?);
            Ok(connection)
        }
        .boxed()
    })
}

/// Records every KV connection of a simulation at its sender, and damages some of them.
#[derive(Clone)]
pub struct Tap(Arc<Mutex<Tapped>>);

struct Tapped {
    recordings: Vec<Arc<Mutex<Recording>>>,
    tickets: BTreeSet<[u8; 16]>,
    rng: StdRng,
    /// Fraction of the connections on which a bit is flipped.
    damage: f64,
    witness: Witness,
}

/// Data sent over a connection.
#[derive(Default)]
pub struct Recording {
    /// Address of the receiver.
    pub endpoint: String,
    /// Bytes sent.
    pub sent: Vec<u8>,
    answer: Vec<u8>,
    /// Index of the byte in which a bit is flipped.
    flip: Option<usize>,
}

impl Recording {
    /// Returns whether the receiver accepted the ticket.
    fn was_accepted(&self) -> bool {
        self.answer.first_chunk::<ANSWER_BYTES>().and_then(decode_answer) == Some(Answer::Accepted)
    }
}

impl Tap {
    /// Starts without connections. A fraction `damage` of them will be damaged.
    pub fn new(rng: StdRng, damage: f64, witness: &Witness) -> Self {
        let witness = witness.clone();
        Self(Arc::new(Mutex::new(Tapped { recordings: Vec::new(), tickets: BTreeSet::new(), rng, damage, witness })))
    }

    /// Returns the dialer with which prefill nodes connect to decode nodes.
    pub fn kv_dialer(&self) -> Dialer {
        let tap = self.clone();
        Dialer::new(move |endpoint| {
            let tap = tap.clone();
            async move {
                let stream = TcpStream::connect(endpoint.clone()).await?;
                let recording = tap.record(endpoint);
                Ok(Link::stream(TappedStream { stream, recording, tap }))
            }
            .boxed()
        })
    }

    fn record(&self, endpoint: String) -> Arc<Mutex<Recording>> {
        let mut tapped = self.0.lock();
        let damage = tapped.damage;
        let flip = tapped.rng.random_bool(damage).then(|| tapped.rng.random_range(0..2000));
        let recording = Arc::new(Mutex::new(Recording { endpoint, flip, ..Recording::default() }));
        tapped.recordings.push(recording.clone());
        recording
    }

    /// Checks KV-4: no two senders use the same ticket.
    fn check_hello(&self, recording: &Recording) {
        let Some(bytes) = recording.sent.get(..HELLO_2_BYTES) else { return };
        let Some((start, rest)) = bytes.split_first_chunk() else { return };
        let hello = match hello::decode(start, rest) {
            Some(offer) => offer.hello,
            None => return self.0.lock().witness.violated("a sender's first message is not a hello"),
        };
        let mut tapped = self.0.lock();
        if !tapped.tickets.insert(hello.ticket.0) {
            tapped.witness.violated(format!("KV-4: two senders have the ticket {:?}", hello.ticket));
        }
    }

    /// Returns an accepted connection for the ghost to replay. A high `rank` in 0..1 selects a late one.
    pub fn used_ticket(&self, rank: f64) -> Option<(String, Vec<u8>)> {
        let tapped = self.0.lock();
        let used: Vec<_> = tapped.recordings.iter().filter(|recording| recording.lock().was_accepted()).collect();
        let chosen = used.get((rank * used.len() as f64) as usize)?.lock();
        Some((chosen.endpoint.clone(), chosen.sent.clone()))
    }

    /// Stops all damage.
    pub fn repair(&self) {
        let mut tapped = self.0.lock();
        tapped.damage = 0.0;
        tapped.recordings.iter().for_each(|recording| recording.lock().flip = None);
    }

    /// Returns the number of connections so far.
    pub fn connections(&self) -> usize {
        self.0.lock().recordings.len()
    }
}

/// A sender's end of a KV connection.
struct TappedStream {
    stream: TcpStream,
    recording: Arc<Mutex<Recording>>,
    tap: Tap,
}

impl AsyncRead for TappedStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let polled = Pin::new(&mut this.stream).poll_read(cx, buf);
        this.recording.lock().answer.extend_from_slice(&buf.filled()[before..]);
        polled
    }
}

impl AsyncWrite for TappedStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        // Writes small pieces, so that frames arrive in parts.
        let most = this.tap.0.lock().rng.random_range(1..MAX_SEGMENT_BYTES);
        let mut recording = this.recording.lock();
        let before = recording.sent.len();
        let mut bytes = buf[..buf.len().min(most)].to_vec();
        let flip = recording.flip.and_then(|at| at.checked_sub(before)).and_then(|at| bytes.get_mut(at));
        if let Some(byte) = flip {
            *byte ^= 1 << (before % 8);
        }
        let polled = Pin::new(&mut this.stream).poll_write(cx, &bytes);
        if let Poll::Ready(Ok(n)) = polled {
            recording.sent.extend_from_slice(&buf[..n]);
            if before < HELLO_2_BYTES && before + n >= HELLO_2_BYTES {
                this.tap.check_hello(&recording);
            }
        }
        polled
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

/// The link of two hosts, whichever is named first.
pub fn link(a: &str, b: &str) -> (String, String) {
    let (a, b) = if a < b { (a, b) } else { (b, a) };
    (a.to_owned(), b.to_owned())
}
