//! TLS between services and towards clients. Certificates are files, and are reloaded when the files change.
//!
//! Between services both sides present a certificate, and the cluster's CA must have signed it. Such a certificate
//! grants everything that a service may do. An open connection keeps the certificates of its handshake.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::net::TcpStream;
use tokio_rustls::{
    TlsAcceptor, TlsConnector, client, rustls,
    rustls::{
        ClientConfig, RootCertStore, ServerConfig,
        crypto::CryptoProvider,
        pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
        server::WebPkiClientVerifier,
    },
    server,
};

use crate::{ConfigError, reloaded::Reloaded};

/// TLS between the cluster's services. Either all files are set or none.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "TLS between services")]
pub struct TlsArgs {
    /// CA certificates (PEM file). Turns on mutual TLS: every service must present a certificate signed by one of these CAs.
    #[arg(long, env = "OVERFILL_TLS_CA", value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// Certificate of this service (PEM file), used as server and as client. Needs --tls-ca and --tls-key.
    #[arg(long, env = "OVERFILL_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Private key of the certificate (PEM file).
    #[arg(long, env = "OVERFILL_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Host name that all services' certificates contain [default: the host at which a service is dialled]
    #[arg(long, env = "OVERFILL_TLS_NAME", value_name = "NAME")]
    pub tls_name: Option<String>,
}

impl TlsArgs {
    /// Reads the files and adds every error to `faults`. Returns `None` if TLS is off or a setting is invalid.
    pub fn validate(self, faults: &mut Vec<ConfigError>) -> Option<Tls> {
        let Self { tls_ca, tls_cert, tls_key, tls_name } = self;
        let (ca, cert, key) = match (tls_ca, tls_cert, tls_key) {
            (Some(ca), Some(cert), Some(key)) => (ca, cert, key),
            (None, None, None) => {
                let limit = "omitted without --tls-ca";
                ConfigError::check(faults, tls_name.is_none(), "tls-name", limit, "given");
                return None;
            }
            (ca, cert, key) => {
                let given = [(ca, "--tls-ca"), (cert, "--tls-cert"), (key, "--tls-key")];
                let given: Vec<_> = given.iter().filter(|(file, _)| file.is_some()).map(|(_, flag)| *flag).collect();
                let limit = "given together with --tls-cert and --tls-key";
                faults.push(ConfigError::new("tls-ca", limit, format!("only {}", given.join(" and "))));
                return None;
            }
        };
        Tls::load(Files { ca: Some(ca), own: Some((cert, key)) }, tls_name)
            .inspect_err(|e| faults.push(ConfigError::new(e.flag(), "usable", e)))
            .ok()
    }
}

/// Why certificates can't be loaded.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file can't be read, or its content is invalid.
    #[error("{}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Flag that names the file, without dashes.
        flag: &'static str,
        /// Cause of the error.
        message: String,
    },
    /// The certificate and the key don't match, or rustls rejects them.
    #[error("{0}")]
    Rustls(#[from] rustls::Error),
    /// The CA file contains no usable CA certificate.
    #[error("{0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
    /// The name is not a valid host name or IP address.
    #[error("{0:?} is no host name")]
    Name(String),
}

impl TlsError {
    fn flag(&self) -> &'static str {
        match self {
            Self::File { flag, .. } => flag,
            Self::Rustls(_) => "tls-cert",
            Self::Verifier(_) => "tls-ca",
            Self::Name(_) => "tls-name",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Files {
    /// CA that must have signed the peer's certificate. `None`: the peer presents none.
    ca: Option<PathBuf>,
    /// Certificate and private key of this side. `None`: this side presents none.
    own: Option<(PathBuf, PathBuf)>,
}

/// TLS configuration for both directions, reloaded when its files change. Clones share it.
#[derive(Clone)]
pub struct Tls(Arc<Inner>);

struct Inner {
    files: Files,
    name: Option<ServerName<'static>>,
    configs: Reloaded<Configs>,
}

struct Configs {
    server: Option<Arc<ServerConfig>>,
    client: Option<Arc<ClientConfig>>,
    /// When the first certificate of each file expires, in seconds since 1970.
    expiries: Vec<(PathBuf, i64)>,
}

impl PartialEq for Tls {
    fn eq(&self, other: &Self) -> bool {
        (&self.0.files, &self.0.name) == (&other.0.files, &other.0.name)
    }
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.files.fmt(f)
    }
}

impl Tls {
    /// Creates a server configuration. Clients present no certificate.
    pub fn serving(cert: PathBuf, key: PathBuf) -> Result<Self, TlsError> {
        Self::load(Files { ca: None, own: Some((cert, key)) }, None)
    }

