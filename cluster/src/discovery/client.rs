//! etcd calls with a time limit, and retries with exponential backoff.

use std::time::Duration;

use etcd_client::Client;
use rand::Rng as _;
use tokio::time::timeout;
use tracing::warn;

use super::EtcdConfig;

/// Time limit of one etcd call.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(3);
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// Why an etcd operation failed. All of these are retried.
#[derive(Debug, thiserror::Error)]
pub(super) enum EtcdError {
    #[error("{0}")]
    Etcd(#[from] etcd_client::Error),
    #[error("encoding the registration: {0}")]
    Encode(#[from] serde_json::Error),
    #[error("{what}: no answer within {} s", CALL_TIMEOUT.as_secs())]
    Timeout { what: &'static str },
    #[error("the lease has expired")]
    LeaseLost,
    #[error("{0}: the stream has ended")]
    Ended(&'static str),
    #[error("the watch was cancelled: {0}")]
    Cancelled(String),
}

/// Awaits `answer` for at most [`CALL_TIMEOUT`]. `what` names the call in the timeout error.
pub(super) async fn call<T>(
    what: &'static str,
    answer: impl Future<Output = Result<T, etcd_client::Error>>,
) -> Result<T, EtcdError> {
    Ok(timeout(CALL_TIMEOUT, answer).await.map_err(|_| EtcdError::Timeout { what })??)
}

pub(super) async fn connect(config: &EtcdConfig) -> Result<Client, EtcdError> {
    call("connecting", Client::connect(config.urls.clone(), Some(config.connect_options()))).await
}

/// Retry state: exponential backoff with jitter. Only the first failure of a series is logged.
#[derive(Debug)]
pub(super) struct Retry {
    pause: Duration,
    failing: bool,
}

impl Retry {
    pub(super) fn new() -> Self {
        Self { pause: BACKOFF_MIN, failing: false }
    }

    /// Resets the backoff and ends the series of failures.
    pub(super) fn succeeded(&mut self) {
        *self = Self::new();
    }

    /// Records a failure of `doing`, then sleeps until the next attempt is due.
    pub(super) async fn failed(&mut self, doing: &'static str, error: &EtcdError) {
        if !std::mem::replace(&mut self.failing, true) {
            warn!(%error, "{doing} failed; retrying until it succeeds");
        }
        let jitter: f64 = rand::rng().random_range(0.5..1.0);
        tokio::time::sleep(self.pause.mul_f64(jitter)).await;
        self.pause = (self.pause * 2).min(BACKOFF_MAX);
    }
}
