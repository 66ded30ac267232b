//! The node's settings: as given, and as checked.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use overfill_cluster::{
    ConfigError, ProcessArgs, Tls, TlsArgs,
    discovery::{EtcdArgs, EtcdConfig},
};
use overfill_kv::{BLOCK_TOKENS, KvDtype};
use overfill_model::{DeviceSpec, LoadOptions, Rows, WeightFormat};

/// A node that runs the full model over prompts and hands their KV over.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The full model: a Hugging Face folder, a .gguf file, or a hub id.
    #[arg(long, env = "OVERFILL_MODEL")]
    pub model: String,
    /// Name under which the model is served; by default that of its folder.
    #[arg(long, env = "OVERFILL_SERVED_MODEL_NAME")]
    pub served_model_name: Option<String>,
    /// Name of this node; by default its role and address.
    #[arg(long, env = "OVERFILL_NODE_ID")]
    pub node_id: Option<String>,
    /// Where to compute: cpu, or cuda:N.
    #[arg(long, env = "OVERFILL_DEVICE", default_value = "cpu")]
    pub device: String,
    /// How weights lie in memory: f32, bf16, f16, int8, int8-channel or int4 (integers on the CPU alone).
    #[arg(long, visible_alias = "dtype", env = "OVERFILL_WEIGHTS", default_value = "bf16")]
    pub weights: String,
    /// Type of the KV cache in memory and on the wire, the same on all nodes: f32, bf16 or f16.
    #[arg(long, env = "OVERFILL_KV_DTYPE", default_value = "bf16")]
    pub kv_dtype: String,
    /// Tokens that the KV cache holds.
    #[arg(long, env = "OVERFILL_KV_POOL_TOKENS", default_value_t = 65536)]
    pub kv_pool_tokens: usize,
    /// Address of the gRPC service.
    #[arg(long, env = "OVERFILL_LISTEN", default_value = "127.0.0.1:0")]
    pub listen: String,
    /// Address of /startup, /live, /ready, /health and /metrics.
    #[arg(long, env = "OVERFILL_ADMIN", default_value = "127.0.0.1:0")]
    pub admin: String,
    /// The gRPC address as routers must dial it, host:port; by default the one that is listened on. Only for etcd.
    #[arg(long, env = "OVERFILL_ADVERTISE_GRPC")]
    pub advertise_grpc: Option<String>,
    /// Most prompt tokens computed in one step.
    #[arg(long, env = "OVERFILL_MAX_BATCH_TOKENS", default_value_t = 512)]
    pub max_batch_tokens: usize,
    /// How long a step should take: it has fewer tokens where it would take longer, so that a new prompt need not wait long for
    /// the step under way. At least 64 tokens, or --max-batch-tokens.
    #[arg(long, env = "OVERFILL_STEP_TARGET_SECONDS", default_value_t = 1.0)]
    pub step_target_seconds: f64,
    /// Most prompts computed at once.
    #[arg(long, env = "OVERFILL_MAX_RUNNING", default_value_t = 16)]
    pub max_running: usize,
    /// Most prompts waiting; more are refused.
    #[arg(long, env = "OVERFILL_MAX_WAITING", default_value_t = 256)]
    pub max_waiting: usize,
    /// Seconds that a request may take when it does not say.
    #[arg(long, env = "OVERFILL_DEFAULT_DEADLINE_SECONDS", default_value_t = 600.0)]
    pub default_deadline_seconds: f64,
    /// When the node shuts down, requests that still run after this long are given back to their router, to go on elsewhere.
    #[arg(long, env = "OVERFILL_DRAIN_TIMEOUT_SECONDS", default_value_t = 25.0)]
    pub drain_timeout_seconds: f64,
    /// Longest step of the engine; beyond it the node is not ready, and routers leave it.
    #[arg(long, env = "OVERFILL_STEP_TIMEOUT_SECONDS", default_value_t = 60.0)]
    pub step_timeout_seconds: f64,
    /// Between services.
    #[command(flatten)]
    pub tls: TlsArgs,
    /// Where the node registers.
    #[command(flatten)]
    pub etcd: EtcdArgs,
    /// Settings of every service process.
    #[command(flatten)]
    pub process: ProcessArgs,
}

/// Checked settings.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Folder or file of the full model.
    pub model: PathBuf,
    /// Name under which it is served; `None`: its folder's.
    pub served_model_name: Option<String>,
    /// Name of this node; `None`: its role and address.
    pub node_id: Option<String>,
    /// How it is loaded.
    pub load: LoadOptions,
    /// Blocks of the KV cache.
    pub kv_blocks: usize,
    /// Of the gRPC service.
    pub listen: SocketAddr,
    /// Of the admin port.
    pub admin: SocketAddr,
    /// What routers dial; `None`: the address that is listened on.
    pub advertise_grpc: Option<String>,
    /// Most prompt tokens in one step.
    pub max_batch_tokens: usize,
    /// How long a step should take.
    pub step_target: Duration,
    /// Most prompts computed at once.
    pub max_running: usize,
    /// Most prompts waiting.
    pub max_waiting: usize,
    /// For requests without a deadline of their own.
    pub default_deadline: Duration,
    /// How long requests may go on when the node shuts down.
    pub drain_timeout: Duration,
    /// Longest step of the engine.
    pub step_timeout: Duration,
    /// Between services; `None`: nothing is encrypted.
    pub tls: Option<Tls>,
    /// Where the node registers; `None`: nowhere.
    pub etcd: Option<EtcdConfig>,
}

