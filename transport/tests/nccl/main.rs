//! Handoffs over NCCL: on a GPU, or on the software GPU with its double of NCCL. On a real one, both sides of a handoff share it, which
//! NCCL allows with `NCCL_MULTI_RANK_GPU_ENABLE=1`.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

#[path = "../loopback/rig.rs"]
#[allow(dead_code, reason = "the tests over TCP need more of it")]
mod rig;
mod store;

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use overfill_kv::{BlockId, BlockLease, KvStore, KvTransport};
use overfill_transport::nccl::NcclOptions;
use overfill_transport::{HandoffError, TransferConfig, TransportChoice, TransportOptions, Transports};
use rig::{Rig, until};
use store::{GpuStore, has_gpu};

const NCCL: TransportChoice = TransportChoice::Only(KvTransport::Nccl);
/// One block, so that an attempt has many pieces.
const ONE_BLOCK: usize = 1;
/// A whole layer.
const LAYER: usize = 1 << 20;

fn open(piece_bytes: usize, store: &Arc<dyn KvStore>) -> Arc<Transports> {
    let [join_timeout, piece_timeout, abort_timeout] = [Duration::from_secs(2); 3];
    let nccl = NcclOptions { piece_bytes, join_timeout, piece_timeout, abort_timeout, ..NcclOptions::default() };
    Transports::open(NCCL, &TransportOptions { nccl, ..TransportOptions::default() }, store.clone()).unwrap()
}

/// A rig whose stores are on a GPU. `None` if there is none.
async fn gpu_rig(piece_bytes: usize, requests: usize) -> Option<Rig> {
    if !has_gpu() {
        return None;
    }
    let mut rig = Rig::with_room(TransferConfig::default(), requests).await;
    rig.source = GpuStore::like(&*rig.source);
    let target = GpuStore::like(&*rig.target);
    rig.config.transports = open(piece_bytes, &target);
    let mut rig = rig.with_target(|_| target).await;
    rig.config.transports = open(piece_bytes, &rig.source);
    Some(rig)
}

/// Runs one handoff, and checks what arrives.
async fn hand_over(rig: &Rig, ticket: u8) {
    let (mut incoming, blocks) = rig.reserve_any([ticket; 16]);
    let (sender, sending) = rig.send([ticket; 16], 0);
    rig.announce_all(&sender);
    sender.commit(u32::from(ticket));
    assert_eq!(incoming.ready().await.unwrap().first_token, u32::from(ticket));
    sending.await.unwrap().unwrap();
    rig.check_blocks(&blocks, 0);
}

async fn one_handoff(rig: &Rig, ticket: u8) {
    hand_over(rig, ticket).await;
    until("all blocks are free", || rig.is_idle()).await;
}

/// Blocks of an attempt that has ended. Another request owns them now.
struct Reused {
    leases: Vec<BlockLease>,
}

impl Reused {
    const MARK: u8 = 0x55;

    fn mark(rig: &Rig, blocks: &[BlockId]) -> Self {
        let mut leases: Vec<_> = std::iter::from_fn(|| rig.target_pool.allocate(1).ok()).collect();
        leases.retain(|lease| blocks.contains(&lease.blocks()[0]));
        assert_eq!(leases.len(), blocks.len(), "all blocks are free");
        for layer in 0..rig.target.num_layers() {
            rig.target.write(layer, blocks, &mut |_, bytes| bytes.fill(Self::MARK)).unwrap();
        }
        Self { leases }
    }

