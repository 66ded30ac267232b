//! How HTTP is served, and gRPC with it: so many connections, none of which may waste its place.
//!
//! A connection ends when nothing has been asked on it for a while, when its client does not take what it is sent, or
//! does not answer a ping. See [`places`] for what happens when there are too many.

mod body;
mod places;
#[cfg(test)]
mod tests;

use std::{convert::Infallible, future::Future, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use axum::{Router, body::Body};
use hyper::{Request, body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
};
use tokio::{
    task::{JoinError, JoinSet},
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;
use tracing::{debug, error, warn};

pub use self::body::SlowBody;
use self::{
    body::{Download, Upload},
    places::{ConnectionPlace, ConnectionPlaces},
};
use overfill_net::Listen;

use crate::net::{Connection, Opening};

/// Connections beyond the limit: they are served as long as all others have requests, so that whoever only asks how the
/// process is gets in, and everybody else is told to come back. See [`Crowded`].
pub const SPARE: usize = 64;
/// Connections that have lost their places, and are about to end.
const LEAVING: usize = 64;

/// How long a client may take over the TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long what is sent may lie there before the client takes any of it.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);
/// A client that does not answer a ping (of HTTP/2) for this long is gone, and its requests with it.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// Wait after a connection could not be taken: out of file descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// At least this often the idle are looked through.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// What a server grants.
#[derive(Clone, Debug)]
pub struct ConnectionLimits {
    /// Connections that may have requests in progress. There may be [`SPARE`] more.
    pub connections: usize,
    /// Requests that one connection may have (over HTTP/2).
    pub streams: u32,
    /// Is HTTP/1 served, too?
    pub http1: bool,
    /// How long a connection may be there before its first request: with the head of that.
    pub first_request: Duration,
    /// How long it may be idle after one.
    pub idle: Duration,
    /// How long a request's body may take.
    pub body: Duration,
}

impl ConnectionLimits {
    /// Of a server for browsers, probes, and clients of all kinds.
    ///
    /// Load balancers keep connections for reuse, the longest of the common ones (Google's) for 600 seconds. If this
    /// side ended them before that, a request would now and then meet the end; so it waits a little longer. That costs
    /// nobody a place.
    pub fn http(connections: usize) -> Self {
        Self {
            connections,
            streams: 256,
            http1: true,
            first_request: Duration::from_secs(30),
            idle: Duration::from_secs(620),
            body: Duration::from_secs(60),
        }
    }

    /// File descriptors that the server needs at most.
    pub fn files(&self) -> usize {
        self.connections + SPARE + LEAVING
    }
}

/// Comes with requests (as an extension) while more connections have some than may: those that cost anything are to be
/// refused.
#[derive(Clone, Copy, Debug)]
pub struct Crowded;

/// Serves `routes` until `stop` resolves and the requests in progress have ended. Dropped, it ends all of them.
pub async fn serve(
    mut listener: impl Listen<Connection = Box<dyn Connection>>,
    routes: Router,
    limits: ConnectionLimits,
    stop: impl Future<Output = ()>,
) {
    let stopping = CancellationToken::new();
    let places = ConnectionPlaces::new(&limits);
    let mut connections = JoinSet::new();
    let mut sweep = interval((limits.first_request.min(limits.idle) / 8).min(SWEEP_INTERVAL));
    sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let max_tasks = limits.files();
    let server = Arc::new(Server { builder: builder(&limits), routes, body: limits.body, stopping: stopping.clone() });
    let mut stop = pin!(stop);
    loop {
        tokio::select! {
            biased;
            () = &mut stop => break,
            _ = sweep.tick() => places.sweep(),
            Some(ended) = connections.join_next() => note(ended),
            accepted = listener.accept(), if connections.len() < max_tasks => match accepted {
                Ok((opening, peer)) => {
                    if let Some(place) = places.enter() {
                        connections.spawn(server.clone().connection(opening, peer, place));
                    }
                }
                Err(error) => {
                    warn!(%error, "accepting a connection");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    // Whoever connects now is refused by the system, rather than left waiting.
    drop(listener);
    stopping.cancel();
    places.close();
    loop {
        tokio::select! {
            biased;
            _ = sweep.tick() => places.sweep(),
            ended = connections.join_next() => match ended {
                Some(ended) => note(ended),
                None => return,
            },
        }
    }
}

fn note(ended: Result<(), JoinError>) {
    if let Err(error) = ended {
        error!(%error, "a connection's task");
    }
}

fn builder(limits: &ConnectionLimits) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    // It would end connections between two requests, too, and none whose first bytes do not say which HTTP they speak:
    // places end all of them.
    builder.http1().timer(TokioTimer::new()).header_read_timeout(None);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT);
    if limits.http1 { builder } else { builder.http2_only() }
}

/// What all connections share.
struct Server {
    builder: Builder<TokioExecutor>,
    routes: Router,
    body: Duration,
    stopping: CancellationToken,
}

impl Server {
    async fn connection(self: Arc<Self>, opening: Opening, peer: SocketAddr, place: Arc<ConnectionPlace>) {
        let opened = tokio::select! {
            opened = timeout(HANDSHAKE_TIMEOUT, opening) => opened,
            () = place.lost() => return,
            () = self.stopping.cancelled() => return,
        };
        let io = match opened {
            Ok(Ok(io)) => io,
            Ok(Err(error)) => return debug!(%peer, %error, "handshake failed"),
            Err(_) => return debug!(%peer, "handshake took too long"),
        };
        let mut io = TimeoutStream::new(io);
        io.set_write_timeout(Some(WRITE_TIMEOUT));
        let service = service_fn(|request: Request<Incoming>| {
            let (in_progress, routes, limit) = (place.begin(), self.routes.clone(), self.body);
            async move {
                let mut request = request.map(|body| Body::new(Upload::new(body, limit)));
                if in_progress.crowded {
                    request.extensions_mut().insert(Crowded);
                }
                let response = routes.oneshot(request).await?;
                Ok::<_, Infallible>(response.map(|body| Download::new(body, in_progress)))
            }
        });
        let mut connection = pin!(self.builder.serve_connection(TokioIo::new(Box::pin(io)), service));
        let mut stopping = false;
        loop {
            tokio::select! {
                ended = connection.as_mut() => {
                    if let Err(error) = ended {
                        debug!(%peer, %error, "connection failed");
                    }
                    return;
                }
                () = place.lost() => {
                    // Once, so that a client with HTTP/2 is told; then it ends, whatever the client does.
                    connection.as_mut().graceful_shutdown();
                    let _ = futures::poll!(connection.as_mut());
                    return debug!(%peer, "an idle connection has ended");
                }
                () = self.stopping.cancelled(), if !stopping => {
                    stopping = true;
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    }
}
