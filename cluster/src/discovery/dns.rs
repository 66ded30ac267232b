//! Discovery without etcd: the addresses of a host name are nodes. In Kubernetes, a headless Service is such a name.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use dns_lookup::{AddrInfoHints, LookupErrorKind, SockType};
use overfill_kv::Role;
use prometheus::IntGauge;
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval, timeout},
};
use tracing::{info, warn};

use crate::{ConfigError, Shutdown, metrics::unix_seconds};

/// Time limit of one lookup. The system's resolver usually gives up earlier.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(30);

/// Discovery through DNS. It is off without host names.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Discovery (DNS)")]
pub struct DnsArgs {
    /// gRPC URLs of prefill nodes whose host name has one address per node, comma-separated or repeated. The name is
    /// resolved again and again.
    #[arg(long, env = "OVERFILL_PREFILL_DNS", value_delimiter = ',', value_name = "URL")]
    pub prefill_dns: Vec<String>,
    /// gRPC URLs of decode nodes whose host name has one address per node, comma-separated or repeated.
    #[arg(long, env = "OVERFILL_DECODE_DNS", value_delimiter = ',', value_name = "URL")]
    pub decode_dns: Vec<String>,
    /// Time between two lookups of the same name.
    #[arg(long, env = "OVERFILL_DNS_INTERVAL_SECONDS", default_value_t = 2.0, value_name = "SECONDS")]
    pub dns_interval_seconds: f64,
}

/// Checked settings of discovery through DNS.
#[derive(Clone, Debug, PartialEq)]
pub struct DnsConfig {
    /// The names to look up.
    pub names: BTreeSet<DnsName>,
    /// Time between two lookups of the same name.
    pub interval: Duration,
}

/// A host name whose addresses are nodes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DnsName {
    /// Role of all nodes at the name.
    pub role: Role,
    /// Host name.
    pub host: String,
    /// Port of all nodes at the name.
    pub port: u16,
}

impl DnsArgs {
    /// Checks all settings. `scheme` is the scheme that the URLs must have: http or https. Returns `None` if discovery
    /// through DNS is off or a setting is invalid.
    pub fn validate(self, scheme: &str, faults: &mut Vec<ConfigError>) -> Option<DnsConfig> {
        let Self { prefill_dns, decode_dns, dns_interval_seconds } = self;
        let before = faults.len();
        let mut names = BTreeSet::new();
        for (role, flag, urls) in
            [(Role::Prefill, "prefill-dns", prefill_dns), (Role::Decode, "decode-dns", decode_dns)]
        {
            for url in urls {
                match parse(&url, scheme) {
                    Some((host, port)) => drop(names.insert(DnsName { role, host, port })),
                    None => faults.push(ConfigError::new(flag, format!("like {scheme}://name:50061"), url)),
                }
            }
        }
        let interval_ok = (0.1..=3600.0).contains(&dns_interval_seconds);
        ConfigError::check(faults, interval_ok, "dns-interval-seconds", "in [0.1, 3600]", dns_interval_seconds);
        let usable = faults.len() == before && !names.is_empty();
        usable.then(|| DnsConfig { names, interval: Duration::from_secs_f64(dns_interval_seconds) })
    }
}

/// Host and port of a URL without a path.
fn parse(url: &str, scheme: &str) -> Option<(String, u16)> {
    let uri: http::Uri = url.parse().ok()?;
    let bare = matches!(uri.path_and_query().map(|path| path.as_str()), None | Some("/"));
    let authority = uri.authority().filter(|authority| !authority.as_str().contains('@'))?;
    let right = uri.scheme_str() == Some(scheme) && bare && !authority.host().is_empty();
    right.then_some(())?;
    Some((authority.host().to_owned(), authority.port_u16()?))
}

/// The addresses of nodes, with their role.
pub type Addresses = BTreeSet<(SocketAddr, Role)>;

