//! Accepts the connections of senders.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use overfill_kv::handoff::RefuseReason;
use overfill_net::Listen;
use tokio_util::task::TaskTracker;

use super::link::{Link, Opening};
use super::newcomers::Newcomers;
use super::{connection, frame};
use crate::reservations::Shared;

/// Accepts connections and serves each in a task of `connections`. Never resolves.
pub(crate) async fn accept(
    shared: &Arc<Shared>,
    mut listener: impl Listen<Connection = Link>,
    connections: &TaskTracker,
) {
    let newcomers = Newcomers::new(shared.config.max_connections);
    loop {
        match listener.accept().await {
            Ok((opening, peer)) => admit(shared, &newcomers, connections, opening, peer),
            Err(error) => {
                // Usually out of file descriptors. Retrying at once would spin.
                tracing::warn!(%error, "failed to accept a kv connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

fn admit(all: &Arc<Shared>, newcomers: &Arc<Newcomers>, tasks: &TaskTracker, opening: Opening, peer: SocketAddr) {
    let Some(newcomer) = newcomers.enter() else {
        tracing::warn!(%peer, limit = all.config.max_connections, "refusing a kv connection: connection limit reached");
        let answer = frame::encode_answer(frame::Answer::Refuse(RefuseReason::Busy));
        // A direct write cannot block, since the send buffer is empty. A refused peer gets no task and no handshake.
        if let Some(Ok(stream)) = opening.now_or_never() {
            let _ = stream.write_at_once(&answer);
        }
        return;
    };
    let shared = all.clone();
    tasks.spawn(async move {
        tokio::select! {
            () = newcomer.sent_away() => tracing::debug!(%peer, "closing a kv connection without a ticket to make room"),
            () = connection::serve(&shared, opening, peer, &newcomer) => {}
        }
    });
}
