//! How metrics are made and registered.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntGauge, Registry, core::Collector};

/// A metric that could not be registered: a fault of the program.
#[derive(Debug, thiserror::Error)]
#[error("registering metrics: {0}")]
pub struct MetricsError(#[from] prometheus::Error);

/// Seconds, from a fraction of a token's time to a long queue.
pub const SECONDS_BUCKETS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0,
];

/// Registers `metric` in `registry`.
pub fn register<M: Collector + Clone + 'static>(registry: &Registry, metric: M) -> Result<M, MetricsError> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

/// A new integer gauge in `registry`.
pub fn int_gauge(registry: &Registry, name: &str, help: &str) -> Result<IntGauge, MetricsError> {
    register(registry, IntGauge::new(name, help)?)
}

/// A new counter in `registry`.
pub fn counter(registry: &Registry, name: &str, help: &str) -> Result<IntCounter, MetricsError> {
    register(registry, IntCounter::new(name, help)?)
}

/// A new histogram of seconds in `registry`.
pub fn histogram(registry: &Registry, name: &str, help: &str) -> Result<Histogram, MetricsError> {
    register(registry, Histogram::with_opts(HistogramOpts::new(name, help).buckets(SECONDS_BUCKETS.to_vec()))?)
}
