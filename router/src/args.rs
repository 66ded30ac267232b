//! Command line arguments and their validation.

use std::{path::PathBuf, time::Duration};

use overfill_cluster::{
    ConfigError, ProcessArgs, Tls, TlsArgs,
    discovery::{EtcdArgs, dns::DnsArgs},
    net,
};

use crate::{Config, config::scheme, http, settings::RequestArgs, tenants::ApiKeys};

/// Maximum of all time settings: one day.
const MAX_SECONDS: f64 = 86_400.0;

/// Settings as given on the command line or in the environment.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// gRPC URLs of prefill nodes, comma-separated or repeated. Not needed with discovery.
    #[arg(
        long = "prefill-url",
        env = "OVERFILL_PREFILL_URL",
        value_delimiter = ',',
        value_name = "URL",
        help_heading = "Nodes"
    )]
    pub prefill_url: Vec<String>,
    /// gRPC URLs of decode nodes, comma-separated or repeated. Not needed with discovery.
    #[arg(
        long = "decode-url",
        env = "OVERFILL_DECODE_URL",
        value_delimiter = ',',
        value_name = "URL",
        help_heading = "Nodes"
    )]
    pub decode_url: Vec<String>,
    /// Names of models to list before any node serves them, comma-separated or repeated. Their requests wait for a node.
    #[arg(
        long = "served-model",
        env = "OVERFILL_SERVED_MODEL",
        value_delimiter = ',',
        value_name = "NAME",
        help_heading = "Nodes"
    )]
    pub served_model: Vec<String>,
    /// Name of the cluster. The router uses no nodes of other clusters [default: none]
    #[arg(
        long,
        env = "OVERFILL_CLUSTER",
        value_name = "NAME",
        default_value = "",
        hide_default_value = true,
        help_heading = "Nodes"
    )]
    pub cluster: String,
    /// Listen address of the OpenAI API, /startup, /live, /ready, /health and /metrics.
    #[arg(
        long,
        env = "OVERFILL_HTTP",
        default_value = "127.0.0.1:8080",
        value_name = "ADDRESS",
        help_heading = "Network"
    )]
    pub http: String,
    /// Listen address of the gRPC API.
    #[arg(
        long,
        env = "OVERFILL_GRPC",
        default_value = "127.0.0.1:50051",
        value_name = "ADDRESS",
        help_heading = "Network"
    )]
    pub grpc: String,
    /// Maximum number of running sequences per model. The nodes' own limits apply as well.
    #[arg(
        long,
        env = "OVERFILL_MAX_RUNNING",
        default_value_t = 256,
        value_name = "SEQUENCES",
        help_heading = "Limits"
    )]
    pub max_running: u32,
    /// Maximum number of waiting sequences per model. Further requests are refused with 429.
    #[arg(
        long,
        env = "OVERFILL_MAX_WAITING",
        default_value_t = 1024,
        value_name = "SEQUENCES",
        help_heading = "Limits"
    )]
    pub max_waiting: u32,
    /// Time limit of a request that sets no deadline of its own.
    #[arg(
        long,
        env = "OVERFILL_DEFAULT_DEADLINE_SECONDS",
        default_value_t = 600.0,
        value_name = "SECONDS",
        help_heading = "Timeouts"
    )]
    pub default_deadline_seconds: f64,
    /// Maximum time that a request waits in the queue or for a node with free KV blocks.
    #[arg(
        long,
        env = "OVERFILL_MAX_QUEUE_SECONDS",
        default_value_t = 60.0,
        value_name = "SECONDS",
        help_heading = "Timeouts"
    )]
    pub max_queue_seconds: f64,
    /// Maximum number of attempts per request when nodes fail.
    #[arg(long, env = "OVERFILL_MAX_ATTEMPTS", default_value_t = 4, value_name = "ATTEMPTS", help_heading = "Limits")]
    pub max_attempts: u32,
    /// Retries per second allowed over all requests, in addition to one per five new requests. Further retries wait.
    #[arg(
        long,
        env = "OVERFILL_MIN_RETRIES_PER_SECOND",
        default_value_t = 10,
        value_name = "RETRIES",
        help_heading = "Limits"
    )]
    pub min_retries_per_second: u32,
    /// Time without an answer to pings after which a node is removed. Its requests move to other nodes.
    #[arg(
        long,
        env = "OVERFILL_NODE_TIMEOUT_SECONDS",
        default_value_t = 6.0,
        value_name = "SECONDS",
        help_heading = "Timeouts"
    )]
    pub node_timeout_seconds: f64,
    /// Maximum time for a node to accept a request, and between two tokens of a decoding request. Then the request
    /// moves to other nodes.
    #[arg(
        long,
        env = "OVERFILL_PROGRESS_TIMEOUT_SECONDS",
        default_value_t = 120.0,
        value_name = "SECONDS",
        help_heading = "Timeouts"
    )]
    pub progress_timeout_seconds: f64,
    /// Limit of the inter-token latency that the metric for scaling decode pools counts against. 0: none
    #[arg(
        long,
        env = "OVERFILL_ITL_LIMIT_SECONDS",
        default_value_t = 0.0,
        value_name = "SECONDS",
        help_heading = "Timeouts"
    )]
    pub itl_limit_seconds: f64,
    /// Maximum size of an HTTP request body.
    #[arg(
        long,
        env = "OVERFILL_MAX_BODY_BYTES",
        default_value_t = 16 << 20,
        value_name = "BYTES",
        help_heading = "Limits"
    )]
    pub max_body_bytes: usize,
    /// Maximum number of connections with running requests on each port. Above it, idle connections are closed.
    #[arg(
        long,
        env = "OVERFILL_MAX_CONNECTIONS",
        default_value_t = 4096,
        value_name = "CONNECTIONS",
        help_heading = "Limits"
    )]
    pub max_connections: usize,
    /// Time in seconds that running requests may take to finish at shutdown. Then they end with an error.
    #[arg(
        long,
        env = "OVERFILL_DRAIN_TIMEOUT_SECONDS",
        default_value_t = 600.0,
        value_name = "SECONDS",
        help_heading = "Timeouts"
    )]
    pub drain_timeout_seconds: f64,
    /// Age at which a client's connection is asked to close, so that clients spread over new routers. Running requests
    /// finish. 0: never.
    #[arg(
        long,
        env = "OVERFILL_MAX_CONNECTION_AGE_SECONDS",
        default_value_t = 0.0,
        value_name = "SECONDS",
        help_heading = "Timeouts"
    )]
    pub max_connection_age_seconds: f64,
    /// Server certificate for clients (PEM file). Turns on TLS for HTTP and gRPC clients. Needs --serve-tls-key.
    #[arg(long, env = "OVERFILL_SERVE_TLS_CERT", value_name = "FILE", help_heading = "Security")]
    pub serve_tls_cert: Option<PathBuf>,
    /// Private key of the server certificate (PEM file).
    #[arg(long, env = "OVERFILL_SERVE_TLS_KEY", value_name = "FILE", help_heading = "Security")]
    pub serve_tls_key: Option<PathBuf>,
    /// API keys of clients (JSON file). Without it, requests need no key.
    #[arg(long, env = "OVERFILL_API_KEYS", value_name = "FILE", help_heading = "Security")]
    pub api_keys: Option<PathBuf>,
    /// Origins of web pages that may use the API, like https://example.com, or * for all. Comma-separated or repeated
    /// [default: none]
    #[arg(
        long = "allowed-origins",
        env = "OVERFILL_ALLOWED_ORIGINS",
        value_delimiter = ',',
        value_name = "ORIGIN",
        help_heading = "Security"
    )]
    pub allowed_origins: Vec<String>,
    /// Whether to serve a web page with an overview of the cluster and a playground, at /page.
    #[arg(
        long,
        env = "OVERFILL_PAGE",
        default_value_t = true,
        action = clap::ArgAction::Set,
        value_name = "BOOL",
        help_heading = "Network"
    )]
    pub page: bool,
    /// What requests may change, and how the answers of chats are parsed.
    #[command(flatten)]
    pub requests: RequestArgs,
    /// TLS between the router and the nodes.
    #[command(flatten)]
    pub tls: TlsArgs,
    /// Discovery of nodes through DNS.
    #[command(flatten)]
    pub dns: DnsArgs,
    /// Discovery of nodes through etcd.
    #[command(flatten)]
    pub etcd: EtcdArgs,
    /// Settings that every service process has.
    #[command(flatten)]
    pub process: ProcessArgs,
}