impl Args {
    /// Checks everything, and reports every fault.
    pub fn validate(self) -> Result<Config, Vec<ConfigError>> {
        let Self {
            model,
            served_model_name,
            node_id,
            device,
            weights,
            kv_dtype,
            kv_pool_tokens,
            listen,
            admin,
            advertise_grpc,
            max_batch_tokens,
            step_target_seconds,
            max_running,
            max_waiting,
            default_deadline_seconds,
            drain_timeout_seconds,
            step_timeout_seconds,
            tls,
            etcd,
            process,
        } = self;
        let f = &mut Vec::new();
        let address = "an IP address and port";
        let folder = overfill_model::resolve(&model)
            .inspect_err(|e| f.push(ConfigError::new("model", "a model folder, .gguf file or hub id", e)))
            .ok();
        let device = ConfigError::collect(f, device.parse::<DeviceSpec>(), "device", "cpu or cuda:N", &device);
        let parsed = weights.parse::<WeightFormat>();
        let weights = ConfigError::collect(f, parsed, "weights", WeightFormat::SUPPORTED, &weights);
        let kv = ConfigError::collect(f, kv_dtype.parse::<KvDtype>(), "kv-dtype", "f32, bf16 or f16", &kv_dtype);
        let listen = ConfigError::collect(f, listen.parse::<SocketAddr>(), "listen", address, &listen);
        let admin = ConfigError::collect(f, admin.parse(), "admin", address, &admin);
        let name_ok = |name: &Option<String>| name.as_ref().is_none_or(|n| !n.trim().is_empty());
        let block = BLOCK_TOKENS;
        ConfigError::check(f, name_ok(&served_model_name), "served-model-name", "a name", "an empty text");
        ConfigError::check(f, name_ok(&node_id), "node-id", "a name", "an empty text");
        let pool_ok = (block..=MAX_POOL_TOKENS).contains(&kv_pool_tokens);
        ConfigError::check(f, pool_ok, "kv-pool-tokens", format!("in [{block}, {MAX_POOL_TOKENS}]"), kv_pool_tokens);
        let batch_ok = (block..=65536).contains(&max_batch_tokens);
        ConfigError::check(f, batch_ok, "max-batch-tokens", format!("in [{block}, 65536]"), max_batch_tokens);
        let target_ok = step_target_seconds > 0.0 && step_target_seconds <= MAX_DEADLINE_SECONDS;
        let limit = format!("in (0, {MAX_DEADLINE_SECONDS}]");
        ConfigError::check(f, target_ok, "step-target-seconds", limit, step_target_seconds);
        ConfigError::check(f, (1..=4096).contains(&max_running), "max-running", "in [1, 4096]", max_running);
        ConfigError::check(f, (1..=65536).contains(&max_waiting), "max-waiting", "in [1, 65536]", max_waiting);
        let deadline_ok = default_deadline_seconds > 0.0 && default_deadline_seconds <= MAX_DEADLINE_SECONDS;
        let limit = format!("in (0, {MAX_DEADLINE_SECONDS}]");
        ConfigError::check(f, deadline_ok, "default-deadline-seconds", limit, default_deadline_seconds);
        let drain_ok = (0.0..=MAX_DEADLINE_SECONDS).contains(&drain_timeout_seconds);
        let limit = format!("in [0, {MAX_DEADLINE_SECONDS}]");
        ConfigError::check(f, drain_ok, "drain-timeout-seconds", limit, drain_timeout_seconds);
        let step_ok = step_timeout_seconds > 0.0 && step_timeout_seconds <= MAX_DEADLINE_SECONDS;
        let limit = format!("in (0, {MAX_DEADLINE_SECONDS}]");
        ConfigError::check(f, step_ok, "step-timeout-seconds", limit, step_timeout_seconds);
        let tls = tls.validate(f);
        ConfigError::check_exposed(f, "listen", listen, tls.is_some(), "--tls-ca", &process);
        let etcd = etcd.validate(f);
        // Nobody but etcd is told it.
        ConfigError::check_advertised(
            f,
            "advertise-grpc",
            advertise_grpc.as_deref(),
            listen.filter(|_| etcd.is_some()),
        );
        match (folder, device, weights, kv, listen, admin) {
            (Some(model), Some(device), Some(weights), Some(kv_dtype), Some(listen), Some(admin)) if f.is_empty() => {
                Ok(Config {
                    model,
                    served_model_name,
                    node_id,
                    load: LoadOptions { device, weights, kv_dtype, rows: Rows::Many },
                    kv_blocks: kv_pool_tokens / block,
                    listen,
                    admin,
                    advertise_grpc,
                    max_batch_tokens,
                    step_target: Duration::from_secs_f64(step_target_seconds),
                    max_running,
                    max_waiting,
                    default_deadline: Duration::from_secs_f64(default_deadline_seconds),
                    drain_timeout: Duration::from_secs_f64(drain_timeout_seconds),
                    step_timeout: Duration::from_secs_f64(step_timeout_seconds),
                    tls,
                    etcd,
                })
            }
            _ => Err(std::mem::take(f)),
        }
    }
}

/// Block ids are 32 bits; this is far below, and far above any memory.
const MAX_POOL_TOKENS: usize = 1 << 30;
/// Longest deadline of a request, in seconds.
pub(crate) const MAX_DEADLINE_SECONDS: f64 = 86400.0;

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn every_fault_is_reported_at_once() {
        let line = "x --model /no/such --device gpu --weights f8 --listen nowhere --max-running 0 --kv-pool-tokens 1";
        let faults = Cli::parse_from(line.split(' ')).args.validate().unwrap_err();
        let flags: Vec<_> = faults.iter().map(|f| f.flag).collect();
        assert_eq!(flags, ["model", "device", "weights", "listen", "kv-pool-tokens", "max-running"]);
        assert_eq!(faults[5].to_string(), "--max-running must be in [1, 4096], got 0");
    }
}