    /// Creates a client configuration. `ca` must have signed the server's certificate, which must contain `name`, or
    /// the dialled host if `name` is `None`. `own` is the client's certificate and key.
    pub fn dialling(ca: PathBuf, own: Option<(PathBuf, PathBuf)>, name: Option<String>) -> Result<Self, TlsError> {
        Self::load(Files { ca: Some(ca), own }, name)
    }

    fn load(files: Files, name: Option<String>) -> Result<Self, TlsError> {
        let name = name.map(|name| ServerName::try_from(name.clone()).map_err(|_| TlsError::Name(name))).transpose()?;
        let configs = Reloaded::new("certificates", files.paths(), files.read()?);
        Ok(Self(Arc::new(Inner { files, name, configs })))
    }

    fn configs(&self) -> Arc<Configs> {
        self.0.configs.get(|_| self.0.files.read())
    }

    /// When the first certificate of each file in use expires, in seconds since 1970.
    pub fn expiries(&self) -> Vec<(PathBuf, i64)> {
        self.configs().expiries.clone()
    }

    /// Performs the server side of the TLS handshake on an accepted connection.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<server::TlsStream<TcpStream>> {
        let config = self.configs().server.clone().ok_or_else(|| io::Error::other("TLS has no server certificate"))?;
        TlsAcceptor::from(config).accept(stream).await
    }

    /// Performs the client side of the TLS handshake on `stream`, a connection to `endpoint` (`host:port`).
    pub async fn connect(&self, endpoint: &str, stream: TcpStream) -> io::Result<client::TlsStream<TcpStream>> {
        let config =
            self.configs().client.clone().ok_or_else(|| io::Error::other("TLS has no CA to verify the server with"))?;
        let host = endpoint.rsplit_once(':').map_or(endpoint, |(host, _)| host);
        let name = match &self.0.name {
            Some(name) => name.clone(),
            None => ServerName::try_from(host.trim_matches(['[', ']']).to_owned()).map_err(io::Error::other)?,
        };
        TlsConnector::from(config).connect(name, stream).await
    }
}

impl Files {
    fn paths(&self) -> Vec<PathBuf> {
        self.ca.iter().chain(self.own.iter().flat_map(|(cert, key)| [cert, key])).cloned().collect()
    }

    fn read(&self) -> Result<Configs, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let authorities = self.ca.as_ref().map(|path| certificates(path, "tls-ca")).transpose()?;
        let own = self.own.as_ref().map(|(cert, key)| own(cert, key)).transpose()?;
        let certs = self.own.iter().map(|(cert, _)| cert).zip(own.iter().map(|(certs, _)| certs));
        let expiries = self.ca.iter().zip(&authorities).chain(certs);
        let expiries = expiries.filter_map(|(path, certs)| Some((path.clone(), expiry(certs)?))).collect();
        let roots = authorities.zip(self.ca.as_ref()).map(|(certs, path)| roots(certs, path)).transpose()?;
        let server = own.as_ref().map(|own| server_config(&provider, roots.clone(), own)).transpose()?;
        let client = roots.map(|roots| client_config(provider, roots, own)).transpose()?;
        Ok(Configs { server: server.map(Arc::new), client: client.map(Arc::new), expiries })
    }
}

