//! Settings that both roles have: the command line arguments and their checked form.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use overfill_cluster::{
    ConfigError, ProcessArgs, Tls, TlsArgs,
    discovery::{EtcdArgs, EtcdConfig},
};
use overfill_kv::{BLOCK_TOKENS, KvDtype};
use overfill_model::{DeviceSpec, LoadOptions, Rows, WeightFormat};

use crate::transport::{TransportArgs, TransportConfig};

/// Maximum deadline of a request, in seconds.
pub const MAX_DEADLINE_SECONDS: f64 = 86400.0;
/// Maximum capacity of the KV cache, in tokens. It keeps block ids far below 32 bits and exceeds any real memory.
const MAX_POOL_TOKENS: usize = 1 << 30;

/// Settings of a node, whatever its role.
#[derive(Clone, Debug, clap::Args)]
pub struct NodeArgs {
    /// Model: a Hugging Face folder, a .gguf file or a hub id. Prefill nodes need the full model.
    #[arg(long, env = "OVERFILL_MODEL", value_name = "MODEL", help_heading = "Model")]
    pub model: String,
    /// Name under which the model is served [default: the name of its folder]
    #[arg(long, env = "OVERFILL_SERVED_MODEL_NAME", value_name = "NAME", help_heading = "Model")]
    pub served_model_name: Option<String>,
    /// Device: cpu or cuda:N.
    #[arg(long, env = "OVERFILL_DEVICE", default_value = "cpu", help_heading = "Model")]
    pub device: String,
    /// Weight format in memory: f32, bf16, f16, int8, int8-channel or int4. Integer formats need --device cpu.
    #[arg(
        long,
        visible_alias = "dtype",
        env = "OVERFILL_WEIGHTS",
        value_name = "FORMAT",
        default_value = "bf16",
        help_heading = "Model"
    )]
    pub weights: String,
    /// Type of the KV cache in memory and on the wire: f32, bf16 or f16. It must be the same on all nodes.
    #[arg(long, env = "OVERFILL_KV_DTYPE", value_name = "TYPE", default_value = "bf16", help_heading = "Model")]
    pub kv_dtype: String,
    /// Capacity of the KV cache, in tokens.
    #[arg(
        long,
        env = "OVERFILL_KV_POOL_TOKENS",
        value_name = "TOKENS",
        default_value_t = 65536,
        help_heading = "Model"
    )]
    pub kv_pool_tokens: usize,
    /// Name of this node [default: its role and address]
    #[arg(long, env = "OVERFILL_NODE_ID", value_name = "NAME", help_heading = "Network")]
    pub node_id: Option<String>,
    /// Name of the pool that the node belongs to. Metrics and status show it [default: its role]
    #[arg(long, env = "OVERFILL_POOL", value_name = "NAME", help_heading = "Network")]
    pub pool: Option<String>,
    /// Name of the cluster that the node belongs to. Routers of other clusters do not use it [default: none]
    #[arg(
        long,
        env = "OVERFILL_CLUSTER",
        value_name = "NAME",
        default_value = "",
        hide_default_value = true,
        help_heading = "Network"
    )]
    pub cluster: String,
    /// Listen address of the gRPC service. Port 0 picks a free port.
    #[arg(
        long,
        env = "OVERFILL_LISTEN",
        value_name = "ADDRESS",
        default_value = "127.0.0.1:0",
        help_heading = "Network"
    )]
    pub listen: String,
    /// Listen address of /startup, /live, /ready, /health and /metrics. Port 0 picks a free port.
    #[arg(
        long,
        env = "OVERFILL_ADMIN",
        value_name = "ADDRESS",
        default_value = "127.0.0.1:0",
        help_heading = "Network"
    )]
    pub admin: String,
    /// gRPC address (host:port) that the node registers in etcd for routers to dial [default: the listen address]
    #[arg(long, env = "OVERFILL_ADVERTISE_GRPC", value_name = "ADDRESS", help_heading = "Network")]
    pub advertise_grpc: Option<String>,
    /// Host name or IP address at which others dial this node, with the ports of its listen addresses.
    #[arg(long, env = "OVERFILL_ADVERTISE_HOST", value_name = "HOST", help_heading = "Network")]
    pub advertise_host: Option<String>,
    /// Maximum number of waiting requests. Further requests are refused.
    #[arg(
        long,
        env = "OVERFILL_MAX_WAITING",
        value_name = "REQUESTS",
        default_value_t = 256,
        help_heading = "Scheduling"
    )]
    pub max_waiting: usize,
    /// Time limit of a request that sets no deadline of its own, in seconds.
    #[arg(
        long,
        env = "OVERFILL_DEFAULT_DEADLINE_SECONDS",
        value_name = "SECONDS",
        default_value_t = 600.0,
        help_heading = "Scheduling"
    )]
    pub default_deadline_seconds: f64,
    /// Time in seconds that running requests may take to finish at shutdown. Then their router moves them to other nodes.
    #[arg(
        long,
        env = "OVERFILL_DRAIN_TIMEOUT_SECONDS",
        value_name = "SECONDS",
        default_value_t = 25.0,
        help_heading = "Scheduling"
    )]
    pub drain_timeout_seconds: f64,
    /// Maximum time of one engine step, in seconds. After it the node is not ready, and routers stop using it.
    #[arg(
        long,
        env = "OVERFILL_STEP_TIMEOUT_SECONDS",
        value_name = "SECONDS",
        default_value_t = 60.0,
        help_heading = "Scheduling"
    )]
    pub step_timeout_seconds: f64,
    /// Transport of KV.
    #[command(flatten)]
    pub transport: TransportArgs,
    /// TLS between services.
    #[command(flatten)]
    pub tls: TlsArgs,
    /// Discovery: where the node registers.
    #[command(flatten)]
    pub etcd: EtcdArgs,
    /// Settings of every service process.
    #[command(flatten)]
    pub process: ProcessArgs,
}

