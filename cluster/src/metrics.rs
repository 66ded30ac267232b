//! Helpers that create and register Prometheus metrics.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntGauge, Registry, core::Collector};

/// Registering a metric failed: a bug in this program, such as an invalid or duplicate name.
#[derive(Debug, thiserror::Error)]
#[error("registering metrics: {0}")]
pub struct MetricsError(#[from] prometheus::Error);

/// Histogram buckets in seconds, from a fraction of a token's time to a long wait in a queue.
pub const SECONDS_BUCKETS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0,
];

/// Registers `metric` in `registry`.
pub fn register<M: Collector + Clone + 'static>(registry: &Registry, metric: M) -> Result<M, MetricsError> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

/// Creates an integer gauge and registers it in `registry`.
pub fn int_gauge(registry: &Registry, name: &str, help: &str) -> Result<IntGauge, MetricsError> {
    register(registry, IntGauge::new(name, help)?)
}

/// Creates a counter and registers it in `registry`.
pub fn counter(registry: &Registry, name: &str, help: &str) -> Result<IntCounter, MetricsError> {
    register(registry, IntCounter::new(name, help)?)
}

/// Creates a histogram with [`SECONDS_BUCKETS`] and registers it in `registry`.
pub fn histogram(registry: &Registry, name: &str, help: &str) -> Result<Histogram, MetricsError> {
    register(registry, Histogram::with_opts(HistogramOpts::new(name, help).buckets(SECONDS_BUCKETS.to_vec()))?)
}
