//! The router's side: all nodes that are registered, as they come and go.

use std::convert::Infallible;

use etcd_client::{EventType, GetOptions, KeyValue, WatchOptions};
use tokio::sync::watch;
use tracing::{info, warn};

use super::{
    EtcdConfig, Members, Registration,
    client::{EtcdError, Retry, call, connect},
};
use crate::Shutdown;

/// Follows the registered nodes until the shutdown begins. While etcd is away, what was known last stays.
pub fn follow(config: EtcdConfig, shutdown: &Shutdown) -> watch::Receiver<Members> {
    let (members, receiver) = watch::channel(Members::new());
    let token = shutdown.token();
    let followed = async move {
        let mut retry = Retry::new();
        loop {
            let Err(error) = Box::pin(follow_once(&config, &members, &mut retry)).await;
            retry.failed("following the nodes in etcd", &error).await;
        }
    };
    shutdown.spawn("etcd", async move {
        let _: Option<Infallible> = token.run_until_cancelled(followed).await;
    });
    receiver
}

/// Takes everything that is there, then every change from that moment on.
///
/// Whatever ends the watch (etcd gone, restarted empty, the next change compacted away), the next call begins with
/// everything again, so that no change is missed.
async fn follow_once(
    config: &EtcdConfig,
    members: &watch::Sender<Members>,
    retry: &mut Retry,
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
    loop {
        // No deadline: nothing may happen for days. A connection that has died shows by its pings.
        let change = changes.message().await?.ok_or(EtcdError::Ended("watching nodes"))?;
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

/// A key and what it says. What is no registration is none of our nodes, and is passed over.
fn parse(kv: &KeyValue) -> Option<(String, Registration)> {
    let key = String::from_utf8_lossy(kv.key()).into_owned();
    match serde_json::from_slice(kv.value()) {
        Ok(registration) => Some((key, registration)),
        Err(error) => {
            warn!(key, %error, "not a node's registration");
            None
        }
    }
}