/// Why a name has no addresses at the moment.
#[derive(Debug, thiserror::Error)]
pub enum LookupError {
    /// The name exists without addresses, or does not exist: a headless Service without pods.
    #[error("the name has no addresses")]
    NoAddresses,
    /// The resolver failed. The addresses are unknown.
    #[error("{0}")]
    Failed(String),
}

/// Looks up the names at every interval, until the shutdown begins.
///
/// A name without addresses has no nodes. While its lookup fails, its last known addresses stay in the channel.
/// `last_success` is set to the current time when all names were looked up.
pub fn follow(config: DnsConfig, shutdown: &Shutdown, last_success: IntGauge) -> watch::Receiver<Addresses> {
    follow_with(config, shutdown, Arc::new(system_lookup), last_success)
}

type Lookup = Arc<dyn Fn(&DnsName) -> Result<BTreeSet<SocketAddr>, LookupError> + Send + Sync>;

fn follow_with(
    config: DnsConfig,
    shutdown: &Shutdown,
    lookup: Lookup,
    last_success: IntGauge,
) -> watch::Receiver<Addresses> {
    let (sender, receiver) = watch::channel(Addresses::new());
    let token = shutdown.token();
    let following = async move {
        let mut known: BTreeMap<DnsName, Known> =
            config.names.into_iter().map(|name| (name, Known::default())).collect();
        let mut turn = interval(config.interval);
        turn.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            turn.tick().await;
            // All names at once: a name whose server is slow must not hold up the others.
            let lookups = known.keys().cloned().map(|name| look_up(name, lookup.clone()));
            for (name, result) in futures::future::join_all(lookups).await {
                if let Some(known) = known.get_mut(&name) {
                    known.update(&name, result);
                }
            }
            if known.values().all(|known| !known.failing) {
                last_success.set(unix_seconds());
            }
            let of = |(name, known): (&DnsName, &Known)| -> Vec<_> {
                known.addresses.iter().map(|address| (*address, name.role)).collect()
            };
            let now: Addresses = known.iter().flat_map(of).collect();
            sender.send_if_modified(|last| {
                *last != now && {
                    *last = now;
                    true
                }
            });
        }
    };
    shutdown.spawn("dns", async move {
        let _: Option<()> = token.run_until_cancelled(following).await;
    });
    receiver
}

/// What is known of one name.
#[derive(Default)]
struct Known {
    addresses: BTreeSet<SocketAddr>,
    failing: bool,
}

impl Known {
    /// Logs only changes: the first failure of a series, and addresses that come or go.
    fn update(&mut self, name: &DnsName, result: Result<BTreeSet<SocketAddr>, LookupError>) {
        let addresses = match result {
            Ok(addresses) => addresses,
            Err(LookupError::NoAddresses) => BTreeSet::new(),
            Err(error @ LookupError::Failed(_)) => {
                if !std::mem::replace(&mut self.failing, true) {
                    warn!(host = name.host, role = %name.role, %error, "looking up nodes failed; retrying until it succeeds");
                }
                return;
            }
        };
        self.failing = false;
        if addresses != self.addresses {
            info!(host = name.host, role = %name.role, nodes = addresses.len(), "the addresses of the nodes have changed");
            self.addresses = addresses;
        }
    }
}

async fn look_up(name: DnsName, lookup: Lookup) -> (DnsName, Result<BTreeSet<SocketAddr>, LookupError>) {
    let asked = name.clone();
    // The system's resolver blocks. It reads /etc/resolv.conf and its search domains as every other program does.
    let answer = tokio::task::spawn_blocking(move || lookup(&asked));
    let result = match timeout(LOOKUP_TIMEOUT, answer).await {
        Ok(Ok(result)) => result,
        Ok(Err(error)) => Err(LookupError::Failed(error.to_string())),
        Err(_) => Err(LookupError::Failed(format!("no answer within {} s", LOOKUP_TIMEOUT.as_secs()))),
    };
    (name, result)
}

