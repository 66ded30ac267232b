//! The gRPC client that the subcommands use.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use overfill_cluster::{Tls, net};
use overfill_proto::MAX_MESSAGE_BYTES;
use overfill_proto::v1::router_client::RouterClient;
use tonic::metadata::{AsciiMetadataValue, MetadataValue};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A client of a running router.
pub type Client = RouterClient<InterceptedService<Channel, WithKey>>;

/// Which router to talk to, and how.
#[derive(Args)]
#[command(next_help_heading = "Connection")]
pub struct RouterUrl {
    /// URL of the router's gRPC API.
    #[arg(long, env = "OVERFILL_ROUTER", default_value = "http://127.0.0.1:50051", value_name = "URL")]
    pub router: String,
    /// API key of the client.
    #[command(flatten)]
    pub key: ApiKey,
    /// TLS, for URLs that begin with https://.
    #[command(flatten)]
    pub tls: ClientTls,
}

/// API key of the client.
#[derive(Args, Default)]
pub struct ApiKey {
    /// File with the API key. OVERFILL_API_KEY may hold the key itself instead.
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
}

impl ApiKey {
    /// The value of the `authorization` header, if there is a key.
    pub fn authorization(&self) -> Result<Option<String>> {
        let key = match &self.api_key_file {
            Some(path) => {
                let key = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
                Some(key.trim().to_owned())
            }
            None => std::env::var("OVERFILL_API_KEY").ok(),
        };
        Ok(key.map(|key| format!("Bearer {key}")))
    }
}

/// Connects to the router at `url` without TLS settings or an API key.
pub async fn connect(url: &str) -> Result<Client> {
    RouterUrl { router: url.to_owned(), key: ApiKey::default(), tls: ClientTls::default() }.connect().await
}

/// Connects to any service at `url` without further settings.
pub async fn channel(url: &str) -> Result<Channel> {
    ClientTls::default().channel(url).await
}

/// Certificates of a client.
#[derive(Args, Default)]
pub struct ClientTls {
    /// CA certificates (PEM file). The server's certificate must be signed by one of them. Needed for https:// URLs.
    #[arg(long, env = "OVERFILL_TLS_CA", value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// Client certificate (PEM file). Nodes that use TLS require one.
    #[arg(long, env = "OVERFILL_TLS_CERT", requires = "tls_key", value_name = "FILE")]
    tls_cert: Option<PathBuf>,
    /// Private key of the client certificate (PEM file).
    #[arg(long, env = "OVERFILL_TLS_KEY", requires = "tls_cert", value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// Host name expected in the server's certificate [default: the host in the URL]
    #[arg(long, env = "OVERFILL_TLS_NAME", value_name = "NAME")]
    tls_name: Option<String>,
}

/// Adds the API key to every call.
#[derive(Clone)]
pub struct WithKey(Option<AsciiMetadataValue>);

impl tonic::service::Interceptor for WithKey {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

impl RouterUrl {
    /// Connects.
    pub async fn connect(&self) -> Result<Client> {
        let channel = self.tls.channel(&self.router).await?;
        let client = RouterClient::with_interceptor(channel, WithKey(self.authorization()?));
        Ok(client.max_decoding_message_size(MAX_MESSAGE_BYTES))
    }

    fn authorization(&self) -> Result<Option<AsciiMetadataValue>> {
        let Some(value) = self.key.authorization()? else { return Ok(None) };
        let mut value: AsciiMetadataValue =
            MetadataValue::try_from(value).context("the API key must consist of printable characters")?;
        value.set_sensitive(true);
        Ok(Some(value))
    }
}

impl ClientTls {
    /// Connects to any service at `url`. `host:port` means http.
    pub async fn channel(&self, url: &str) -> Result<Channel> {
        let url = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let tls = match (url.starts_with("https://"), &self.tls_ca) {
            (false, _) => None,
            (true, Some(ca)) => {
                let own = self.tls_cert.clone().zip(self.tls_key.clone());
                Some(Tls::dialling(ca.clone(), own, self.tls_name.clone())?)
            }
            (true, None) => bail!("{url} needs --tls-ca: the CA that signed the server's certificate"),
        };
        let connecting =
            net::channel(&net::tcp_dialer(tls), &url, |endpoint| endpoint.connect_timeout(CONNECT_TIMEOUT)).await;
        connecting.with_context(|| format!("connecting to {url}"))
    }
}

/// A gRPC error as one readable line.
pub fn refusal(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{} ({:?})", status.message(), status.code())
}
