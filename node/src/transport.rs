//! Which transports of KV the node uses: flags, and metrics.

use std::sync::Arc;

use overfill_cluster::{ConfigError, MetricsError, metrics::register};
use overfill_kv::{KvStore, KvTransport};
use overfill_transport::{TransportChoice, TransportError, TransportOptions, Transports, rdma::DeviceChoice};
use prometheus::{IntCounterVec, IntGaugeVec, Opts, Registry};

/// Flags of the KV transport.
#[derive(Clone, Debug, clap::Args)]
pub struct TransportArgs {
    /// How KV moves between nodes: auto, tcp, rdma or nccl. auto uses RDMA if both nodes have it, else TCP. A transport given
    /// by name is used, or the node does not start. NCCL moves KV between GPUs only, and both nodes must ask for it by name.
    #[arg(long, env = "OVERFILL_KV_TRANSPORT", value_name = "NAME", default_value = "auto", help_heading = "Network")]
    pub kv_transport: String,
    /// RDMA device, and optionally its port and the index of a GID [default: the first one with an active port]
    #[arg(long, env = "OVERFILL_KV_RDMA_DEVICE", value_name = "NAME[:PORT[:GID_INDEX]]", help_heading = "Network")]
    pub kv_rdma_device: Option<String>,
    /// Use RDMA, which does not encrypt, in a cluster with TLS: KV is readable on the network, and prompts can be
    /// reconstructed from it.
    #[arg(long, env = "OVERFILL_ALLOW_PLAIN_RDMA", help_heading = "Network")]
    pub allow_plain_rdma: bool,
    /// The same for NCCL, which does not encrypt either.
    #[arg(long, env = "OVERFILL_ALLOW_PLAIN_NCCL", help_heading = "Network")]
    pub allow_plain_nccl: bool,
}

/// Checked settings of the KV transport.
#[derive(Clone, Debug, Default)]
pub struct TransportConfig {
    /// What was asked for.
    pub choice: TransportChoice,
    /// How transports may be used.
    pub options: TransportOptions,
}

impl TransportArgs {
    /// Checks the flags and adds every error to `f`. `encrypted_cluster`: whether the cluster uses TLS.
    pub fn validate(self, encrypted_cluster: bool, f: &mut Vec<ConfigError>) -> Option<TransportConfig> {
        let Self { kv_transport, kv_rdma_device, allow_plain_rdma, allow_plain_nccl } = self;
        let parsed = kv_transport.parse::<TransportChoice>();
        let choice = ConfigError::collect(f, parsed, "kv-transport", TransportChoice::NAMES, &kv_transport);
        let rdma_device = kv_rdma_device.and_then(|text| {
            ConfigError::collect(f, text.parse::<DeviceChoice>(), "kv-rdma-device", DeviceChoice::FORM, &text)
        });
        let options = TransportOptions {
            rdma_device,
            encrypted_cluster,
            allow_plain_rdma,
            allow_plain_nccl,
            ..TransportOptions::default()
        };
        let choice = choice?;
        if let Err(error) = Transports::check(choice, &options) {
            let limit = match &error {
                TransportError::Plain(transport) => {
                    format!("auto or tcp, or --allow-plain-{transport} be given: {error}")
                }
                _ => format!("one that this build has: {error}"),
            };
            f.push(ConfigError::new("kv-transport", limit, choice));
        }
        Some(TransportConfig { choice, options })
    }
}

impl TransportConfig {
    /// Opens the transports for the KV in `store`, and logs which they are, and why. Can take seconds.
    ///
    /// # Errors
    /// The transport that was asked for by name can't be used.
    pub fn open(&self, store: Arc<dyn KvStore>) -> Result<Arc<Transports>, TransportError> {
        let transports = Transports::open(self.choice, &self.options, store)?;
        tracing::info!(usable = %transports.usable(), reason = transports.reason(), "kv transports");
        Ok(transports)
    }
}

/// Metrics of the transports.
pub struct TransportMetrics {
    transports: Arc<Transports>,
    handoffs: IntCounterVec,
}

impl TransportMetrics {
    /// Creates and registers the metrics.
    pub fn new(registry: &Registry, transports: Arc<Transports>) -> Result<Self, MetricsError> {
        let usable = Opts::new("overfill_kv_transport", "Whether the node can use a KV transport: 1 or 0.");
        let usable = register(registry, IntGaugeVec::new(usable, &["transport"])?)?;
        let handoffs = Opts::new("overfill_handoffs_total", "Successful handoffs, by the transport that moved the KV.");
        let handoffs = register(registry, IntCounterVec::new(handoffs, &["transport"])?)?;
        for transport in KvTransport::ALL {
            usable.with_label_values(&[transport.as_str()]).set(transports.usable().contains(transport).into());
            handoffs.with_label_values(&[transport.as_str()]);
        }
        Ok(Self { transports, handoffs })
    }

    /// Updates the counters.
    pub fn refresh(&self) {
        for transport in KvTransport::ALL {
            let counter = self.handoffs.with_label_values(&[transport.as_str()]);
            counter.inc_by(self.transports.handoffs(transport).saturating_sub(counter.get()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(name: &str, device: Option<&str>, encrypted: bool) -> Vec<String> {
        let args = TransportArgs {
            kv_transport: name.into(),
            kv_rdma_device: device.map(Into::into),
            allow_plain_rdma: false,
            allow_plain_nccl: false,
        };
        let mut faults = Vec::new();
        args.validate(encrypted, &mut faults);
        faults.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_transport_that_is_not_there_is_refused_by_name() {
        assert!(faults("auto", None, true).is_empty() && faults("tcp", Some("mlx5_0:1"), true).is_empty());
        if !cfg!(feature = "nccl") {
            let refused =
                "--kv-transport must be one that this build has: this build has no NCCL (cargo feature nccl), got nccl";
            assert_eq!(faults("nccl", None, false), [refused]);
        }
        let both = faults("udp", Some("a:b"), false);
        assert!(both[0].starts_with("--kv-transport must be auto, tcp, rdma or nccl"), "{both:?}");
        assert!(both[1].starts_with("--kv-rdma-device must be NAME"), "{both:?}");
        let rdma = faults("rdma", None, true);
        let reason = if cfg!(feature = "rdma") { "rdma does not encrypt" } else { "this build has no RDMA" };
        assert!(rdma[0].contains(reason), "{rdma:?}");
    }
}
