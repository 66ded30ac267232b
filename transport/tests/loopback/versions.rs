//! Nodes of different versions, and what a hello of version 2 offers.

use overfill_kv::handoff::{Failure, RefuseReason};
use overfill_kv::{KvEndpoint, KvTransport, PROTOCOL, ProtocolVersions, TransportSet};
use overfill_transport::tcp::frame::Answer;
use overfill_transport::tcp::hello::{self, Offer};
use overfill_transport::{HandoffError, KvSender, SendPlan, TransferConfig};

use crate::hostile::Raw;
use crate::rig::{Rig, until};

fn plan_for(rig: &Rig, versions: ProtocolVersions) -> SendPlan {
    let plan = rig.plan([1; 16], 0);
    SendPlan { endpoint: KvEndpoint { versions, ..plan.endpoint.clone() }, ..plan }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_of_version_1_gets_frames_of_version_1() {
    let rig = Rig::new(TransferConfig::default()).await;
    let mut incoming = rig.reserve([1; 16], 0);
    let plan = plan_for(&rig, ProtocolVersions::UNSTATED);
    let (sender, sending) = KvSender::start(plan, rig.source.clone(), rig.config.clone());
    rig.announce_all(&sender);
    sender.commit(3);
    assert_eq!(incoming.ready().await.unwrap().first_token, 3);
    sending.await.unwrap().unwrap();
    rig.check_arrived(0);
    assert_eq!(
        rig.config.transports.handoffs(KvTransport::Tcp),
        2,
        "counted on both sides, which share the counter here"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_common_version_both_are_named() {
    let rig = Rig::new(TransferConfig::default()).await;
    let later = ProtocolVersions { oldest: 7, newest: 9 };
    let (_sender, sending) = KvSender::start(plan_for(&rig, later), rig.source.clone(), rig.config.clone());
    let error = sending.await.unwrap().unwrap_err();
    assert!(matches!(error, HandoffError::Versions { ours: PROTOCOL, theirs, .. } if theirs == later));
    assert!(
        error.to_string().contains(&format!("speaks {PROTOCOL}")) && error.to_string().contains("speaks 7 to 9"),
        "{error}"
    );

    // A sender of that version learns the receiver's.
    let _incoming = rig.reserve([2; 16], 0);
    let mut raw = Raw::connect(&rig).await;
    raw.send(&hello::encode(&Offer { versions: later, ..offer(&rig) })).await;
    assert_eq!(raw.answer().await, Some(Answer::RefuseVersion(PROTOCOL)));
    // A sender that knows more, but this version too, is accepted.
    let newer = ProtocolVersions { oldest: 2, newest: 9 };
    let mut raw = Raw::connect(&rig).await;
    raw.send(&hello::encode(&Offer { versions: newer, ..offer(&rig) })).await;
    assert_eq!(raw.answer().await, Some(Answer::Accepted));
}

pub fn offer(rig: &Rig) -> Offer {
    Offer::new(rig.hello([2; 16]), TransportSet::of(&[KvTransport::Tcp]), None, None)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_receiver_does_not_have_is_refused_by_reason() {
    let rig = Rig::new(TransferConfig::default()).await;
    let mut incoming = rig.reserve([2; 16], 0);
    for (offer, reason) in [
        (Offer { rank: (1, 2), ..offer(&rig) }, RefuseReason::Writers),
        (
            Offer { transports: TransportSet::of(&[KvTransport::Rdma, KvTransport::Nccl]), ..offer(&rig) },
            RefuseReason::Transport,
        ),
        (Offer { sums: 0x80, ..offer(&rig) }, RefuseReason::Version),
    ] {
        let mut raw = Raw::connect(&rig).await;
        raw.send(&hello::encode(&offer)).await;
        assert_eq!(raw.answer().await, Some(Answer::Refuse(reason)));
    }
    // The attempt is still open: another sender may have what it needs.
    let (sender, sending) = rig.send([2; 16], 0);
    rig.announce_all(&sender);
    sender.commit(4);
    assert_eq!(incoming.ready().await.unwrap().first_token, 4);
    sending.await.unwrap().unwrap();
}

/// A receiver that refuses the version of a sender that did not know it: its endpoint may be of an earlier process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_by_version_names_the_receivers() {
    let rig = Rig::new(TransferConfig::default()).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut plan = rig.plan([1; 16], 0);
    plan.endpoint = KvEndpoint::new(listener.local_addr().unwrap().to_string());
    let theirs = ProtocolVersions { oldest: 5, newest: 6 };
    let receiver = tokio::spawn(async move {
        let mut raw = Raw(listener.accept().await.unwrap().0);
        raw.send(&overfill_transport::tcp::frame::encode_answer(Answer::RefuseVersion(theirs))).await;
        raw.closed().await;
    });
    let (sender, sending) = KvSender::start(plan, rig.source.clone(), rig.config.clone());
    let error = sending.await.unwrap().unwrap_err();
    assert!(matches!(error, HandoffError::Versions { theirs: named, .. } if named == theirs), "{error}");
    assert_ne!(error, HandoffError::Failed(Failure::Lost));
    drop(sender);
    receiver.await.unwrap();
    until("all blocks are free", || rig.source_pool.in_use() == 0).await;
}
