//! Router side of discovery: watches the registered nodes.

use std::{convert::Infallible, time::Duration};

use etcd_client::{EventType, GetOptions, KeyValue, WatchOptions};
use prometheus::IntGauge;
use tokio::{sync::watch, time::interval};
use tracing::{info, warn};

use super::{
    EtcdConfig, Members, Registration,
    client::{EtcdError, Retry, call, connect},
};
use crate::{Shutdown, metrics::unix_seconds};

/// Interval at which a watch that stands counts as a success.
const SIGN_INTERVAL: Duration = Duration::from_secs(1);

/// Watches the registered nodes until the shutdown begins. While etcd is unreachable, the last known nodes stay in the
/// channel. `last_success` is set to the current time while the watch stands.
pub fn follow(config: EtcdConfig, shutdown: &Shutdown, last_success: IntGauge) -> watch::Receiver<Members> {
    let (members, receiver) = watch::channel(Members::new());
    let token = shutdown.token();
    let followed = async move {
        let mut retry = Retry::new();
        loop {
            let Err(error) = Box::pin(follow_once(&config, &members, &mut retry, &last_success)).await;
            retry.failed("following the nodes in etcd", &error).await;
        }
    };
    shutdown.spawn("etcd", async move {
        let _: Option<Infallible> = token.run_until_cancelled(followed).await;
    });
    receiver
}

/// Lists all nodes, then watches every change after the listed revision. Returns when the watch fails.
///
/// The next call lists all nodes again. So no change is missed if etcd stopped, restarted empty, or compacted the next
/// revision.
async fn follow_once(
    config: &EtcdConfig,
    members: &watch::Sender<Members>,
    retry: &mut Retry,
    last_success: &IntGauge,
) -> Result<Infallible, EtcdError> {
    let mut client = connect(config).await?;
    let prefix = config.nodes_prefix();
    let all = call("listing nodes", client.get(prefix.clone(), Some(GetOptions::new().with_prefix()))).await?;
    let next = all.header().map_or(0, |header| header.revision()) + 1;
    let listed: Members = all.kvs().iter().filter_map(parse).collect();
    let options = WatchOptions::new().with_prefix().with_start_revision(next);
    let mut changes = call("watching nodes", client.watch(prefix, Some(options))).await?;
    info!(nodes = listed.len(), "following the nodes in etcd");
    members.send_if_modified(|last| {
        *last != listed && {
            *last = listed;
            true
        }
    });
    retry.succeeded();
    let mut turn = interval(SIGN_INTERVAL);
    loop {
        // No time limit: there may be no change for days. HTTP/2 pings detect a dead connection.
        let change = tokio::select! {
            change = changes.message() => change?.ok_or(EtcdError::Ended("watching nodes"))?,
            _ = turn.tick() => {
                last_success.set(unix_seconds());
                continue;
            }
        };
        if change.canceled() {
            return Err(EtcdError::Cancelled(change.cancel_reason().to_owned()));
        }
        members.send_if_modified(|members| {
            let mut changed = false;
            for event in change.events() {
                let Some(kv) = event.kv() else { continue };
                changed |= match event.event_type() {
                    EventType::Delete => members.remove(&*String::from_utf8_lossy(kv.key())).is_some(),
                    EventType::Put => match parse(kv) {
                        Some((key, registration)) => {
                            members.insert(key, registration.clone()).as_ref() != Some(&registration)
                        }
                        None => false,
                    },
                };
            }
            changed
        });
    }
}

/// Parses a key and its registration. A value that is no registration is logged and skipped.
fn parse(kv: &KeyValue) -> Option<(String, Registration)> {
    let key = String::from_utf8_lossy(kv.key()).into_owned();
    match serde_json::from_slice(kv.value()) {
        Ok(registration) => Some((key, registration)),
        Err(error) => {
            warn!(key, %error, "ignoring an etcd key that holds no valid node registration");
            None
        }
    }
}
