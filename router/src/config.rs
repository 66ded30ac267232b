//! The router's validated configuration.

use std::{net::SocketAddr, time::Duration};

use axum::http::HeaderValue;
use overfill_cluster::{
    Tls,
    discovery::{EtcdConfig, dns::DnsConfig},
    net::{self, Dialer},
};

use crate::{settings::RequestSettings, tenants::ApiKeys};

/// Validated settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// URLs of prefill nodes, for example `http://host:port`.
    pub prefill_urls: Vec<String>,
    /// URLs of decode nodes, for example `http://host:port`.
    pub decode_urls: Vec<String>,
    /// Models that are listed before a node serves them.
    pub served_models: Vec<String>,
    /// Listen address of HTTP. Port 0 picks a free port.
    pub http: SocketAddr,
    /// Listen address of gRPC. Port 0 picks a free port.
    pub grpc: SocketAddr,
    /// Maximum number of running sequences per model.
    pub max_running: usize,
    /// Maximum number of waiting sequences per model.
    pub max_waiting: usize,
    /// Time limit of a request that sets no deadline.
    pub default_deadline: Duration,
    /// Maximum wait for admission or for a node with room.
    pub max_queue: Duration,
    /// Maximum number of attempts per request.
    pub max_attempts: u32,
    /// Retries per second that are always allowed, in addition to one for every five new requests.
    pub min_retries_per_second: u32,
    /// Maximum time without an answer to pings before a node is removed.
    pub node_timeout: Duration,
    /// Maximum time for a node to accept a request, and between two tokens of a request that is being decoded.
    pub progress_timeout: Duration,
    /// Maximum size of an HTTP request body, in bytes.
    pub max_body_bytes: usize,
    /// Maximum number of connections with running requests on each port.
    pub max_connections: usize,
    /// Time that running requests may take to finish at shutdown.
    pub drain_timeout: Duration,
    /// Age at which a client's connection is asked to close. `None`: never.
    pub max_connection_age: Option<Duration>,
    /// Limit of the inter-token latency for scaling decode pools. `None`: latency does not count.
    pub itl_limit: Option<Duration>,
    /// How answers are parsed, and what requests may change.
    pub requests: RequestSettings,
    /// TLS for clients. `None`: no encryption.
    pub serve_tls: Option<Tls>,
    /// API keys of clients. `None`: requests need no key.
    pub api_keys: Option<ApiKeys>,
    /// Origins of web pages that may use the API. Empty: none. `*`: all.
    pub allowed_origins: Vec<HeaderValue>,
    /// Whether the web page is served.
    pub page: bool,
    /// TLS between router and nodes. `None`: no encryption.
    pub tls: Option<Tls>,
    /// Opens connections to nodes.
    pub dialer: Dialer,
    /// Name of the cluster; nodes of other clusters are not used. May be empty.
    pub cluster: String,
    /// The host names whose addresses are nodes. `None`: discovery through DNS is off.
    pub dns: Option<DnsConfig>,
    /// The etcd cluster in which nodes register. `None`: discovery through etcd is off.
    pub etcd: Option<EtcdConfig>,
}

impl Config {
    /// Default settings for these nodes, on free ports of 127.0.0.1. For tests and benchmarks.
    pub fn local(prefill_urls: Vec<String>, decode_urls: Vec<String>) -> Self {
        Self {
            prefill_urls,
            decode_urls,
            served_models: Vec::new(),
            http: SocketAddr::from(([127, 0, 0, 1], 0)),
            grpc: SocketAddr::from(([127, 0, 0, 1], 0)),
            max_running: 256,
            max_waiting: 1024,
            default_deadline: Duration::from_secs(600),
            max_queue: Duration::from_secs(60),
            max_attempts: 4,
            min_retries_per_second: 10,
            node_timeout: Duration::from_secs(6),
            progress_timeout: Duration::from_secs(120),
            max_body_bytes: 16 << 20,
            max_connections: 4096,
            drain_timeout: Duration::from_secs(600),
            max_connection_age: None,
            itl_limit: None,
            requests: RequestSettings::default(),
            serve_tls: None,
            api_keys: None,
            allowed_origins: Vec::new(),
            page: true,
            tls: None,
            dialer: net::tcp_dialer(None),
            cluster: String::new(),
            dns: None,
            etcd: None,
        }
    }
}

impl Config {
    /// The scheme of the nodes' URLs.
    pub fn node_scheme(&self) -> &'static str {
        scheme(&self.tls)
    }
}

/// The scheme of the URLs of services that use this TLS.
pub(crate) fn scheme(tls: &Option<Tls>) -> &'static str {
    if tls.is_some() { "https" } else { "http" }
}
