//! Tests of sender and receiver over loopback: the KV that arrives, the errors that each side reports, and that blocks
//! are freed after failures.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

mod hostile;
mod rig;
mod versions;
mod windows;

use std::time::Duration;

use overfill_kv::handoff::{Failure, HandoffState, RefuseReason};
use overfill_kv::{BlockPool, KvEndpoint, KvSchema};
use overfill_transport::{HandoffError, KvSender, TransferConfig};
use rig::{Gate, Rig, Staged, failed, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn layers_arrive_while_later_ones_are_computed() {
    let rig = Rig::new(TransferConfig::default()).await;
    // The decode node holds the first block, and uses two of the three layers.
    let mut incoming = rig.reserve([1; 16], 1);
    let (sender, sending) = rig.send([1; 16], 1);
    for chunk in [0..3, 3..5] {
        for layer in 0..3 {
            tokio::task::yield_now().await;
            sender.layers().ready(layer, chunk.clone());
        }
    }
    sender.commit(77);
    let committed = incoming.ready().await.unwrap();
    assert_eq!(committed.first_token, 77);
    assert_eq!(committed.stats.bytes, 2 * 4 * rig.block_bytes());
    assert_eq!(incoming.ready().await.unwrap(), committed, "every call has the same outcome");
    let sent = sending.await.unwrap().unwrap();
    assert_eq!(sent.bytes, committed.stats.bytes);
    assert!(sent.exposed_seconds <= sent.seconds);
    rig.check_arrived(1);

    incoming.decode_started();
    assert_eq!(incoming.state(), HandoffState::Decoding);
    incoming.finished();
    drop(incoming);
    until("all blocks are free", || rig.is_idle()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_that_cannot_be_addressed_is_staged() {
    let mut rig = Rig::new(TransferConfig { max_frame_bytes: 1, ..TransferConfig::default() }).await;
    rig.source = std::sync::Arc::new(Staged(rig.source.clone()));
    let rig = rig.with_target(|inner| std::sync::Arc::new(Staged(inner))).await;
    let mut incoming = rig.reserve([1; 16], 0);
    let (sender, sending) = rig.send([1; 16], 0);
    rig.announce_all(&sender);
    sender.commit(5);
    assert_eq!(incoming.ready().await.unwrap().first_token, 5);
    sending.await.unwrap().unwrap();
    rig.check_arrived(0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_stream_carries_kv() {
    let rig = Rig::new(TransferConfig::default()).await.with_streams().await;
    for round in 1..=3 {
        let mut incoming = rig.reserve([round; 16], 0);
        let (sender, sending) = rig.send([round; 16], 0);
        rig.announce_all(&sender);
        sender.commit(u32::from(round));
        assert_eq!(incoming.ready().await.unwrap().first_token, u32::from(round));
        sending.await.unwrap().unwrap();
        rig.check_arrived(0);
        drop(incoming);
        until("all blocks are free", || rig.is_idle()).await;
    }
    let (sender, sending) = rig.send([9; 16], 0);
    rig.announce_all(&sender);
    assert_eq!(sending.await.unwrap(), failed(Failure::Refused(RefuseReason::Ticket)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_ticket_is_refused_and_disturbs_nobody() {
    let rig = Rig::new(TransferConfig::default()).await;
    let mut incoming = rig.reserve([1; 16], 0);
    let (sender, sending) = rig.send([2; 16], 0);
    assert_eq!(sending.await.unwrap(), failed(Failure::Refused(RefuseReason::Ticket)));
    drop(sender);
    assert_eq!((rig.receiver.open_handoffs(), rig.source_pool.in_use()), (1, 0));

    let (sender, sending) = rig.send([1; 16], 0);
    rig.announce_all(&sender);
    sender.commit(3);
    assert_eq!(incoming.ready().await.unwrap().first_token, 3);
    sending.await.unwrap().unwrap();

    // The ticket is used (KV-4).
    let (_sender, sending) = rig.send([1; 16], 0);
    assert_eq!(sending.await.unwrap(), failed(Failure::Refused(RefuseReason::Ticket)));
    rig.check_arrived(0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_schema_is_refused_and_both_sides_know_why() {
    let mut rig = Rig::new(TransferConfig::default()).await;
    let mut incoming = rig.reserve([1; 16], 0);
    rig.schema = KvSchema { vocab_size: 999, ..rig.schema };
    let (_sender, sending) = rig.send([1; 16], 0);
    assert_eq!(sending.await.unwrap(), failed(Failure::Refused(RefuseReason::Schema)));
    assert_eq!(incoming.ready().await, failed(Failure::Rejected(RefuseReason::Schema)));
    drop(incoming);
    until("all blocks are free", || rig.is_idle()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropping_the_sender_without_a_commit_aborts() {
    let rig = Rig::new(TransferConfig::default()).await;
    let mut incoming = rig.reserve([1; 16], 0);
    let (sender, sending) = rig.send([1; 16], 0);
    sender.layers().ready(0, 0..5);
    until("frames arrive", || incoming.state() == HandoffState::Transferring).await;
    drop(sender);
    assert_eq!(sending.await.unwrap(), failed(Failure::Cancelled));
    assert_eq!(incoming.ready().await, failed(Failure::Lost));
    drop(incoming);
    until("all blocks are free", || rig.is_idle()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_request_stops_its_sender() {
    let rig = Rig::new(TransferConfig::default()).await;
    let incoming = rig.reserve([1; 16], 0);
    let (sender, sending) = rig.send([1; 16], 0);
    sender.layers().ready(0, 0..5);
    until("frames arrive", || incoming.state() == HandoffState::Transferring).await;
    drop(incoming);
    assert_eq!(sending.await.unwrap(), failed(Failure::Refused(RefuseReason::Cancelled)));
    until("all blocks are free", || rig.is_idle()).await;
}

/// KV-1: the request is cancelled while a write into its blocks is in progress.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_are_kept_until_the_writing_task_has_stopped() {
    let gate = Gate::default();
    let rig = Rig::new(TransferConfig::default()).await;
    let rig = rig.with_target(|inner| gate.around(inner)).await;
    gate.close();
    let incoming = rig.reserve([1; 16], 0);
    let (sender, sending) = rig.send([1; 16], 0);
    sender.layers().ready(0, 0..5);
    until("a write is under way", || gate.is_held()).await;
    drop(incoming);
    assert!(rig.target_pool.in_use() > 0);
    assert!(rig.receiver.stranded_bytes() > 0);
    assert_eq!(rig.receiver.open_handoffs(), 0);
    gate.open();
    until("all blocks are free", || rig.is_idle() && rig.receiver.stranded_bytes() == 0).await;
    assert!(sending.await.unwrap().is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plan_that_is_broken_fails_at_once() {
    let rig = Rig::new(TransferConfig::default()).await;
    let (sender, sending) = rig.send([1; 16], 0);
    sender.layers().ready(0, 0..5);
    sender.commit(1);
    assert!(matches!(sending.await.unwrap(), Err(HandoffError::Failed(Failure::Plan(_) | Failure::Refused(_)))));

    let mut plan = rig.plan([2; 16], 0);
    plan.blocks.pop();
    let (_sender, sending) = KvSender::start(plan, rig.source.clone(), TransferConfig::default());
    assert!(matches!(sending.await.unwrap(), Err(HandoffError::Plan { field: "blocks", .. })));

    let lease = BlockPool::new(9).allocate(2).unwrap();
    let mut incoming = rig.reserve_with([3; 16], 0, lease, Duration::from_secs(5));
    assert!(matches!(incoming.ready().await, Err(HandoffError::Plan { field: "lease", .. })));
    until("all blocks are free", || rig.is_idle()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_pieces_than_planned_fail_the_handoff() {
    let rig = Rig::new(TransferConfig::default()).await;
    let mut plan = rig.plan([1; 16], 0);
    plan.max_pieces = 1;
    plan.endpoint = KvEndpoint::new("192.0.2.1:9".into());
    let (sender, sending) = KvSender::start(plan, rig.source.clone(), TransferConfig::default());
    for block in 0..5 {
        sender.layers().ready(0, block..block + 1);
    }
    assert!(matches!(
        sending.await.unwrap(),
        Err(HandoffError::Failed(Failure::Plan(_)) | HandoffError::Connection { .. })
    ));
    until("all blocks are free", || rig.source_pool.in_use() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_listens() {
    let rig = Rig::new(TransferConfig::default()).await;
    let unused = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let mut plan = rig.plan([1; 16], 0);
    plan.endpoint = KvEndpoint::new(unused.to_string());
    let (_sender, sending) = KvSender::start(plan, rig.source.clone(), TransferConfig::default());
    let error = sending.await.unwrap().unwrap_err();
    assert!(error.to_string().starts_with(&format!("kv connection to {unused}: ")), "{error}");
    until("all blocks are free", || rig.is_idle()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_comes_before_the_deadline() {
    let rig = Rig::new(TransferConfig::default()).await;
    let lease = rig.target_pool.allocate(5).unwrap();
    let mut incoming = rig.reserve_with([1; 16], 0, lease, Duration::from_millis(20));
    // The listener's task frees the blocks even if no task waits for the outcome.
    until("all blocks are free", || rig.is_idle()).await;
    assert_eq!(incoming.ready().await, failed(Failure::Deadline));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_waits_for_what_is_under_way() {
    let mut rig = Rig::new(TransferConfig::default()).await;
    let mut incoming = rig.reserve([1; 16], 0);
    rig.shutdown.cancel();
    let (sender, sending) = rig.send([1; 16], 0);
    rig.announce_all(&sender);
    sender.commit(8);
    assert_eq!(incoming.ready().await.unwrap().first_token, 8);
    sending.await.unwrap().unwrap();
    tokio::time::timeout(Duration::from_secs(20), &mut rig.serving).await.unwrap().unwrap();
    let mut late = rig.reserve([2; 16], 0);
    assert_eq!(late.ready().await, failed(Failure::Cancelled));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_handoffs_at_once_do_not_mix() {
    let rig = Rig::with_room(TransferConfig { max_frame_bytes: 20_000, ..TransferConfig::default() }, 16).await;
    let handoffs: Vec<_> = (0..16u8)
        .map(|i| {
            let (incoming, blocks) = rig.reserve_any([i; 16]);
            let (sender, sending) = rig.send([i; 16], 0);
            rig.announce_all(&sender);
            sender.commit(u32::from(i));
            (u32::from(i), incoming, blocks, sending)
        })
        .collect();
    for (first_token, mut incoming, blocks, sending) in handoffs {
        assert_eq!(incoming.ready().await.unwrap().first_token, first_token);
        sending.await.unwrap().unwrap();
        rig.check_blocks(&blocks, 0);
    }
    until("all blocks are free", || rig.is_idle()).await;
}