impl Args {
    /// Validates all arguments. Returns all errors at once.
    pub fn validate(self) -> Result<Config, Vec<ConfigError>> {
        let Self {
            prefill_url,
            decode_url,
            served_model,
            http,
            grpc,
            max_running,
            max_waiting,
            default_deadline_seconds,
            max_queue_seconds,
            max_attempts,
            min_retries_per_second,
            node_timeout_seconds,
            progress_timeout_seconds,
            max_body_bytes,
            max_connections,
            cluster,
            drain_timeout_seconds,
            max_connection_age_seconds,
            itl_limit_seconds,
            serve_tls_cert,
            serve_tls_key,
            api_keys,
            allowed_origins,
            page,
            requests,
            tls,
            dns,
            etcd,
            process,
        } = self;
        let mut faults = Vec::new();
        let tls = tls.validate(&mut faults);
        let scheme = scheme(&tls);
        let from_etcd = !etcd.etcd_url.is_empty();
        let from_dns = [!dns.prefill_dns.is_empty(), !dns.decode_dns.is_empty()];
        let mut urls = |flag, list: Vec<String>, discovered, discovery: &str| {
            let enough = from_etcd || discovered || !list.is_empty();
            ConfigError::check(&mut faults, enough, flag, format!("given, or {discovery} or --etcd-url"), "nothing");
            for url in &list {
                let usable = url.strip_prefix(scheme).is_some_and(|rest| rest.starts_with("://"))
                    && tonic::transport::Endpoint::from_shared(url.clone()).is_ok();
                ConfigError::check(&mut faults, usable, flag, format!("like {scheme}://127.0.0.1:50061"), url);
            }
            list
        };
        let prefill_urls = urls("prefill-url", prefill_url, from_dns[0], "--prefill-dns");
        let decode_urls = urls("decode-url", decode_url, from_dns[1], "--decode-dns");
        let one = !(from_etcd && from_dns.contains(&true));
        ConfigError::check(&mut faults, one, "etcd-url", "given without --prefill-dns and --decode-dns", "both");
        let dns = dns.validate(scheme, &mut faults);
        let mut address = |flag, text: String| {
            ConfigError::collect(&mut faults, text.parse(), flag, "an address like 127.0.0.1:8080", &text)
        };
        let (http, grpc) = (address("http", http), address("grpc", grpc));
        let serve_tls = match (serve_tls_cert, serve_tls_key) {
            (None, None) => None,
            (Some(cert), Some(key)) => {
                let tls = Tls::serving(cert, key);
                tls.inspect_err(|e| faults.push(ConfigError::new("serve-tls-cert", "usable", e))).ok()
            }
            (cert, _) => {
                let given = if cert.is_some() { "only the certificate" } else { "only the key" };
                faults.push(ConfigError::new("serve-tls-cert", "given together with --serve-tls-key", given));
                None
            }
        };
        let api_keys = api_keys.and_then(|path| {
            let keys = ApiKeys::load(path);
            keys.inspect_err(|e| faults.push(ConfigError::new("api-keys", "a file of keys", e))).ok()
        });
        let mut origin = |origin: String| {
            let value = Some(&origin).filter(|origin| http::is_origin(origin)).and_then(|origin| origin.parse().ok());
            let limit = "origins like https://example.com, or *";
            ConfigError::collect(&mut faults, value.ok_or("no origin"), "allowed-origins", limit, &origin)
        };
        let allowed_origins = allowed_origins.into_iter().filter_map(&mut origin).collect();
        let secured = serve_tls.is_some() || api_keys.is_some();
        for (flag, listen) in [("http", http), ("grpc", grpc)] {
            let how = "--serve-tls-cert or --api-keys";
            ConfigError::check_exposed(&mut faults, flag, listen, secured, how, &process);
        }
        let mut duration = |flag, seconds: f64| {
            ConfigError::collect(
                &mut faults,
                match seconds > 0.0 && seconds <= MAX_SECONDS {
                    true => Duration::try_from_secs_f64(seconds).map_err(|e| e.to_string()),
                    false => Err("out of range".to_owned()),
                },
                flag,
                "above 0 and at most 86400",
                seconds,
            )
        };
        let default_deadline = duration("default-deadline-seconds", default_deadline_seconds);
        let max_queue = duration("max-queue-seconds", max_queue_seconds);
        let node_timeout = duration("node-timeout-seconds", node_timeout_seconds);
        let progress_timeout = duration("progress-timeout-seconds", progress_timeout_seconds);
        let counts = 1..=1_000_000;
        ConfigError::check(&mut faults, counts.contains(&max_running), "max-running", "in [1, 1000000]", max_running);
        ConfigError::check(&mut faults, max_waiting <= 1_000_000, "max-waiting", "at most 1000000", max_waiting);
        ConfigError::check(&mut faults, max_attempts >= 1, "max-attempts", "at least 1", max_attempts);
        let retries_ok = min_retries_per_second <= 1_000_000;
        let limit = "at most 1000000";
        ConfigError::check(&mut faults, retries_ok, "min-retries-per-second", limit, min_retries_per_second);
        ConfigError::check(&mut faults, max_body_bytes >= 1024, "max-body-bytes", "at least 1024", max_body_bytes);
        let connections_ok = (1..=1_000_000).contains(&max_connections);
        ConfigError::check(&mut faults, connections_ok, "max-connections", "in [1, 1000000]", max_connections);
        let named = served_model.iter().all(|name| !name.is_empty());
        ConfigError::check(&mut faults, named, "served-model", "names, none of them empty", served_model.join(","));
        let mut optional = |flag, seconds: f64| {
            let ok = (0.0..=MAX_SECONDS).contains(&seconds);
            ConfigError::check(&mut faults, ok, flag, "in [0, 86400]", seconds);
            (ok && seconds > 0.0).then(|| Duration::from_secs_f64(seconds))
        };
        let drain_timeout = optional("drain-timeout-seconds", drain_timeout_seconds).unwrap_or_default();
        let max_connection_age = optional("max-connection-age-seconds", max_connection_age_seconds);
        let itl_limit = optional("itl-limit-seconds", itl_limit_seconds);
        let etcd = etcd.validate(&mut faults);
        let requests = requests.validate(&mut faults);
        let durations = (default_deadline, max_queue, node_timeout, progress_timeout);
        let (Some(default_deadline), Some(max_queue), Some(node_timeout), Some(progress_timeout)) = durations else {
            return Err(faults);
        };
        match (http, grpc, faults.is_empty()) {
            (Some(http), Some(grpc), true) => Ok(Config {
                prefill_urls,
                decode_urls,
                served_models: served_model,
                http,
                grpc,
                max_running: max_running as usize,
                max_waiting: max_waiting as usize,
                default_deadline,
                max_queue,
                max_attempts,
                min_retries_per_second,
                node_timeout,
                progress_timeout,
                max_body_bytes,
                max_connections,
                drain_timeout,
                max_connection_age,
                itl_limit,
                requests,
                serve_tls,
                api_keys,
                allowed_origins,
                page,
                dialer: net::tcp_dialer(tls.clone()),
                tls,
                cluster,
                dns,
                etcd,
            }),
            _ => Err(faults),
        }
    }
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

