//! Settings of a decode node: the command line arguments and their checked form.

use std::net::SocketAddr;

use overfill_cluster::ConfigError;
use overfill_model::Rows;
use overfill_node::{NodeArgs, NodeConfig, Variant};

/// A node that decodes requests over the full model's KV.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// What both roles have.
    #[command(flatten)]
    pub node: NodeArgs,
    /// Further model that this node serves over the same KV, as NAME=MODEL. Comma-separated or repeated. All must attend to
    /// the KV of the same full model. The KV of a prompt is held once for all of them.
    #[arg(
        long = "variant",
        env = "OVERFILL_VARIANT",
        value_delimiter = ',',
        value_name = "NAME=MODEL",
        help_heading = "Model"
    )]
    pub variant: Vec<String>,
    /// Listen address for KV from prefill nodes. Port 0 picks a free port.
    #[arg(long, env = "OVERFILL_KV_LISTEN", default_value = "127.0.0.1:0", help_heading = "Network")]
    pub kv_listen: String,
    /// KV address (host:port) that prefill nodes dial [default: the listen address]
    #[arg(long, env = "OVERFILL_ADVERTISE_KV", help_heading = "Network")]
    pub advertise_kv: Option<String>,
    /// Maximum number of requests in the decode batch.
    #[arg(long, env = "OVERFILL_MAX_RUNNING", default_value_t = 32, help_heading = "Scheduling")]
    pub max_running: usize,
}

/// Checked settings of a decode node.
#[derive(Clone, Debug)]
pub struct Config {
    /// Settings that both roles have.
    pub node: NodeConfig,
    /// Listen address for KV from prefill nodes.
    pub kv_listen: SocketAddr,
    /// KV address (`host:port`) that prefill nodes dial; `None`: the listen address.
    pub advertise_kv: Option<String>,
    /// Maximum number of requests that hold blocks.
    pub max_running: usize,
}

impl Args {
    /// Checks all settings.
    ///
    /// # Errors
    /// All invalid settings, not only the first one.
    pub fn validate(self) -> Result<Config, Vec<ConfigError>> {
        let Self { node, variant, kv_listen, advertise_kv, max_running } = self;
        let f = &mut Vec::new();
        let (process, has_tls) = (node.process.clone(), node.tls.tls_ca.is_some());
        let (has_host, served) = (node.advertise_host.is_some(), node.served_model_name.clone());
        let node = node.validate(Rows::Few, f);
        let variants = variants(&variant, served.as_deref(), f);
        let parsed = kv_listen.parse::<SocketAddr>();
        let kv_listen = ConfigError::collect(f, parsed, "kv-listen", "an IP address and port", &kv_listen);
        let dialled = kv_listen.filter(|_| !has_host);
        ConfigError::check_advertised(f, "advertise-kv", advertise_kv.as_deref(), dialled);
        ConfigError::check_exposed(f, "kv-listen", kv_listen, has_tls, "--tls-ca", &process);
        ConfigError::check(f, (1..=4096).contains(&max_running), "max-running", "in [1, 4096]", max_running);
        match (node, kv_listen) {
            (Some(mut node), Some(kv_listen)) if f.is_empty() => {
                node.variants = variants;
                (node.load.max_rows, node.load.max_sequences) = (max_running, max_running);
                Ok(Config { node, kv_listen, advertise_kv, max_running })
            }
            _ => Err(std::mem::take(f)),
        }
    }
}

/// Parses the values of --variant. `served`: the name of the node's model.
fn variants(values: &[String], served: Option<&str>, f: &mut Vec<ConfigError>) -> Vec<Variant> {
    let mut variants: Vec<Variant> = Vec::new();
    for value in values {
        let is_new = |name: &str| {
            !name.trim().is_empty() && served != Some(name) && variants.iter().all(|other| other.name != name)
        };
        let Some((name, model)) = value.split_once('=').filter(|(name, _)| is_new(name)) else {
            f.push(ConfigError::new("variant", "NAME=MODEL with different names", value));
            continue;
        };
        match overfill_model::resolve(model) {
            Ok(model) => variants.push(Variant { name: name.to_owned(), model }),
            Err(e) => f.push(ConfigError::new("variant", "a model folder, .gguf file or hub id", e)),
        }
    }
    variants
}

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
        let line = "x --model /no/such --device gpu --served-model-name m --variant a=. --variant m=. --variant b --kv-listen nowhere \
                    --advertise-kv host --max-running 0";
        let faults = Cli::parse_from(line.split_whitespace()).args.validate().unwrap_err();
        let flags: Vec<_> = faults.iter().map(|f| f.flag).collect();
        assert_eq!(flags, ["model", "device", "variant", "variant", "kv-listen", "advertise-kv", "max-running"]);
        assert_eq!(faults[2].to_string(), "--variant must be NAME=MODEL with different names, got m=.");
        assert_eq!(faults[6].to_string(), "--max-running must be in [1, 4096], got 0");
    }
}