    /// Nothing came late. A later handoff over the same communicator ends after everything that was posted before it.
    async fn check(self, rig: &Rig, ticket: u8) {
        hand_over(rig, ticket).await;
        for lease in &self.leases {
            for layer in 0..rig.target.num_layers() {
                let check = &mut |_: usize, bytes: &[u8]| assert!(bytes.iter().all(|byte| *byte == Self::MARK));
                rig.target.read(layer, lease.blocks(), check).unwrap();
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kv_arrives() {
    for piece_bytes in [ONE_BLOCK, LAYER] {
        let Some(rig) = gpu_rig(piece_bytes, 2).await else { return };
        for ticket in 1..=3 {
            one_handoff(&rig, ticket).await;
        }
        assert_eq!(rig.config.transports.handoffs(KvTransport::Nccl), 3);
        assert_eq!(rig.config.transports.handoffs(KvTransport::Tcp), 0);
    }
}

/// Two senders and two receivers, each with handoffs to both others at once. A wrong order of sends or receives stops them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_handoffs_at_once_do_not_mix() {
    let (Some(first), Some(second)) = (gpu_rig(ONE_BLOCK, 8).await, gpu_rig(ONE_BLOCK, 8).await) else { return };
    let mut handoffs = Vec::new();
    for i in 0..8_u8 {
        for (to, from) in [(&first, &first), (&second, &first), (&first, &second), (&second, &second)] {
            if handoffs.len() >= 16 {
                continue;
            }
            let ticket = [handoffs.len() as u8 + 1; 16];
            let (incoming, blocks) = to.reserve_any(ticket);
            let mut plan = from.plan(ticket, 0);
            plan.endpoint = overfill_kv::KvEndpoint::new(to.endpoint.clone());
            let (sender, sending) = overfill_transport::KvSender::start(plan, from.source.clone(), from.config.clone());
            from.announce_all(&sender);
            sender.commit(u32::from(i));
            handoffs.push((u32::from(i), incoming, to, blocks, sending));
        }
    }
    for (first_token, mut incoming, to, blocks, sending) in handoffs {
        assert_eq!(incoming.ready().await.unwrap().first_token, first_token);
        sending.await.unwrap().unwrap();
        to.check_blocks(&blocks, 0);
    }
    until("all blocks are free", || first.is_idle() && second.is_idle()).await;
}

/// KV-1: what is posted ends, then the blocks are free, and nothing comes later. The communicator goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_request_ends_what_is_posted() {
    let Some(rig) = gpu_rig(ONE_BLOCK, 2).await else { return };
    one_handoff(&rig, 99).await;
    for round in 1..=8 {
        let (incoming, blocks) = rig.reserve_any([round; 16]);
        let (sender, sending) = rig.send([round; 16], 0);
        rig.announce_all(&sender);
        // At different moments.
        tokio::time::sleep(Duration::from_micros(u64::from(round) * 700)).await;
        drop(incoming);
        until("the receiver's blocks are free", || rig.target_pool.in_use() == 0).await;
        let reused = Reused::mark(&rig, &blocks);
        assert!(sending.await.unwrap().is_err());
        drop(sender);
        reused.check(&rig, 100 + round).await;
        until("all blocks are free", || rig.is_idle()).await;
    }
    assert_eq!(rig.config.transports.communicators(), 1);
}

/// The first handoff of two nodes is cancelled while they join. The next one finds the communicator.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_is_cancelled_early_leaves_the_communicator() {
    let Some(rig) = gpu_rig(ONE_BLOCK, 2).await else { return };
    for round in 1..=4 {
        let (incoming, _) = rig.reserve_any([round; 16]);
        let (sender, sending) = rig.send([round; 16], 0);
        rig.announce_all(&sender);
        until("the sender joins", || rig.config.transports.communicators() == 1).await;
        drop(incoming);
        assert!(sending.await.unwrap().is_err());
        drop(sender);
        until("all blocks are free", || rig.is_idle()).await;
    }
    one_handoff(&rig, 99).await;
    assert_eq!(rig.config.transports.communicators(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sender_that_gives_up_ends_what_is_posted() {
    let Some(rig) = gpu_rig(ONE_BLOCK, 2).await else { return };
    one_handoff(&rig, 99).await;
    for round in 1..=8 {
        let (mut incoming, blocks) = rig.reserve_any([round; 16]);
        let (sender, sending) = rig.send([round; 16], 0);
        rig.announce_all(&sender);
        tokio::time::sleep(Duration::from_micros(u64::from(round) * 700)).await;
        drop(sender);
        assert!(sending.await.unwrap().is_err());
        assert!(incoming.ready().await.is_err());
        until("all blocks are free", || rig.is_idle()).await;
        Reused::mark(&rig, &blocks).check(&rig, 100 + round).await;
        until("all blocks are free", || rig.is_idle()).await;
    }
    assert_eq!(rig.config.transports.communicators(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_do_not_both_ask_for_nccl_refuse() {
    let Some(mut rig) = gpu_rig(LAYER, 2).await else { return };
    rig.config.transports = Transports::tcp();
    let _incoming = rig.reserve([1; 16], 0);
    let (_sender, sending) = rig.send([1; 16], 0);
    let error = sending.await.unwrap().unwrap_err();
    assert!(matches!(error, HandoffError::Transport { .. }), "{error}");
    let auto = Transports::open(TransportChoice::Auto, &TransportOptions::default(), rig.source.clone()).unwrap();
    assert!(!auto.usable().contains(KvTransport::Nccl));
}

/// Runs `child` in a process of its own, with faults of NCCL. Returns whether it passed, and what it said.
fn in_process(faults: &str) -> Option<(bool, String)> {
    if !has_gpu() || std::env::var_os("OVERFILL_REAL_GPU").is_some() {
        return None;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "survives_a_communicator_that_fails", "--nocapture"]);
    command.env("SOFTWARE_GPU_NCCL_FAULTS", faults).stdin(Stdio::null());
    let done = command.output().unwrap();
    let said = [done.stdout, done.stderr].concat();
    Some((done.status.success(), String::from_utf8_lossy(&said).into_owned()))
}

/// What such a process does. Without faults, it does nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn survives_a_communicator_that_fails() {
    let Ok(faults) = std::env::var("SOFTWARE_GPU_NCCL_FAULTS") else { return };
    tracing_subscriber::fmt().with_max_level(tracing::Level::INFO).init();
    let rig = gpu_rig(ONE_BLOCK, 2).await.unwrap();
    let (mut incoming, blocks) = rig.reserve_any([1; 16]);
    let (sender, sending) = rig.send([1; 16], 0);
    rig.announce_all(&sender);
    sender.commit(1);
    let error = incoming.ready().await.unwrap_err();
    println!("receiver: {error}");
    println!("sender: {}", sending.await.unwrap().unwrap_err());
    until("all blocks are free", || rig.is_idle()).await;
    if !faults.contains("join-hangs") {
        Reused::mark(&rig, &blocks).check(&rig, 2).await;
        assert_eq!(rig.config.transports.communicators(), 2);
    }
}

#[test]
fn a_peer_that_is_stuck_is_aborted() {
    for fault in ["stuck:0", "stuck:3", "late-failure:2", "late-failure:5", "join-hangs"] {
        let Some((passed, said)) = in_process(fault) else { return };
        assert!(passed, "{fault}: {said}");
        assert!(said.contains("ending a communicator"), "{fault}: {said}");
    }
}

#[test]
fn an_abort_that_hangs_ends_the_process() {
    let Some((passed, said)) = in_process("stuck:3,abort-hangs") else { return };
    assert!(!passed && said.contains("can't be aborted; this process ends"), "{said}");
}

#[test]
fn kv_in_host_memory_is_refused() {
    let store = Arc::new(overfill_transport::MemoryStore::new(1, 1, 64));
    let error = Transports::open(NCCL, &TransportOptions::default(), store).unwrap_err();
    assert!(error.to_string().contains("this node's KV is in host memory"), "{error}");
}