type Own = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn server_config(
    provider: &Arc<CryptoProvider>,
    roots: Option<Arc<RootCertStore>>,
    (certs, key): &Own,
) -> Result<ServerConfig, TlsError> {
    let builder = ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let builder = match roots {
        Some(roots) => builder
            .with_client_cert_verifier(WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).build()?),
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_single_cert(certs.clone(), key.clone_key())?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

fn client_config(
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    own: Option<Own>,
) -> Result<ClientConfig, TlsError> {
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let builder = builder.with_root_certificates(roots);
    let mut config = match own {
        Some((certs, key)) => builder.with_client_auth_cert(certs, key)?,
        None => builder.with_no_client_auth(),
    };
    // h2 is for gRPC. The KV plane has no ALPN name and accepts any.
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

fn file_error(path: &Path, flag: &'static str, message: impl ToString) -> TlsError {
    TlsError::File { path: path.to_owned(), flag, message: message.to_string() }
}

fn certificates(path: &Path, flag: &'static str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certs = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let certs = certs.map_err(|e| file_error(path, flag, e))?;
    if certs.is_empty() {
        return Err(file_error(path, flag, "no certificate in it"));
    }
    Ok(certs)
}

/// When the first of these certificates expires, in seconds since 1970. rustls has accepted them, so all can be parsed.
fn expiry(certs: &[CertificateDer<'_>]) -> Option<i64> {
    let parsed = certs.iter().filter_map(|cert| x509_parser::parse_x509_certificate(cert).ok());
    parsed.map(|(_, cert)| cert.validity().not_after.timestamp()).min()
}

/// When the first certificate of a PEM file expires, in seconds since 1970. `None` if the file holds none.
pub(crate) fn pem_expiry(pem: &[u8]) -> Option<i64> {
    let certs: Vec<_> = CertificateDer::pem_slice_iter(pem).filter_map(Result::ok).collect();
    expiry(&certs)
}

fn roots(certs: Vec<CertificateDer<'static>>, path: &Path) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    for cert in certs {
        roots.add(cert).map_err(|e| file_error(path, "tls-ca", e))?;
    }
    Ok(Arc::new(roots))
}

fn own(cert: &Path, key: &Path) -> Result<Own, TlsError> {
    let certs = certificates(cert, "tls-cert")?;
    let key = PrivateKeyDer::from_pem_file(key).map_err(|e| file_error(key, "tls-key", e))?;
    Ok((certs, key))
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    /// A CA, and the folder for its certificate and for the certificates that it signs.
    struct Authority(tempfile::TempDir, Issuer<'static, KeyPair>);

    impl Authority {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let mut params = CertificateParams::new(Vec::new()).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let key = KeyPair::generate().unwrap();
            fs::write(folder.path().join("ca"), params.self_signed(&key).unwrap().pem()).unwrap();
            Self(folder, Issuer::new(params, key))
        }

        fn file(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn sign(&self, names: &[&str]) {
            let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
            let key = KeyPair::generate().unwrap();
            let cert = CertificateParams::new(names).unwrap().signed_by(&key, &self.1).unwrap();
            fs::write(self.file("cert"), cert.pem()).unwrap();
            fs::write(self.file("key"), key.serialize_pem()).unwrap();
        }

        fn args(&self, name: Option<&str>) -> TlsArgs {
            let [tls_ca, tls_cert, tls_key] = ["ca", "cert", "key"].map(|name| Some(self.file(name)));
            TlsArgs { tls_ca, tls_cert, tls_key, tls_name: name.map(str::to_owned) }
        }

        fn tls(&self, name: Option<&str>) -> Tls {
            self.args(name).validate(&mut Vec::new()).unwrap()
        }
    }

    /// Sends a byte to the server and back, and returns the client's error, if any. A client learns that its
    /// certificate is rejected only when it reads the reply.
    async fn exchange(server: &Tls, client: &Tls) -> io::Result<()> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let endpoint = listener.local_addr()?.to_string();
        let serving = async {
            let mut stream = server.accept(listener.accept().await?.0).await?;
            let byte = stream.read_u8().await?;
            stream.write_u8(byte).await?;
            stream.shutdown().await
        };
        let asking = async {
            let mut stream = client.connect(&endpoint, TcpStream::connect(&endpoint).await?).await?;
            stream.write_u8(7).await?;
            assert_eq!(stream.read_u8().await?, 7);
            Ok(())
        };
        tokio::join!(serving, asking).1
    }

    #[tokio::test]
    async fn only_those_of_one_authority_talk() {
        let (ours, theirs) = (Authority::new(), Authority::new());
        ours.sign(&["127.0.0.1", "node"]);
        theirs.sign(&["127.0.0.1", "node"]);
        exchange(&ours.tls(None), &ours.tls(Some("node"))).await.unwrap();
        exchange(&ours.tls(None), &ours.tls(None)).await.unwrap();
        exchange(&theirs.tls(None), &ours.tls(None)).await.unwrap_err();
        exchange(&ours.tls(None), &ours.tls(Some("other"))).await.unwrap_err();
        // The client trusts our CA but presents the certificate of another CA, or none.
        let own = Some((theirs.file("cert"), theirs.file("key")));
        exchange(&ours.tls(None), &Tls::dialling(ours.file("ca"), own, None).unwrap()).await.unwrap_err();
        let nobody = Tls::dialling(ours.file("ca"), None, None).unwrap();
        exchange(&ours.tls(None), &nobody).await.unwrap_err();
        // A server that requires no client certificate accepts the client without one.
        exchange(&Tls::serving(ours.file("cert"), ours.file("key")).unwrap(), &nobody).await.unwrap();
    }

    #[tokio::test]
    async fn changed_files_are_used_and_broken_ones_are_not() {
        let ours = Authority::new();
        ours.sign(&["127.0.0.1"]);
        let (server, client) = (ours.tls(None), ours.tls(Some("node")));
        exchange(&server, &client).await.unwrap_err();
        ours.sign(&["node"]);
        let renewed = async {
            while exchange(&server, &client).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), renewed).await.unwrap();
        fs::write(ours.file("key"), "nothing").unwrap();
        // Longer than the interval between two checks of the files.
        tokio::time::sleep(Duration::from_millis(1100)).await;
        exchange(&server, &client).await.unwrap();
    }

    #[test]
    fn the_first_certificate_of_a_file_to_expire_counts() {
        let ours = Authority::new();
        let until = |year| {
            let mut params = CertificateParams::new(vec!["a".to_owned()]).unwrap();
            params.not_after = rcgen::date_time_ymd(year, 1, 1);
            params
        };
        let key = KeyPair::generate().unwrap();
        fs::write(ours.file("key"), key.serialize_pem()).unwrap();
        let [late, early] = [2040, 2030].map(|year| until(year).signed_by(&key, &ours.1).unwrap().pem());
        fs::write(ours.file("cert"), format!("{late}{early}")).unwrap();
        let [(ca, at), (cert, first)] = ours.tls(None).expiries().try_into().unwrap();
        assert_eq!((ca, cert, first), (ours.file("ca"), ours.file("cert"), 1_893_456_000));
        assert_eq!(pem_expiry(&fs::read(ours.file("ca")).unwrap()), Some(at));
        assert_eq!(pem_expiry(b"nothing"), None);
    }

    #[test]
    fn faults_name_the_file() {
        let ours = Authority::new();
        ours.sign(&["a"]);
        let fault = |args: TlsArgs| {
            let mut faults = Vec::new();
            assert!(args.validate(&mut faults).is_none());
            faults.pop().unwrap().to_string()
        };
        let args = ours.args(None);
        assert!(
            fault(TlsArgs { tls_ca: Some(ours.file("no")), ..args.clone() }).starts_with("--tls-ca must be usable")
        );
        assert!(fault(TlsArgs { tls_cert: Some(ours.file("key")), ..args.clone() }).contains("no certificate in it"));
        assert!(fault(TlsArgs { tls_key: None, ..args.clone() }).ends_with("got only --tls-ca and --tls-cert"));
        assert!(fault(TlsArgs { tls_name: Some("a b".into()), ..args }).contains("\"a b\" is no host name"));
    }
}
