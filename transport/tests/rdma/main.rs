//! Handoffs over an RDMA device: the KV that arrives, and what senders can't do that are late, dead, frozen or hostile.
//!
//! `cargo xtask rdma` runs these tests in a virtual machine with soft-RoCE. Elsewhere they need a device, and without one
//! they say that they are skipped; with `OVERFILL_RDMA_REQUIRED` they fail.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

mod process;
mod raw;
#[path = "../loopback/rig.rs"]
#[allow(dead_code, reason = "the tests over TCP need more of it")]
mod rig;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use overfill_kv::handoff::{Failure, HandoffState, RefuseReason};
use overfill_kv::store::{DmaBufRegion, KvRegion};
use overfill_kv::{BlockId, KvEndpoint, KvMemory, KvStore, KvTransport, ProtocolVersions, StoreError};
use overfill_transport::bench::{HandoffOptions, Shape, handoffs};
use overfill_transport::{HandoffError, KvSender, TransferConfig, TransportChoice, TransportOptions, Transports};
use rig::{Rig, Staged, failed, until};

const RDMA: TransportChoice = TransportChoice::Only(KvTransport::Rdma);

/// Transports over the system's first device. `None` if it has none, which is said.
fn open(choice: TransportChoice, store: Arc<dyn KvStore>) -> Option<Arc<Transports>> {
    match Transports::open(choice, &TransportOptions::default(), store) {
        Ok(transports) => Some(transports),
        Err(error) if std::env::var_os("OVERFILL_RDMA_REQUIRED").is_some() => panic!("{error}"),
        Err(error) => {
            eprintln!("SKIPPED: no RDMA here ({error}); cargo xtask rdma runs this test");
            None
        }
    }
}

/// A rig whose sides use these transports.
async fn rig_with(
    config: TransferConfig,
    sender: TransportChoice,
    receiver: TransportChoice,
    staged: (bool, bool),
) -> Option<Rig> {
    let mut rig = Rig::new(config.clone()).await;
    // A choice that does without a device would hide that there is none.
    open(RDMA, rig.source.clone())?;
    let wrap =
        |store: Arc<dyn KvStore>, staged| if staged { Arc::new(Staged(store)) as Arc<dyn KvStore> } else { store };
    rig.source = wrap(rig.source.clone(), staged.0);
    let target = wrap(rig.target.clone(), staged.1);
    rig.config.transports = open(receiver, target.clone())?;
    let mut rig = rig.with_target(|_| target).await;
    rig.config.transports = open(sender, rig.source.clone())?;
    Some(rig)
}

async fn rdma_rig(config: TransferConfig) -> Option<Rig> {
    rig_with(config, RDMA, RDMA, (false, false)).await
}

