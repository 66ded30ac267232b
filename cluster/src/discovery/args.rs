//! Settings of the etcd connection: the command line arguments and their checked form.

use std::{fmt, fs, path::PathBuf, time::Duration};

use etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};

use crate::{ConfigError, tls};

/// Time limit for connecting to one etcd member.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Interval of HTTP/2 pings to etcd. etcd closes connections that ping more often than every 5 s.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(6);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(4);

/// Discovery through etcd. It is off without `--etcd-url`.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Discovery (etcd)")]
pub struct EtcdArgs {
    /// URLs of the etcd members, comma-separated or repeated. Turns on discovery through etcd.
    #[arg(long, env = "OVERFILL_ETCD_URL", value_delimiter = ',', value_name = "URL")]
    pub etcd_url: Vec<String>,
    /// User name for etcd.
    #[arg(long, env = "OVERFILL_ETCD_USER", value_name = "USER")]
    pub etcd_user: Option<String>,
    /// File with the password of the etcd user.
    #[arg(long, env = "OVERFILL_ETCD_PASSWORD_FILE", value_name = "FILE")]
    pub etcd_password_file: Option<PathBuf>,
    /// CA certificates (PEM file). etcd's certificate must be signed by one of them. Needed for https:// URLs.
    #[arg(long, env = "OVERFILL_ETCD_CA", value_name = "FILE")]
    pub etcd_ca: Option<PathBuf>,
    /// Client certificate for etcd (PEM file).
    #[arg(long, env = "OVERFILL_ETCD_CERT", value_name = "FILE")]
    pub etcd_cert: Option<PathBuf>,
    /// Private key of the client certificate (PEM file).
    #[arg(long, env = "OVERFILL_ETCD_KEY", value_name = "FILE")]
    pub etcd_key: Option<PathBuf>,
    /// Prefix of all keys in etcd. It separates clusters that use the same etcd.
    #[arg(long, env = "OVERFILL_ETCD_PREFIX", default_value = "overfill", value_name = "PREFIX")]
    pub etcd_prefix: String,
    /// Lease of a node's registration. It expires when the node is silent for this long.
    #[arg(long, env = "OVERFILL_ETCD_LEASE_SECONDS", default_value_t = 10, value_name = "SECONDS")]
    pub etcd_lease_seconds: u32,
}

/// Checked settings of the etcd connection.
#[derive(Clone, Debug, PartialEq)]
pub struct EtcdConfig {
    /// URLs of the etcd members: all `http://` or all `https://`.
    pub urls: Vec<String>,
    /// Prefix of all keys, without a trailing slash.
    pub prefix: String,
    /// Lease of a registration: etcd deletes the key when the node sends no keep-alive for this long.
    pub lease: Duration,
    login: Option<Login>,
    tls: Option<Tls>,
}

#[derive(Clone, PartialEq)]
struct Login {
    user: String,
    password: String,
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} with a password", self.user)
    }
}

#[derive(Clone, PartialEq)]
struct Tls {
    ca: Vec<u8>,
    /// Client certificate and private key, PEM.
    own: Option<(Vec<u8>, Vec<u8>)>,
    /// When the first certificate of each file expires, in seconds since 1970.
    expiries: Vec<(PathBuf, i64)>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.own.is_some() { "mutual" } else { "server only" })
    }
}

