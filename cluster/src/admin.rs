//! The admin port: `/live`, `/health` and `/metrics` over HTTP.

use std::{io, sync::Arc};

use axum::{Router, http::StatusCode, http::header, response::IntoResponse, routing::get};
use prometheus::{Encoder, Registry, TextEncoder};
use tokio::net::TcpListener;
use tracing::warn;

use crate::Shutdown;

/// Can the process serve?
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// Yes.
    Serving,
    /// Not now, and why.
    NotServing(String),
}

/// What the admin port shows.
#[derive(Clone)]
pub struct Admin {
    /// The metrics.
    pub registry: Registry,
    /// Asked at every `/health`.
    pub health: Arc<dyn Fn() -> Health + Send + Sync>,
    /// Called before every `/metrics`: sets gauges that are read off the state rather than counted.
    pub refresh: Arc<dyn Fn() + Send + Sync>,
}

impl Admin {
    /// Shows `registry`, and is healthy for as long as the process is not shutting down.
    pub fn new(registry: Registry, shutdown: &Shutdown) -> Self {
        let shutdown = shutdown.clone();
        let health = move || match shutdown.has_begun() {
            true => Health::NotServing("shutting down".into()),
            false => Health::Serving,
        };
        Self { registry, health: Arc::new(health), refresh: Arc::new(|| {}) }
    }

    /// The three routes, for a server that has others too.
    pub fn routes(self) -> Router {
        let health = self.health.clone();
        Router::new()
            .route("/live", get(async || "live\n"))
            .route("/health", get(move || async move { health_response(health()) }))
            .route("/metrics", get(move || async move { self.metrics_response() }))
    }

    fn metrics_response(&self) -> impl IntoResponse + use<> {
        (self.refresh)();
        let encoder = TextEncoder::new();
        let mut text = Vec::new();
        match encoder.encode(&self.registry.gather(), &mut text) {
            Ok(()) => (StatusCode::OK, [(header::CONTENT_TYPE, encoder.format_type().to_owned())], text),
            Err(e) => {
                warn!(error = %e, "encoding metrics");
                let kind = "text/plain".to_owned();
                (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, kind)], e.to_string().into_bytes())
            }
        }
    }
}

fn health_response(health: Health) -> (StatusCode, String) {
    match health {
        Health::Serving => (StatusCode::OK, "serving\n".into()),
        Health::NotServing(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("not serving: {why}\n")),
    }
}

/// Serves the admin port until `stop` resolves: that may be later than the shutdown's beginning, so that a draining
/// process can still be looked at.
pub async fn serve_admin(
    listener: TcpListener,
    admin: Admin,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    axum::serve(listener, admin.routes()).with_graceful_shutdown(stop).await
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn get(address: std::net::SocketAddr, path: &str) -> String {
        let mut connection = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
        connection.write_all(request.as_bytes()).await.unwrap();
        let mut response = String::new();
        connection.read_to_string(&mut response).await.unwrap();
        response
    }

    #[tokio::test]
    async fn health_follows_the_shutdown_and_metrics_are_refreshed() {
        let shutdown = Shutdown::new();
        let registry = Registry::new();
        let gauge = prometheus::IntGauge::new("overfill_test", "help").unwrap();
        registry.register(Box::new(gauge.clone())).unwrap();
        let mut admin = Admin::new(registry, &shutdown);
        admin.refresh = Arc::new(move || gauge.set(7));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = Shutdown::new();
        let stopped = stop.clone();
        let server = shutdown.spawn("admin", serve_admin(listener, admin, async move { stopped.cancelled().await }));

        assert!(get(address, "/live").await.starts_with("HTTP/1.1 200"));
        assert!(get(address, "/health").await.starts_with("HTTP/1.1 200"));
        assert!(get(address, "/metrics").await.contains("overfill_test 7"));
        shutdown.begin();
        assert!(get(address, "/health").await.starts_with("HTTP/1.1 503"));
        stop.begin();
        server.await.unwrap().unwrap();
    }
}