/// Runs one handoff, and checks what arrives.
async fn one_handoff(rig: &Rig, ticket: u8) {
    let mut incoming = rig.reserve([ticket; 16], 0);
    let (sender, sending) = rig.send([ticket; 16], 0);
    rig.announce_all(&sender);
    sender.commit(u32::from(ticket));
    assert_eq!(incoming.ready().await.unwrap().first_token, u32::from(ticket));
    sending.await.unwrap().unwrap();
    rig.check_arrived(0);
    drop(incoming);
    until("all blocks are free", || rig.is_idle()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kv_arrives_directly_or_through_staging() {
    for staged in [(false, false), (true, false), (false, true), (true, true)] {
        // Frames of one block: more pieces than the staging area has slots.
        for max_frame_bytes in [1, 1 << 20] {
            let config = TransferConfig { max_frame_bytes, ..TransferConfig::default() };
            let Some(rig) = rig_with(config, RDMA, RDMA, staged).await else { return };
            for ticket in 1..=3 {
                one_handoff(&rig, ticket).await;
            }
            assert_eq!(rig.config.transports.handoffs(KvTransport::Rdma), 3, "{staged:?}");
            assert_eq!(rig.config.transports.handoffs(KvTransport::Tcp), 0, "{staged:?}");
        }
    }
}

/// What `overfill bench handoff --kv-transport rdma` measures.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handoffs_are_measured_next_to_plain_writes() {
    let shape = Shape::of(4 << 20);
    if open(RDMA, shape.host_store()).is_none() {
        return;
    }
    let options = HandoffOptions { choice: RDMA, rounds: 1, ..HandoffOptions::default() };
    let report = handoffs(shape, shape.host_store(), shape.host_store(), &options).await.unwrap();
    assert_eq!(report.transport, KvTransport::Rdma);
    let figures = (report.bare.map(|bare| bare.bytes_per_second), report.handoff_to_bare);
    assert!(figures.0.is_some_and(|speed| speed > 0.0) && figures.1.is_some_and(|share| share > 0.0), "{report:?}");
}

/// A store whose memory is exported as a dma-buf that no device can use.
struct Exported(Arc<dyn KvStore>);

impl KvStore for Exported {
    fn num_layers(&self) -> usize {
        self.0.num_layers()
    }
    fn num_blocks(&self) -> usize {
        self.0.num_blocks()
    }
    fn block_bytes(&self) -> usize {
        self.0.block_bytes()
    }
    fn memory(&self) -> KvMemory {
        KvMemory::Device
    }
    fn read(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &[u8])) -> Result<(), StoreError> {
        self.0.read(layer, blocks, f)
    }
    fn write(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &mut [u8])) -> Result<(), StoreError> {
        self.0.write(layer, blocks, f)
    }
    #[allow(unsafe_code, reason = "a contract that is not used: no device accesses an ordinary file")]
    fn regions(&self) -> Option<Vec<KvRegion>> {
        let file = Arc::new(OwnedFd::from(std::fs::File::open("/proc/version").unwrap()));
        // SAFETY: it is no dma-buf, so no device will ever access it.
        let region = || KvRegion::DmaBuf(unsafe { DmaBufRegion::new(file.clone(), 0, 4096) });
        Some((0..self.num_layers()).map(|_| region()).collect())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_that_the_device_refuses_is_staged() {
    let mut rig = Rig::new(TransferConfig::default()).await;
    let target: Arc<dyn KvStore> = Arc::new(Exported(rig.target.clone()));
    let Some(receiver) = open(RDMA, target.clone()) else { return };
    assert!(receiver.reason().ends_with("through a staging area"), "{}", receiver.reason());
    rig.config.transports = receiver;
    let mut rig = rig.with_target(|_| target).await;
    rig.config.transports = open(RDMA, rig.source.clone()).unwrap();
    assert!(rig.config.transports.reason().ends_with("directly"), "{}", rig.config.transports.reason());
    one_handoff(&rig, 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_may_be_scattered_and_partly_held() {
    let Some(rig) = rdma_rig(TransferConfig::default()).await else { return };
    // The second allocation of the target is used, so its blocks are 5 to 9; the source's are in reverse.
    let first = rig.target_pool.allocate(5).unwrap();
    let mut incoming = rig.reserve([1; 16], 1);
    let mut plan = rig.plan([1; 16], 1);
    plan.blocks.reverse();
    let (sender, sending) = KvSender::start(plan, rig.source.clone(), rig.config.clone());
    rig.announce_all(&sender);
    sender.commit(1);
    incoming.ready().await.unwrap();
    sending.await.unwrap().unwrap();
    drop(first);
    for (wire, layer) in rig.schema.layers.iter().enumerate() {
        for block in 1..5_u32 {
            let mut expected = Vec::new();
            rig.source.read(*layer as usize, &[BlockId(4 - block)], &mut |_, bytes| expected = bytes.to_vec()).unwrap();
            rig.target.read(wire, &[BlockId(4 + block)], &mut |_, bytes| assert!(bytes == expected)).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_handoffs_at_once_do_not_mix() {
    let mut rig = Rig::with_room(TransferConfig { max_frame_bytes: 20_000, ..TransferConfig::default() }, 8).await;
    let Some(receiver) = open(RDMA, rig.target.clone()) else { return };
    rig.config.transports = receiver;
    let mut rig = rig.with_target(|target| target).await;
    rig.config.transports = open(RDMA, rig.source.clone()).unwrap();
    let handoffs: Vec<_> = (0..8u8)
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_agree_on_a_transport_or_refuse() {
    let tcp = TransportChoice::Only(KvTransport::Tcp);
    for (sender, receiver, used) in [
        (TransportChoice::Auto, TransportChoice::Auto, Some(KvTransport::Rdma)),
        (TransportChoice::Auto, RDMA, Some(KvTransport::Rdma)),
        (TransportChoice::Auto, tcp, Some(KvTransport::Tcp)),
        (tcp, TransportChoice::Auto, Some(KvTransport::Tcp)),
        (tcp, RDMA, None),
        (RDMA, tcp, None),
    ] {
        let Some(rig) = rig_with(TransferConfig::default(), sender, receiver, (false, false)).await else { return };
        match used {
            Some(used) => {
                one_handoff(&rig, 1).await;
                assert_eq!(rig.config.transports.handoffs(used), 1, "{sender} to {receiver}");
            }
            // What is asked for by name is used or refused.
            None => {
                let _incoming = rig.reserve([1; 16], 0);
                let (_sender, sending) = rig.send([1; 16], 0);
                let error = sending.await.unwrap().unwrap_err();
                assert!(matches!(error, HandoffError::Transport { .. }), "{sender} to {receiver}: {error}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_version_1_gets_frames_over_tcp() {
    let first = ProtocolVersions { oldest: 1, newest: 1 };
    for (choice, works) in [(TransportChoice::Auto, true), (RDMA, false)] {
        let Some(rig) = rig_with(TransferConfig::default(), choice, TransportChoice::Auto, (false, false)).await else {
            return;
        };
        let mut incoming = rig.reserve([1; 16], 0);
        let plan = rig.plan([1; 16], 0);
        let endpoint = KvEndpoint { versions: first, ..plan.endpoint.clone() };
        let plan = overfill_transport::SendPlan { endpoint, ..plan };
        let (sender, sending) = KvSender::start(plan, rig.source.clone(), rig.config.clone());
        rig.announce_all(&sender);
        sender.commit(1);
        if works {
            incoming.ready().await.unwrap();
            sending.await.unwrap().unwrap();
            rig.check_arrived(0);
        } else {
            let error = sending.await.unwrap().unwrap_err().to_string();
            assert!(error.contains("version 1 of the wire format, which has only tcp"), "{error}");
        }
    }
}

/// KV-1 and KV-3: a sender that never stops writing. The receiver ends it alone, and no later write changes a block.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sender_that_writes_on_is_revoked() {
    let Some(rig) = rdma_rig(TransferConfig::default()).await else { return };
    for round in 1..=3 {
        let (incoming, blocks) = rig.reserve_any([round; 16]);
        let sender = raw::Raw::accepted(&rig, [round; 16]).await;
        let writing = sender.write_until_it_fails();
        until("its writes arrive", || rig.first_byte(0, blocks[0]) == raw::WRITTEN).await;
        let begin = Instant::now();
        drop(incoming);
        until("all blocks are free", || rig.target_pool.in_use() == 0 && rig.receiver.stranded_bytes() == 0).await;
        let took = begin.elapsed();
        // Another request owns the blocks now.
        rig.fill_target(&blocks, 0x55);
        let end = writing.join().unwrap();
        rig.check_filled(&blocks, 0x55);
        println!("round {round}: blocks free after {took:?}; then {end}; late bytes: 0");
    }
}

/// KV-5: blocks that a sender changes after it has announced their checksum.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_checksum_ends_the_attempt() {
    let Some(rig) = rdma_rig(TransferConfig::default()).await else { return };
    let mut incoming = rig.reserve([1; 16], 0);
    let mut sender = raw::Raw::accepted(&rig, [1; 16]).await;
    sender.write_piece(0, 0, 1).await;
    sender.announce(0, 0, 1, true).await;
    sender.write_piece(0, 1, 1).await;
    sender.announce(0, 1, 1, false).await;
    assert_eq!(incoming.ready().await, failed(Failure::Rejected(RefuseReason::Checksum)));
    assert_eq!(sender.refusal().await, RefuseReason::Checksum);
    drop(incoming);
    until("all blocks are free", || rig.target_pool.in_use() == 0).await;
}

/// A header without its write, a write without its header, and a number that does not fit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn header_and_write_must_both_come() {
    let idle_timeout = Duration::from_millis(500);
    let Some(rig) = rdma_rig(TransferConfig { idle_timeout, ..TransferConfig::default() }).await else { return };
    let mut incoming = rig.reserve([1; 16], 0);
    let mut sender = raw::Raw::accepted(&rig, [1; 16]).await;
    sender.announce(0, 0, 1, true).await;
    assert_eq!(incoming.ready().await, failed(Failure::Idle), "only the header");
    drop(incoming);
    until("all blocks are free", || rig.target_pool.in_use() == 0).await;

    let mut incoming = rig.reserve([2; 16], 0);
    let mut sender = raw::Raw::accepted(&rig, [2; 16]).await;
    sender.write_piece(0, 0, 1).await;
    sender.commit().await;
    assert_eq!(incoming.ready().await, failed(Failure::Rejected(RefuseReason::Incomplete)), "only the write");
    drop(incoming);
    until("all blocks are free", || rig.target_pool.in_use() == 0).await;

    let mut incoming = rig.reserve([3; 16], 0);
    let mut sender = raw::Raw::accepted(&rig, [3; 16]).await;
    sender.skip_number();
    sender.write_piece(0, 0, 1).await;
    sender.announce(0, 0, 1, true).await;
    assert_eq!(incoming.ready().await, failed(Failure::Lost), "another number");
    drop(incoming);
    until("all blocks are free", || rig.target_pool.in_use() == 0).await;
}

/// KV-3: the sender's process is killed in the middle of a handoff.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_sender_frees_the_blocks() {
    let Some(rig) = rdma_rig(TransferConfig::default()).await else { return };
    let mut incoming = rig.reserve([1; 16], 0);
    let mut child = process::Sender::start(&rig, [1; 16]);
    until("kv arrives", || incoming.state() == HandoffState::Transferring).await;
    let begin = Instant::now();
    child.signal("KILL");
    assert_eq!(incoming.ready().await, failed(Failure::Lost));
    drop(incoming);
    until("all blocks are free", || rig.target_pool.in_use() == 0).await;
    println!("killed sender: blocks free after {:?}", begin.elapsed());
}

/// KV-3: the sender's process is frozen. Its device is not, so only the receiver can end its access.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_sender_frees_the_blocks_within_the_idle_timeout() {
    let idle_timeout = Duration::from_secs(1);
    let Some(rig) = rdma_rig(TransferConfig { idle_timeout, ..TransferConfig::default() }).await else { return };
    let mut incoming = rig.reserve([1; 16], 0);
    let mut child = process::Sender::start(&rig, [1; 16]);
    until("kv arrives", || incoming.state() == HandoffState::Transferring).await;
    let begin = Instant::now();
    child.signal("STOP");
    assert_eq!(incoming.ready().await, failed(Failure::Idle));
    drop(incoming);
    until("all blocks are free", || rig.target_pool.in_use() == 0).await;
    println!("frozen sender: blocks free after {:?}, with an idle timeout of {idle_timeout:?}", begin.elapsed());
    child.signal("CONT");
}