/// A further model of a decode node.
#[derive(Clone, Debug)]
pub struct Variant {
    /// Name under which it is served.
    pub name: String,
    /// Folder or GGUF file of the model.
    pub model: PathBuf,
}

/// Checked settings of a node.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Folder or GGUF file of the model.
    pub model: PathBuf,
    /// Name under which the model is served; `None`: the name of its folder.
    pub served_model_name: Option<String>,
    /// Further models that a decode node serves over the same KV.
    pub variants: Vec<Variant>,
    /// Name of the node; `None`: its role and address.
    pub node_id: Option<String>,
    /// Name of its pool; `None`: its role.
    pub pool: Option<String>,
    /// Name of its cluster; may be empty.
    pub cluster: String,
    /// Device, weight format and KV type of the model.
    pub load: LoadOptions,
    /// Capacity of the KV cache, in blocks.
    pub kv_blocks: usize,
    /// Listen address of the gRPC service.
    pub listen: SocketAddr,
    /// Listen address of the admin port.
    pub admin: SocketAddr,
    /// gRPC address (`host:port`) that routers dial; `None`: the listen address.
    pub advertise_grpc: Option<String>,
    /// Host at which others dial the node, an IPv6 address in brackets; `None`: that of the listen address.
    pub advertise_host: Option<String>,
    /// Maximum number of waiting requests.
    pub max_waiting: usize,
    /// Time limit of a request that sets no deadline.
    pub default_deadline: Duration,
    /// Time that running requests may take to finish at shutdown.
    pub drain_timeout: Duration,
    /// Maximum time of one engine step.
    pub step_timeout: Duration,
    /// Transport of KV.
    pub transport: TransportConfig,
    /// TLS between services; `None`: no encryption.
    pub tls: Option<Tls>,
    /// The etcd in which the node registers; `None`: discovery is off.
    pub etcd: Option<EtcdConfig>,
}

impl NodeArgs {
    /// Checks all settings and adds every error to `f`. Returns `None` unless `f` is empty. `rows` is the number of
    /// rows that the role's matrix products are optimized for.
    pub fn validate(self, rows: Rows, f: &mut Vec<ConfigError>) -> Option<NodeConfig> {
        let Self {
            model,
            served_model_name,
            node_id,
            pool,
            cluster,
            device,
            weights,
            kv_dtype,
            kv_pool_tokens,
            listen,
            admin,
            advertise_grpc,
            advertise_host,
            max_waiting,
            default_deadline_seconds,
            drain_timeout_seconds,
            step_timeout_seconds,
            transport,
            tls,
            etcd,
            process,
        } = self;
        let address = "an IP address and port";
        let model = overfill_model::resolve(&model)
            .inspect_err(|e| f.push(ConfigError::new("model", "a model folder, .gguf file or hub id", e)))
            .ok();
        let device = ConfigError::collect(f, device.parse::<DeviceSpec>(), "device", "cpu or cuda:N", &device);
        let parsed = weights.parse::<WeightFormat>();
        let weights = ConfigError::collect(f, parsed, "weights", WeightFormat::SUPPORTED, &weights);
        let kv = ConfigError::collect(f, kv_dtype.parse::<KvDtype>(), "kv-dtype", KvDtype::SUPPORTED, &kv_dtype);
        let listen = ConfigError::collect(f, listen.parse::<SocketAddr>(), "listen", address, &listen);
        let admin = ConfigError::collect(f, admin.parse(), "admin", address, &admin);
        let name_ok = |name: &Option<String>| name.as_ref().is_none_or(|n| !n.trim().is_empty());
        ConfigError::check(f, name_ok(&served_model_name), "served-model-name", "a name", "an empty text");
        ConfigError::check(f, name_ok(&node_id), "node-id", "a name", "an empty text");
        ConfigError::check(f, name_ok(&pool), "pool", "a name", "an empty text");
        let block = BLOCK_TOKENS;
        let pool_ok = (block..=MAX_POOL_TOKENS).contains(&kv_pool_tokens);
        ConfigError::check(f, pool_ok, "kv-pool-tokens", format!("in [{block}, {MAX_POOL_TOKENS}]"), kv_pool_tokens);
        ConfigError::check(f, (1..=65536).contains(&max_waiting), "max-waiting", "in [1, 65536]", max_waiting);
        let default_deadline = positive_seconds(f, "default-deadline-seconds", default_deadline_seconds);
        let drain_timeout = match (0.0..=MAX_DEADLINE_SECONDS).contains(&drain_timeout_seconds) {
            true => Some(Duration::from_secs_f64(drain_timeout_seconds)),
            false => {
                let limit = format!("in [0, {MAX_DEADLINE_SECONDS}]");
                f.push(ConfigError::new("drain-timeout-seconds", limit, drain_timeout_seconds));
                None
            }
        };
        let step_timeout = positive_seconds(f, "step-timeout-seconds", step_timeout_seconds);
        let transport = transport.validate(tls.tls_ca.is_some(), f);
        let tls = tls.validate(f);
        ConfigError::check_exposed(f, "listen", listen, tls.is_some(), "--tls-ca", &process);
        let etcd = etcd.validate(f);
        let advertise_host = advertise_host.and_then(|host| {
            let parsed = advertised_host(&host);
            ConfigError::check(f, parsed.is_some(), "advertise-host", "a host name or an IP address", &host);
            parsed
        });
        // The advertised address is used only for the registration in etcd.
        let registered = listen.filter(|_| etcd.is_some() && advertise_host.is_none());
        ConfigError::check_advertised(f, "advertise-grpc", advertise_grpc.as_deref(), registered);
        if !f.is_empty() {
            return None;
        }
        Some(NodeConfig {
            model: model?,
            served_model_name,
            variants: Vec::new(),
            node_id,
            pool,
            cluster,
            load: LoadOptions { device: device?, weights: weights?, kv_dtype: kv?, rows, ..LoadOptions::default() },
            kv_blocks: kv_pool_tokens / block,
            listen: listen?,
            admin: admin?,
            advertise_grpc,
            advertise_host,
            max_waiting,
            default_deadline: default_deadline?,
            drain_timeout: drain_timeout?,
            step_timeout: step_timeout?,
            transport: transport?,
            tls,
            etcd,
        })
    }
}

