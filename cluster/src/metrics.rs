//! Helpers that create and register Prometheus metrics, and the metrics that every service has.

use std::{
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use overfill_kv::PROTOCOL;
use prometheus::{Histogram, HistogramOpts, IntCounter, IntGauge, IntGaugeVec, Opts, Registry, core::Collector};

use crate::{Tls, discovery::EtcdConfig};

/// Registering a metric failed: a bug in this program, such as an invalid or duplicate name.
#[derive(Debug, thiserror::Error)]
#[error("registering metrics: {0}")]
pub struct MetricsError(#[from] prometheus::Error);

/// Histogram buckets in seconds, from a fraction of a token's time to a long wait in a queue.
pub const SECONDS_BUCKETS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0,
];

/// Creates a registry whose metrics all have `labels`. It has the metrics of the process and `overfill_build_info`.
pub fn new_registry(labels: &[(&str, &str)]) -> Result<Registry, MetricsError> {
    let labels = labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let registry = Registry::new_custom(None, Some(labels))?;
    // The crate reads these from /proc, so other systems lack them.
    #[cfg(target_os = "linux")]
    registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
    let help = "Always 1: the version of the program, and the protocol versions that it speaks.";
    let build = Opts::new("overfill_build_info", help)
        .const_label("version", env!("CARGO_PKG_VERSION"))
        .const_label("protocol", PROTOCOL.to_string());
    register(&registry, IntGauge::with_opts(build)?)?.set(1);
    Ok(registry)
}

/// Seconds since 1970.
pub fn unix_seconds() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs().cast_signed())
}

/// Creates the metric that says when discovery last succeeded, by `source`: 0 before the first time.
pub fn discovery_success(registry: &Registry) -> Result<IntGaugeVec, MetricsError> {
    let name = "overfill_discovery_last_success_timestamp_seconds";
    register(registry, IntGaugeVec::new(Opts::new(name, "When discovery last succeeded, by source."), &["source"])?)
}

/// When the certificates in use expire.
#[derive(Clone, Debug)]
pub struct CertificateExpiry {
    gauges: IntGaugeVec,
    used: Vec<Tls>,
}

impl CertificateExpiry {
    /// Creates the metric for the files of `used`, which are loaded again when they change, and for those of `etcd`, which
    /// are not. Without TLS, it has no series.
    pub fn new(registry: &Registry, used: Vec<Tls>, etcd: Option<&EtcdConfig>) -> Result<Self, MetricsError> {
        let name = "overfill_certificate_expiry_timestamp_seconds";
        let opts = Opts::new(name, "When the first certificate of a file expires.");
        let expiry = Self { gauges: register(registry, IntGaugeVec::new(opts, &["file"])?)?, used };
        etcd.map_or(&[][..], EtcdConfig::expiries).iter().for_each(|(path, seconds)| expiry.set(path, *seconds));
        Ok(expiry)
    }

    /// Sets the gauges. Loads files that have changed.
    pub fn refresh(&self) {
        self.used.iter().flat_map(Tls::expiries).for_each(|(path, seconds)| self.set(&path, seconds));
    }

    fn set(&self, path: &Path, seconds: i64) {
        self.gauges.with_label_values(&[path.display().to_string()]).set(seconds);
    }
}

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
