//! The node's side: a key under a lease, kept alive, put again whenever it may have been lost.

use std::convert::Infallible;

use etcd_client::{Client, PutOptions};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use super::{
    EtcdConfig, Registration,
    client::{CALL_TIMEOUT, EtcdError, Retry, call, connect},
};

/// Signs of life per lease: two may get lost.
const SIGNS_PER_LEASE: u32 = 3;

/// Keeps the node registered until `stop`, then takes it out at once.
pub async fn register(config: EtcdConfig, registration: Registration, stop: CancellationToken) {
    let mut registrar = Registrar { config, registration, held: None, retry: Retry::new() };
    let kept = async {
        loop {
            let Err(error) = Box::pin(registrar.keep()).await;
            registrar.retry.failed("registering in etcd", &error).await;
        }
    };
    let _: Option<Infallible> = stop.run_until_cancelled(kept).await;
    let Some((mut client, lease)) = registrar.held else { return };
    // Without it the lease would say the same a little later.
    match timeout(CALL_TIMEOUT, client.lease_revoke(lease)).await {
        Ok(Ok(_)) => info!("no longer registered in etcd"),
        Ok(Err(error)) => debug!(%error, "revoking the lease"),
        Err(_) => debug!("revoking the lease: no answer"),
    }
}

struct Registrar {
    config: EtcdConfig,
    registration: Registration,
    /// The lease last granted, and who to tell that it is not needed any more.
    held: Option<(Client, i64)>,
    retry: Retry,
}

impl Registrar {
    /// Registers, and stays registered for as long as etcd agrees.
    ///
    /// Every try takes a lease of its own. The key goes over to it, so that an older lease that expires takes nothing
    /// with it.
    async fn keep(&mut self) -> Result<Infallible, EtcdError> {
        let Self { config, registration, held, retry } = self;
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
            sleep(config.lease / SIGNS_PER_LEASE).await;
            call("keeping the lease", keeper.keep_alive()).await?;
            let answer = call("keeping the lease", answers.message()).await?;
            if answer.ok_or(EtcdError::Ended("keeping the lease"))?.ttl() <= 0 {
                return Err(EtcdError::LeaseLost);
            }
        }
    }
}
