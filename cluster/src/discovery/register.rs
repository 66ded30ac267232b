//! Node side of discovery: puts the node's key under a lease, keeps the lease alive, and registers again after a
//! failure.

use std::convert::Infallible;

use etcd_client::{Client, PutOptions};
use prometheus::IntGauge;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use super::{
    EtcdConfig, Registration,
    client::{CALL_TIMEOUT, EtcdError, Retry, call, connect},
};
use crate::metrics::unix_seconds;

/// Keep-alives sent per lease period. The lease survives two lost ones.
const SIGNS_PER_LEASE: u32 = 3;

/// Keeps the node registered until `stop` is cancelled, then revokes the lease, which deletes the registration at once.
/// Sets `last_success` to the current time whenever etcd has confirmed the registration.
pub async fn register(config: EtcdConfig, registration: Registration, stop: CancellationToken, last_success: IntGauge) {
    let mut registrar = Registrar { config, registration, held: None, retry: Retry::new(), last_success };
    let kept = async {
        loop {
            let Err(error) = Box::pin(registrar.keep()).await;
            registrar.retry.failed("registering in etcd", &error).await;
        }
    };
    let _: Option<Infallible> = stop.run_until_cancelled(kept).await;
    let Some((mut client, lease)) = registrar.held else { return };
    // If this fails, the lease expires by itself, so the failure is logged at debug level only.
    match timeout(CALL_TIMEOUT, client.lease_revoke(lease)).await {
        Ok(Ok(_)) => info!("no longer registered in etcd"),
        Ok(Err(error)) => debug!(%error, "revoking the lease failed"),
        Err(_) => debug!("revoking the lease failed: no answer"),
    }
}

struct Registrar {
    config: EtcdConfig,
    registration: Registration,
    /// The last lease granted, and the client to revoke it with.
    held: Option<(Client, i64)>,
    retry: Retry,
    last_success: IntGauge,
}

impl Registrar {
    /// Registers the node and keeps the lease alive. Returns at the first failure.
    ///
    /// Every attempt is granted a new lease, and the key moves to it. So the expiry of an older lease does not delete
    /// the key.
    async fn keep(&mut self) -> Result<Infallible, EtcdError> {
        let Self { config, registration, held, retry, last_success } = self;
        let mut client = connect(config).await?;
        let lease = call("asking for a lease", client.lease_grant(config.lease.as_secs() as i64, None)).await?.id();
        *held = Some((client.clone(), lease));
        let value = serde_json::to_string(registration)?;
        let options = PutOptions::new().with_lease(lease);
        call("registering", client.put(registration.key(config), value, Some(options))).await?;
        let (mut keeper, mut answers) = call("keeping the lease", client.lease_keep_alive(lease)).await?;
        info!(key = registration.key(config), "registered in etcd");
        retry.succeeded();
        loop {
            last_success.set(unix_seconds());
            sleep(config.lease / SIGNS_PER_LEASE).await;
            call("keeping the lease", keeper.keep_alive()).await?;
            let answer = call("keeping the lease", answers.message()).await?;
            if answer.ok_or(EtcdError::Ended("keeping the lease"))?.ttl() <= 0 {
                return Err(EtcdError::LeaseLost);
            }
        }
    }
}