/// `host` as it stands before a port: an IPv6 address gets brackets. `None` if it is neither a name nor an address.
fn advertised_host(host: &str) -> Option<String> {
    let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    match bare.parse::<IpAddr>() {
        Ok(IpAddr::V6(address)) => Some(format!("[{address}]")),
        Ok(IpAddr::V4(address)) => Some(address.to_string()),
        Err(_) => {
            let letters = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.' || c == '_';
            (!host.is_empty() && host.chars().all(letters)).then(|| host.to_owned())
        }
    }
}

impl NodeConfig {
    /// The address that others dial: `advertised`, else the advertised host with the port of `listen`, else `listen`.
    pub fn dialled(&self, advertised: Option<&str>, listen: SocketAddr) -> String {
        match (advertised, &self.advertise_host) {
            (Some(address), _) => address.to_owned(),
            (None, Some(host)) => format!("{host}:{}", listen.port()),
            (None, None) => listen.to_string(),
        }
    }
}

/// Checks that `seconds` is in (0, `MAX_DEADLINE_SECONDS`]. Otherwise adds an error to `f` and returns `None`.
pub fn positive_seconds(f: &mut Vec<ConfigError>, flag: &'static str, seconds: f64) -> Option<Duration> {
    let ok = seconds > 0.0 && seconds <= MAX_DEADLINE_SECONDS;
    ConfigError::check(f, ok, flag, format!("in (0, {MAX_DEADLINE_SECONDS}]"), seconds);
    ok.then(|| Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: NodeArgs,
    }

    #[test]
    fn an_advertised_host_stands_before_a_port() {
        let hosts = ["10.0.0.1", "fd00::1", "[fd00::1]", "node-1.pool", "a:1", ""].map(advertised_host);
        let expected = [Some("10.0.0.1"), Some("[fd00::1]"), Some("[fd00::1]"), Some("node-1.pool"), None, None];
        assert_eq!(hosts.each_ref().map(Option::as_deref), expected);
    }

    #[test]
    fn every_fault_is_reported_at_once() {
        let line = "x --model /no/such --device gpu --weights f8 --listen nowhere --kv-pool-tokens 1 --max-waiting 0 \
                    --step-timeout-seconds 0 --drain-timeout-seconds=-1";
        let mut faults = Vec::new();
        let args = Cli::parse_from(line.split_whitespace()).args;
        assert!(args.validate(Rows::Few, &mut faults).is_none());
        let flags: Vec<_> = faults.iter().map(|f| f.flag).collect();
        let expected = ["model", "device", "weights", "listen", "kv-pool-tokens", "max-waiting"];
        assert_eq!(flags[..6], expected);
        assert_eq!(flags[6..], ["drain-timeout-seconds", "step-timeout-seconds"]);
        assert_eq!(faults[5].to_string(), "--max-waiting must be in [1, 65536], got 0");
    }
}