fn system_lookup(name: &DnsName) -> Result<BTreeSet<SocketAddr>, LookupError> {
    let hints = AddrInfoHints { socktype: SockType::Stream.into(), ..AddrInfoHints::default() };
    // An IPv6 address is in brackets in a URL.
    let host = name.host.trim_start_matches('[').trim_end_matches(']');
    let found = dns_lookup::getaddrinfo(Some(host), None, Some(hints)).map_err(|error| match error.kind() {
        LookupErrorKind::NoName | LookupErrorKind::NoData => LookupError::NoAddresses,
        _ => LookupError::Failed(std::io::Error::from(error).to_string()),
    })?;
    Ok(found.flatten().map(|info| SocketAddr::new(info.sockaddr.ip(), name.port)).collect())
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;

    fn args(prefill: &str, decode: &str) -> DnsArgs {
        let list = |text: &str| text.split_whitespace().map(str::to_owned).collect();
        DnsArgs { prefill_dns: list(prefill), decode_dns: list(decode), dns_interval_seconds: 0.1 }
    }

    #[test]
    fn names_are_urls_with_a_port() {
        let faults = &mut Vec::new();
        let config = args("http://p.ns.svc:50061 http://[::1]:1", "http://d:50071/").validate("http", faults).unwrap();
        let names: Vec<_> = config.names.iter().map(|n| (n.role.as_str(), n.host.as_str(), n.port)).collect();
        assert_eq!(names, [("prefill", "[::1]", 1), ("prefill", "p.ns.svc", 50061), ("decode", "d", 50071)]);
        assert_eq!(args("", "").validate("http", faults), None);
        assert_eq!(faults, &[]);
        assert_eq!(args("p:1 http://p http://p:1/x https://p:1", "http://u@p:1").validate("http", faults), None);
        assert_eq!(faults.len(), 5);
        assert_eq!(faults[1].to_string(), "--prefill-dns must be like http://name:50061, got http://p");
    }

    #[test]
    fn the_system_knows_this_machine() {
        let name = |host: &str| DnsName { role: Role::Decode, host: host.into(), port: 7 };
        assert!(system_lookup(&name("localhost")).unwrap().contains(&"127.0.0.1:7".parse().unwrap()));
        assert_eq!(system_lookup(&name("[::1]")).unwrap(), ["[::1]:7".parse().unwrap()].into());
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_without_addresses_has_no_nodes_and_a_failed_lookup_changes_nothing() {
        let answer = Arc::new(Mutex::new(Ok(vec!["10.0.0.1:1", "10.0.0.2:1"])));
        let asked = answer.clone();
        let lookup: Lookup = Arc::new(move |_| match &*asked.lock() {
            Ok(list) => Ok(list.iter().map(|address| address.parse().unwrap()).collect()),
            Err(true) => Err(LookupError::NoAddresses),
            Err(false) => Err(LookupError::Failed("no server".into())),
        });
        let config = args("http://p:1", "").validate("http", &mut Vec::new()).unwrap();
        let shutdown = Shutdown::new();
        let last_success = IntGauge::new("last", "last").unwrap();
        let mut addresses = follow_with(config, &shutdown, lookup, last_success.clone());
        addresses.changed().await.unwrap();
        assert!(last_success.get() > 0);
        assert_eq!(addresses.borrow_and_update().len(), 2);
        *answer.lock() = Err(false);
        last_success.set(0);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(!addresses.has_changed().unwrap());
        assert_eq!(last_success.get(), 0);
        *answer.lock() = Err(true);
        addresses.changed().await.unwrap();
        assert!(last_success.get() > 0);
        assert!(addresses.borrow_and_update().is_empty());
        *answer.lock() = Ok(vec!["10.0.0.3:1"]);
        addresses.changed().await.unwrap();
        assert_eq!(*addresses.borrow(), [("10.0.0.3:1".parse().unwrap(), Role::Prefill)].into());
        shutdown.begin();
        assert!(shutdown.wait(Duration::from_secs(5)).await);
    }
}
