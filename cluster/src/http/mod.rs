//! The server for HTTP and gRPC, with a limit on the number of connections.
//!
//! A connection is closed when it has been idle for too long, when its client does not read the data sent to it, or
//! when the client does not answer an HTTP/2 ping. [`places`] describes what happens at the connection limit.

mod body;
mod places;
#[cfg(test)]
mod tests;

use std::{
    convert::Infallible,
    future::Future,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

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
use rand::Rng as _;

use crate::net::{Connection, Opening};

/// Connections beyond the limit. They let a full server answer probes and refuse other requests with a proper error.
/// See [`Crowded`].
pub const SPARE: usize = 64;
/// Allowance for connections that have lost their place but whose tasks have not ended yet.
const LEAVING: usize = 64;

/// Time limit of the TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Time limit of one write: a connection fails if its client reads nothing for this long while data is pending.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);
/// A client that does not answer an HTTP/2 ping for this long is disconnected, and its requests are cancelled.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// Pause after a failed accept. The most likely cause is a lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Maximum interval between two checks for idle connections.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// Limits of a server and its connections.
#[derive(Clone, Debug)]
pub struct ConnectionLimits {
    /// Maximum number of connections with requests in progress. [`SPARE`] more connections may be open.
    pub connections: usize,
    /// Maximum number of concurrent requests of one HTTP/2 connection.
    pub streams: u32,
    /// Whether HTTP/1 is served as well as HTTP/2.
    pub http1: bool,
    /// Time from accepting a connection until the head of its first request has arrived.
    pub first_request: Duration,
    /// Time that a connection may be idle after a request.
    pub idle: Duration,
    /// Time limit for receiving a request body.
    pub body: Duration,
    /// Age at which a connection is asked to close, give or take a tenth: HTTP/2 clients get GOAWAY, HTTP/1 clients
    /// `connection: close`. Requests in progress finish. `None`: never.
    pub age: Option<Duration>,
}

impl ConnectionLimits {
    /// Limits of an HTTP server for arbitrary clients, with `connections` connections.
    ///
    /// The idle limit exceeds the keep-alive time of load balancers; the longest common one is Google's with 600
    /// seconds. With a shorter limit, this side would sometimes close a connection just as the load balancer sends a
    /// request on it. A long limit keeps no newcomer out, because the longest idle connection is evicted when all
    /// places are taken.
    pub fn http(connections: usize) -> Self {
        Self {
            connections,
            streams: 256,
            http1: true,
            first_request: Duration::from_secs(30),
            idle: Duration::from_secs(620),
            body: Duration::from_secs(60),
            age: None,
        }
    }

    /// Maximum number of file descriptors that the server's connections need.
    pub fn files(&self) -> usize {
        self.connections + SPARE + LEAVING
    }
}

/// Number of a server's open connections. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct OpenConnections(Arc<AtomicUsize>);

impl OpenConnections {
    /// Connections that are open now, including those in their handshake.
    pub fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    /// Counts a connection until the guard is dropped.
    fn count(&self) -> OpenConnection {
        self.0.fetch_add(1, Ordering::Relaxed);
        OpenConnection(self.clone())
    }
}

struct OpenConnection(OpenConnections);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Request extension, present while more connections have requests in progress than [`ConnectionLimits::connections`].
/// Handlers must then refuse the request, unless it costs next to nothing, such as a probe.
#[derive(Clone, Copy, Debug)]
pub struct Crowded;

/// Serves `routes` until `stop` resolves and the requests in progress have ended. Dropping the future cancels them. `open`
/// counts the connections.
pub async fn serve(
    mut listener: impl Listen<Connection = Box<dyn Connection>>,
    routes: Router,
    limits: ConnectionLimits,
    open: OpenConnections,
    stop: impl Future<Output = ()>,
) {
    let stopping = CancellationToken::new();
    let places = ConnectionPlaces::new(&limits);
    let mut connections = JoinSet::new();
    let mut sweep = interval((limits.first_request.min(limits.idle) / 8).min(SWEEP_INTERVAL));
    sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let max_tasks = limits.files();
    let (body, age) = (limits.body, limits.age);
    let server = Arc::new(Server { builder: builder(&limits), routes, body, age, stopping: stopping.clone() });
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
                        let (counted, connection) = (open.count(), server.clone().connection(opening, peer, place));
                        connections.spawn(async move {
                            let _counted = counted;
                            connection.await;
                        });
                    }
                }
                Err(error) => {
                    warn!(%error, "accepting a connection failed");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    // The operating system refuses new connections from here on, instead of leaving them in the accept queue.
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
        error!(%error, "the task of a connection failed");
    }
}

fn builder(limits: &ConnectionLimits) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    // hyper's header timeout is off. It would also close idle connections between two requests, and it would not close
    // connections that never send enough bytes to detect the HTTP version. `places` closes all of these.
    builder.http1().timer(TokioTimer::new()).header_read_timeout(None);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT);
    if limits.http1 { builder } else { builder.http2_only() }
}

/// State shared by all connections of a server.
struct Server {
    builder: Builder<TokioExecutor>,
    routes: Router,
    body: Duration,
    age: Option<Duration>,
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
        // Connections that were opened together are not closed together.
        let age = self.age.map(|age| age.mul_f64(rand::rng().random_range(0.9..1.1)));
        let mut old = pin!(async {
            match age {
                Some(age) => sleep(age).await,
                None => std::future::pending().await,
            }
        });
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
                    // A single poll sends GOAWAY to an HTTP/2 client. Then the connection closes, whatever the client
                    // does.
                    connection.as_mut().graceful_shutdown();
                    let _ = futures::poll!(connection.as_mut());
                    return debug!(%peer, "closed an idle connection");
                }
                () = self.stopping.cancelled(), if !stopping => {
                    stopping = true;
                    connection.as_mut().graceful_shutdown();
                }
                () = &mut old, if !stopping => {
                    stopping = true;
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    }
}