impl EtcdArgs {
    /// Checks all settings, reads the files, and adds every error to `faults`. Returns `None` if discovery is off or a
    /// setting is invalid.
    pub fn validate(self, faults: &mut Vec<ConfigError>) -> Option<EtcdConfig> {
        let Self {
            etcd_url: urls,
            etcd_user,
            etcd_password_file,
            etcd_ca,
            etcd_cert,
            etcd_key,
            etcd_prefix,
            etcd_lease_seconds,
        } = self;
        let before = faults.len();
        let secure = urls.iter().any(|url| url.starts_with("https://"));
        for url in &urls {
            let scheme = if secure { "https://" } else { "http://" };
            let like = format!("like {scheme}127.0.0.1:2379, all with the same scheme");
            let usable = url.strip_prefix(scheme).is_some_and(|rest| !rest.is_empty());
            ConfigError::check(faults, usable, "etcd-url", like, url);
        }
        let prefix_ok = !etcd_prefix.is_empty() && !etcd_prefix.ends_with('/');
        ConfigError::check(faults, prefix_ok, "etcd-prefix", "a name that does not end in /", &etcd_prefix);
        // etcd extends shorter leases to its own minimum.
        let lease_ok = (2..=3600).contains(&etcd_lease_seconds);
        ConfigError::check(faults, lease_ok, "etcd-lease-seconds", "in [2, 3600]", etcd_lease_seconds);
        let mut read = |flag, path: Option<PathBuf>| {
            let path = path?;
            let limit = "a file that can be read";
            fs::read(&path)
                .inspect_err(|e| faults.push(ConfigError::new(flag, limit, format!("{}: {e}", path.display()))))
                .ok()
        };
        let paths = [etcd_ca.clone(), etcd_cert.clone()];
        let password = read("etcd-password-file", etcd_password_file);
        let (ca, cert, key) = (read("etcd-ca", etcd_ca), read("etcd-cert", etcd_cert), read("etcd-key", etcd_key));
        let login = match (etcd_user, password) {
            (Some(user), Some(password)) => {
                let password = String::from_utf8_lossy(&password).trim_end_matches(['\r', '\n']).to_owned();
                Some(Login { user, password })
            }
            (user, password) => {
                let pair = user.is_none() && password.is_none();
                let value = if user.is_some() { "only the user" } else { "only the password file" };
                ConfigError::check(faults, pair, "etcd-user", "given together with --etcd-password-file", value);
                None
            }
        };
        let own_pair = cert.is_some() == key.is_some();
        ConfigError::check(faults, own_pair, "etcd-cert", "given together with --etcd-key", "only one of the two");
        let needless = !secure && (ca.is_some() || cert.is_some());
        ConfigError::check(faults, !needless, "etcd-ca", "omitted unless --etcd-url is https://", "given");
        ConfigError::check(faults, !secure || ca.is_some(), "etcd-ca", "given for an https:// etcd", "nothing");
        if urls.is_empty() || faults.len() > before {
            return None;
        }
        let certs = paths.into_iter().zip([&ca, &cert]);
        let expiries = certs.filter_map(|(path, pem)| Some((path?, tls::pem_expiry(pem.as_ref()?)?))).collect();
        Some(EtcdConfig {
            urls,
            prefix: etcd_prefix,
            lease: Duration::from_secs(etcd_lease_seconds.into()),
            login,
            tls: ca.map(|ca| Tls { ca, own: cert.zip(key), expiries }),
        })
    }
}

impl EtcdConfig {
    /// Prefix of the keys of all nodes.
    pub(super) fn nodes_prefix(&self) -> String {
        format!("{}/nodes/", self.prefix)
    }

    /// When the first certificate of each file expires, in seconds since 1970.
    pub fn expiries(&self) -> &[(PathBuf, i64)] {
        self.tls.as_ref().map_or(&[], |tls| &tls.expiries)
    }

    pub(super) fn connect_options(&self) -> ConnectOptions {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_keep_alive(KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT)
            // A member without a leader must return an error instead of stale data.
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if let Some(Login { user, password }) = &self.login {
            options = options.with_user(user, password);
        }
        if let Some(Tls { ca, own, expiries: _ }) = &self.tls {
            let mut tls = TlsOptions::new().ca_certificate(Certificate::from_pem(ca));
            if let Some((cert, key)) = own {
                tls = tls.identity(Identity::from_pem(cert, key));
            }
            options = options.with_tls(tls);
        }
        options
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> EtcdArgs {
        EtcdArgs {
            etcd_url: vec!["http://a:2379".into(), "http://b:2379".into()],
            etcd_prefix: "overfill".into(),
            etcd_lease_seconds: 10,
            ..EtcdArgs::default()
        }
    }

    fn flags(args: EtcdArgs) -> Vec<&'static str> {
        let mut faults = Vec::new();
        assert_eq!(args.validate(&mut faults), None);
        faults.into_iter().map(|fault| fault.flag).collect()
    }

    #[test]
    fn every_fault_is_reported() {
        assert!(args().validate(&mut Vec::new()).is_some());
        assert!(flags(EtcdArgs { etcd_url: vec![], ..args() }).is_empty());
        let bad = EtcdArgs {
            etcd_url: vec!["https://a:1".into(), "b:2".into()],
            etcd_user: Some("u".into()),
            etcd_cert: Some("/no/such/file".into()),
            etcd_prefix: "a/".into(),
            etcd_lease_seconds: 1,
            ..args()
        };
        let expected = ["etcd-url", "etcd-prefix", "etcd-lease-seconds", "etcd-cert", "etcd-user", "etcd-ca"];
        assert_eq!(flags(bad), expected);
    }

    #[test]
    fn no_secret_is_logged() {
        let file = std::env::temp_dir().join(format!("overfill-etcd-password-{}", std::process::id()));
        fs::write(&file, "hunter2\n").unwrap();
        let args = EtcdArgs { etcd_user: Some("u".into()), etcd_password_file: Some(file.clone()), ..args() };
        let config = args.validate(&mut Vec::new()).unwrap();
        fs::remove_file(file).unwrap();
        assert_eq!(config.login, Some(Login { user: "u".into(), password: "hunter2".into() }));
        assert!(!format!("{config:?}").contains("hunter2"));
    }
}
