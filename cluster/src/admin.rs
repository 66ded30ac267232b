//! The admin port, over HTTP: `/startup`, `/live`, `/ready`, `/health` and `/metrics`.
//!
//! `/ready` is for who sends requests here, a load balancer: send them, or don't. `/health` tells whether a request would be
//! served now. They differ where requests are taken, but have to wait.
//!
//! It is served before the process can do its work, so that one that is loading a model can be told from one that hangs.

use std::{
    future::pending,
    io,
    sync::{Arc, OnceLock},
};

use axum::{Router, http::StatusCode, http::header, response::IntoResponse, routing::get};
use prometheus::{Encoder, Registry, TextEncoder};
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;
use tracing::warn;

use crate::{
    http::{self, ConnectionLimits},
    net::Listener,
};

/// Connections to an admin port of its own: probes, and who gathers metrics.
pub const CONNECTIONS: usize = 64;

/// Can the process serve?
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// Yes.
    Serving,
    /// Not now, and why. Requests are taken all the same, and wait. Ready, but not healthy.
    Waiting(String),
    /// Not now, and why.
    NotServing(String),
}

/// What the admin port shows of a process that has started.
pub struct Started {
    /// The metrics.
    pub registry: Registry,
    /// Would a request be served now? Asked at every `/ready` and `/health`.
    pub ready: Box<dyn Fn() -> Health + Send + Sync>,
    /// Called before every `/metrics`: sets gauges that are read off the state rather than counted.
    pub refresh: Box<dyn Fn() + Send + Sync>,
}

/// The admin port of one process; clones show the same.
#[derive(Clone, Default)]
pub struct Admin {
    started: Arc<OnceLock<Started>>,
}

impl Admin {
    /// From now on the process is started. The first call counts.
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

    /// The routes, for a server that has others too.
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
            (started.refresh)();
            started.registry.gather()
        });
        match encoder.encode(&families.unwrap_or_default(), &mut text) {
            Ok(()) => (StatusCode::OK, [(header::CONTENT_TYPE, encoder.format_type().to_owned())], text),
            Err(e) => {
                warn!(error = %e, "encoding metrics");
                let kind = "text/plain".to_owned();
                (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, kind)], e.to_string().into_bytes())
            }
        }
    }
}

/// `waiting` is the status where requests are taken, but have to wait.
fn health_response(health: Health, waiting: StatusCode) -> (StatusCode, String) {
    match health {
        Health::Serving => (StatusCode::OK, "serving\n".into()),
        Health::Waiting(why) => (waiting, format!("requests wait: {why}\n")),
        Health::NotServing(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("not serving: {why}\n")),
    }
}

/// Serves the admin port until it is ended: that may be later than the shutdown's beginning, so that a draining process
/// can still be looked at. Dropped, it ends by itself.
pub struct AdminServer(AbortOnDropHandle<()>);

impl AdminServer {
    /// Serves `admin`.
    pub fn start(listener: TcpListener, admin: Admin) -> Self {
        let listener = Listener::new(listener, None);
        let serving = http::serve(listener, admin.routes(), ConnectionLimits::http(CONNECTIONS), pending());
        Self(AbortOnDropHandle::new(tokio::spawn(serving)))
    }

    /// Ends it.
    pub async fn end(self) -> io::Result<()> {
        // A client that keeps its connection open holds up nobody.
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