    fn validate(args: &[&str]) -> Result<Config, Vec<ConfigError>> {
        Cli::try_parse_from([&["router"], args].concat()).unwrap().args.validate()
    }

    #[test]
    fn lists_take_commas_and_repeats() {
        let config = validate(&[
            "--prefill-url",
            "http://a:1,http://b:1",
            "--decode-url",
            "http://c:1",
            "--decode-url",
            "http://d:1",
        ])
        .unwrap();
        assert_eq!((config.prefill_urls.len(), config.decode_urls.len()), (2, 2));
    }

    #[test]
    fn lists_may_be_empty_with_etcd_alone() {
        assert!(validate(&["--etcd-url", "http://a:2379,http://b:2379"]).unwrap().etcd.is_some());
        assert_eq!(validate(&[]).unwrap_err().len(), 2);
    }

    #[test]
    fn names_may_be_resolved_instead() {
        let config = validate(&["--prefill-dns=http://p:1", "--decode-dns=http://d:1,http://e:1"]).unwrap();
        assert_eq!(config.dns.unwrap().names.len(), 3);
        let faults = validate(&["--prefill-dns=http://p:1", "--etcd-url=http://a:2379"]).unwrap_err();
        assert_eq!(faults[0].flag, "etcd-url");
        assert_eq!(validate(&["--prefill-dns=http://p:1"]).unwrap_err()[0].flag, "decode-url");
    }

    #[test]
    fn origins_are_checked() {
        let nodes = ["--prefill-url=http://a:1", "--decode-url=http://b:1"];
        let origins = |list: &str| validate(&[&nodes[..], &[&format!("--allowed-origins={list}")]].concat());
        assert_eq!(origins("https://a.com,http://b.com:3000").unwrap().allowed_origins.len(), 2);
        let faults = origins("https://a.com/,*,b.com").unwrap_err();
        let faults: Vec<String> = faults.iter().map(ToString::to_string).collect();
        let limit = "--allowed-origins must be origins like https://example.com, or *, got ";
        assert_eq!(faults, [format!("{limit}https://a.com/"), format!("{limit}b.com")]);
    }

    #[test]
    fn every_fault_is_reported() {
        let faults = validate(&["--prefill-url=a:1", "--http=x", "--max-running=0", "--default-deadline-seconds=1e18"])
            .unwrap_err();
        let flags: Vec<_> = faults.iter().map(|f| f.flag).collect();
        assert_eq!(flags, ["prefill-url", "decode-url", "http", "default-deadline-seconds", "max-running"]);
    }
}
