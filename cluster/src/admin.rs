//! The HTTP admin port: `/startup`, `/live`, `/ready`, `/health` and `/metrics`.
//!
//! `/ready` tells a load balancer whether to send requests to this process. `/health` tells whether a request would be
//! served now. The two differ in one state, [`Health::Waiting`]: the process accepts requests but makes them wait. Then
//! `/ready` returns 200 and `/health` returns 503.
//!
//! The port is served from the start of the process, so a process that is loading a model can be distinguished from one
//! that hangs.

use std::{
    future::pending,
    io,
    sync::{Arc, OnceLock},
};

use axum::{Router, http::StatusCode, http::header, response::IntoResponse, routing::get};
use parking_lot::Mutex;
use prometheus::{Encoder, Registry, TextEncoder};
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;
use tracing::warn;

use crate::{
    http::{self, ConnectionLimits, OpenConnections},
    net::Listener,
};

/// Connection limit of a separate admin port. Its clients are probes and metrics collectors.
pub const CONNECTIONS: usize = 64;

/// Whether the process can serve requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// It serves requests: ready and healthy.
    Serving,
    /// It accepts requests but makes them wait, for the given reason: ready but not healthy.
    Waiting(String),
    /// It does not serve requests, for the given reason: neither ready nor healthy.
    NotServing(String),
}

/// What the admin port reports once the process has started.
pub struct Started {
    /// Metrics that `/metrics` exports.
    pub registry: Registry,
    /// Returns the current health. Called for every `/ready` and `/health` request.
    pub ready: Box<dyn Fn() -> Health + Send + Sync>,
    /// Called before every `/metrics` response: sets the gauges that are derived from the current state.
    pub refresh: Box<dyn Fn() + Send + Sync>,
}

/// State behind the admin port of one process. Clones share it.
#[derive(Clone, Default)]
pub struct Admin {
    started: Arc<OnceLock<Started>>,
    /// Held by the scrape of the metrics that is in progress.
    scrape: Arc<Mutex<()>>,
}

impl Admin {
    /// Marks the process as started: `/startup` returns 200 from now on. Calls after the first have no effect.
    pub fn start(&self, started: Started) {
        let _ = self.started.set(started);
    }

    fn startup(&self) -> Health {
        match self.started.get() {
            Some(_) => Health::Serving,
            None => Health::NotServing("starting".into()),
        }
    }

    fn health(&self) -> Health {
        self.started.get().map_or_else(|| self.startup(), |started| (started.ready)())
    }

    /// HTTP routes of the admin port. A server may merge them with its own routes.
    pub fn routes(self) -> Router {
        let (startup, ready, health) = (self.clone(), self.clone(), self.clone());
        Router::new()
            .route("/startup", get(async move || health_response(startup.startup(), StatusCode::OK)))
            .route("/live", get(async || "live\n"))
            .route("/ready", get(async move || health_response(ready.health(), StatusCode::OK)))
            .route("/health", get(async move || health_response(health.health(), StatusCode::SERVICE_UNAVAILABLE)))
            .route("/metrics", get(async move || self.metrics_response()))
    }

    fn metrics_response(&self) -> impl IntoResponse + use<> {
        let encoder = TextEncoder::new();
        let mut text = Vec::new();
        let families = self.started.get().map(|started| {
            // `refresh` resets and fills series, so two scrapes must not overlap.
            let _one = self.scrape.lock();
            (started.refresh)();
            started.registry.gather()
        });
        match encoder.encode(&families.unwrap_or_default(), &mut text) {
            Ok(()) => (StatusCode::OK, [(header::CONTENT_TYPE, encoder.format_type().to_owned())], text),
            Err(e) => {
                warn!(error = %e, "encoding metrics failed");
                let kind = "text/plain".to_owned();
                (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, kind)], e.to_string().into_bytes())
            }
        }
    }
}

/// Converts `health` into a status and a body. [`Health::Waiting`] gets the status `waiting`.
fn health_response(health: Health, waiting: StatusCode) -> (StatusCode, String) {
    match health {
        Health::Serving => (StatusCode::OK, "serving\n".into()),
        Health::Waiting(why) => (waiting, format!("requests wait: {why}\n")),
        Health::NotServing(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("not serving: {why}\n")),
    }
}

/// A running admin port. It is independent of [`Shutdown`](crate::Shutdown), so a draining process still answers
/// probes. Dropping this value stops the server.
pub struct AdminServer(AbortOnDropHandle<()>);

impl AdminServer {
    /// Starts a task that serves `admin` on `listener`.
    pub fn start(listener: TcpListener, admin: Admin) -> Self {
        let listener = Listener::new(listener, None);
        let (limits, open) = (ConnectionLimits::http(CONNECTIONS), OpenConnections::default());
        let serving = http::serve(listener, admin.routes(), limits, open, pending());
        Self(AbortOnDropHandle::new(tokio::spawn(serving)))
    }

    /// Stops the server and closes its connections.
    ///
    /// # Errors
    /// The server task panicked.
    pub async fn end(self) -> io::Result<()> {
        // Aborted rather than drained: a client that keeps its connection open must not delay the end of the process.
        self.0.abort();
        match self.0.await {
            Err(e) if !e.is_cancelled() => Err(io::Error::other(e)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::Shutdown;

    async fn get(address: std::net::SocketAddr, path: &str) -> String {
        let mut connection = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
        connection.write_all(request.as_bytes()).await.unwrap();
        let mut response = String::new();
        connection.read_to_string(&mut response).await.unwrap();
        response
    }

    #[tokio::test]
    async fn starting_ready_and_ending_are_told_apart() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let admin = Admin::default();
        let server = AdminServer::start(listener, admin.clone());
        let codes = async || {
            let mut codes = Vec::new();
            for path in ["/startup", "/live", "/ready", "/health"] {
                codes.push(get(address, path).await[9..12].to_owned());
            }
            codes
        };
        assert_eq!(codes().await, ["503", "200", "503", "503"]);
        assert!(get(address, "/metrics").await.starts_with("HTTP/1.1 200"));

        let shutdown = Shutdown::new();
        let registry = Registry::new();
        let gauge = prometheus::IntGauge::new("overfill_test", "help").unwrap();
        registry.register(Box::new(gauge.clone())).unwrap();
        let begun = shutdown.clone();
        admin.start(Started {
            registry,
            ready: Box::new(move || match begun.has_begun() {
                true => Health::NotServing("shutting down".into()),
                false => Health::Serving,
            }),
            refresh: Box::new(move || gauge.set(7)),
        });
        assert_eq!(codes().await, ["200", "200", "200", "200"]);
        assert!(get(address, "/metrics").await.contains("overfill_test 7"));
        shutdown.begin();
        assert_eq!(codes().await, ["200", "200", "503", "503"]);
        server.end().await.unwrap();
    }
}
