//! Layers with sliding windows: what no decode step attends to is not sent.

use overfill_kv::handoff::{Failure, RefuseReason};
use overfill_kv::protocol::WINDOWS;
use overfill_kv::{KvEndpoint, ProtocolVersions};
use overfill_transport::tcp::frame::{Answer, encode_hello};
use overfill_transport::tcp::hello::{self, Offer};
use overfill_transport::{HandoffError, KvSender, SendPlan, TransferConfig};

use crate::hostile::Raw;
use crate::rig::{Rig, failed, until};
use crate::versions::offer;

/// The first decode step feeds position 70. With a window of 20 tokens it sees positions from 51 on, in the last two blocks.
const SHORT: usize = 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_behind_a_window_are_not_sent() {
    for (windows, held, blocks) in [
        ([Some(SHORT), None], 0, 2 + 5),
        ([Some(SHORT), None], 4, 1 + 1),
        ([Some(1), Some(SHORT)], 3, 1 + 2),
        ([Some(71), Some(1000)], 0, 5 + 5),
    ] {
        let rig = Rig::with_windows(TransferConfig::default(), windows).await;
        let mut incoming = rig.reserve([1; 16], held);
        let (sender, sending) = rig.send([1; 16], held);
        for chunk in [0..2, 2..4, 4..5] {
            (0..3).for_each(|layer| sender.layers().ready(layer, chunk.clone()));
        }
        sender.commit(6);
        let committed = incoming.ready().await.unwrap();
        assert_eq!(committed.stats.bytes, blocks * rig.block_bytes(), "{windows:?}, {held} held");
        assert_eq!(sending.await.unwrap().unwrap().bytes, committed.stats.bytes);
        rig.check_arrived(held);
        drop(incoming);
        until("all blocks are free", || rig.is_idle()).await;
    }
}

/// A sender that leaves out less or more than the receiver expects would be refused at its first frame, or at the commit. The
/// schema says it before anything is sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_sides_have_the_same_windows() {
    let rig = Rig::with_windows(TransferConfig::default(), [Some(SHORT), None]).await;
    let other = Rig::with_windows(TransferConfig::default(), [Some(SHORT + 16), None]).await;
    let _incoming = rig.reserve([1; 16], 0);
    let plan = SendPlan { schema: other.schema, ..rig.plan([1; 16], 0) };
    let (_sender, sending) = KvSender::start(plan, rig.source.clone(), rig.config.clone());
    assert_eq!(sending.await.unwrap(), failed(Failure::Refused(RefuseReason::Schema)));
}

/// Nodes of an earlier release send all blocks, and wait for all blocks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_of_earlier_versions_are_kept_apart() {
    let rig = Rig::with_windows(TransferConfig::default(), [Some(SHORT), None]).await;
    let ours = rig.schema.protocol();
    let theirs = ProtocolVersions { oldest: 1, newest: WINDOWS - 1 };
    let plan = rig.plan([1; 16], 0);
    let plan = SendPlan { endpoint: KvEndpoint { versions: theirs, ..plan.endpoint.clone() }, ..plan };
    let (_sender, sending) = KvSender::start(plan, rig.source.clone(), rig.config.clone());
    let error = sending.await.unwrap().unwrap_err();
    assert!(matches!(error, HandoffError::Versions { ours: named, .. } if named == ours), "{error}");

    let incoming = rig.reserve([2; 16], 0);
    for first in [hello::encode(&Offer { versions: theirs, ..offer(&rig) }), encode_hello(&rig.hello([2; 16])).to_vec()]
    {
        let mut raw = Raw::connect(&rig).await;
        raw.send(&first).await;
        assert_eq!(raw.answer().await, Some(Answer::RefuseVersion(ours)));
    }
    // The attempt waits for a sender that knows what is due.
    assert!(incoming.state().is_open());
}
