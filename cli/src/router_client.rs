//! The gRPC client side of what the subcommands do.

use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use overfill_proto::MAX_MESSAGE_BYTES;
use overfill_proto::v1::router_client::RouterClient;
use tonic::transport::{Channel, Endpoint};

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A client of a running router.
pub type Client = RouterClient<Channel>;

/// Which router to talk to.
#[derive(Args)]
pub struct RouterUrl {
    /// The router's gRPC address.
    #[arg(long, env = "OVERFILL_ROUTER", default_value = "http://127.0.0.1:50051")]
    pub router: String,
}

impl RouterUrl {
    /// Connects.
    pub async fn connect(&self) -> Result<Client> {
        connect(&self.router).await
    }
}

/// Connects to the router at `url`.
pub async fn connect(url: &str) -> Result<Client> {
    let channel = channel(url).await?;
    Ok(RouterClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES))
}

/// Connects to any service at `url`; `host:port` is taken as http.
pub async fn channel(url: &str) -> Result<Channel> {
    let url = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
    Endpoint::from_shared(url.clone())
        .with_context(|| format!("{url:?} is not an address"))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .connect()
        .await
        .with_context(|| format!("connecting to {url}"))
}

/// A refusal as one readable line.
pub fn refusal(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{} ({:?})", status.message(), status.code())
}
