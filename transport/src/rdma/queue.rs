//! The queue pair of one handoff, and its completions.

use std::collections::VecDeque;
use std::sync::Arc;

use overfill_kv::Ticket;
use sideway::ibverbs::AccessFlags;
use sideway::ibverbs::address::{AddressHandleAttribute, Gid};
use sideway::ibverbs::completion::{
    BasicCompletionQueue, GenericCompletionQueue, PollCompletionQueueError, WorkCompletionStatus,
};
use sideway::ibverbs::device_context::Mtu;
use sideway::ibverbs::queue_pair::{BasicQueuePair, QueuePair, QueuePairAttribute, QueuePairState};
use tokio::io::unix::AsyncFd;

use super::device::Pool;
use super::verbs::{self, Events, Run};
use super::{MAX_PIECE_BLOCKS, RdmaAddress, RdmaError};
use crate::tcp::frame::checksum;

/// Pieces that a sender may be ahead of a receiver that does not look. Further ones wait on the sender's device.
pub(super) const RECEIVES: u32 = 32;
/// Time after which an unanswered packet is sent again, as a code: 67 ms. With 7 attempts a lost link is noticed in about
/// half a second.
const ACK_TIMEOUT: u8 = 14;
const ATTEMPTS: u8 = 7;
/// Time that a sender waits if the receiver has no receive posted, as a code: 0.64 ms. It tries again until the handoff's
/// own deadline.
const NOT_READY_TIMER: u8 = 12;
const NOT_READY_FOREVER: u8 = 7;
/// Routers that a packet may pass.
const HOPS: u8 = 64;

/// A queue pair, with a completion queue of its own. One task owns it. Dropping it destroys it: from then on the device
/// neither writes nor reads for it.
pub(crate) struct Queue {
    // Declared first: destroyed before what it refers to.
    pair: BasicQueuePair,
    completions: Arc<BasicCompletionQueue>,
    events: AsyncFd<Events>,
    /// Completions taken from the queue: status, and immediate value. Never more than the queue holds.
    reported: VecDeque<(u32, u32)>,
    psn: u32,
    pool: Arc<Pool>,
}

fn failed(call: &'static str, error: impl std::error::Error) -> RdmaError {
    let source = error.source().map_or_else(String::new, |source| format!(": {source}"));
    RdmaError::Call { call, error: format!("{error}{source}") }
}

impl Queue {
    pub(super) fn new(pool: Arc<Pool>, ticket: &Ticket) -> Result<Self, RdmaError> {
        let device = pool.device();
        let channel = device.context.create_comp_channel().map_err(|e| failed("ibv_create_comp_channel", e))?;
        channel.set_nonblocking(true).map_err(|e| failed("fcntl", e))?;
        let entries = MAX_PIECE_BLOCKS + 2 * RECEIVES;
        let mut builder = device.context.create_cq_builder();
        let completions = builder
            .setup_cqe(entries)
            .setup_comp_channel(&channel, 0)
            .build()
            .map_err(|e| failed("ibv_create_cq", e))?;
        let events = Events::watch(completions.clone(), channel).map_err(|e| failed("epoll", e))?;
        let both = GenericCompletionQueue::from(completions.clone());
        let mut builder = device.domain.create_qp_builder();
        builder.setup_send_cq(both.clone()).setup_recv_cq(both);
        builder.setup_max_send_wr(MAX_PIECE_BLOCKS + 1).setup_max_recv_wr(RECEIVES);
        let mut pair = builder.build().map_err(|e| failed("ibv_create_qp", e))?;
        let mut attributes = QueuePairAttribute::new();
        attributes.setup_state(QueuePairState::Init).setup_pkey_index(0).setup_port(device.port);
        attributes.setup_access_flags(AccessFlags::LocalWrite | AccessFlags::RemoteWrite);
        pair.modify(&attributes).map_err(|e| failed("ibv_modify_qp to INIT", e))?;
        // The ticket is random, and new for every attempt. So packets of another attempt are not taken for this one's.
        let [a, b, c, ..] = checksum(&ticket.0);
        let reported = VecDeque::new();
        Ok(Self { pair, completions, events, reported, psn: u32::from_le_bytes([a, b, c, 0]), pool })
    }

    /// Address for the other side.
    pub fn address(&self) -> RdmaAddress {
        let device = self.pool.device();
        let qp = self.pair.qp_number();
        RdmaAddress { qp, psn: self.psn, gid: device.gid, lid: device.lid, mtu: device.mtu }
    }

    pub(super) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Connects to the other side's queue pair. From now on it can write, if it knows a key.
    pub(super) fn connect(&mut self, peer: &RdmaAddress) -> Result<(), RdmaError> {
        let device = self.pool.device();
        let mtu = match device.mtu.min(peer.mtu) {
            0 | 1 => Mtu::Mtu256,
            2 => Mtu::Mtu512,
            3 => Mtu::Mtu1024,
            4 => Mtu::Mtu2048,
            _ => Mtu::Mtu4096,
        };
        let mut to = AddressHandleAttribute::new();
        to.setup_port(device.port).setup_dest_lid(peer.lid);
        // On InfiniBand, a global address is needed only between subnets; it does no harm within one.
        to.setup_grh_src_gid_index(device.gid_index).setup_grh_dest_gid(&Gid { raw: peer.gid });
        to.setup_grh_hop_limit(if device.ethernet || peer.gid[..8] != device.gid[..8] { HOPS } else { 1 });
        let mut attributes = QueuePairAttribute::new();
        attributes.setup_state(QueuePairState::ReadyToReceive).setup_path_mtu(mtu).setup_address_vector(&to);
        attributes.setup_dest_qp_num(peer.qp).setup_rq_psn(peer.psn);
        attributes.setup_max_dest_read_atomic(0).setup_min_rnr_timer(NOT_READY_TIMER);
        self.pair.modify(&attributes).map_err(|e| failed("ibv_modify_qp to RTR", e))?;
        let mut attributes = QueuePairAttribute::new();
        attributes.setup_state(QueuePairState::ReadyToSend).setup_sq_psn(self.psn).setup_max_read_atomic(0);
        attributes.setup_timeout(ACK_TIMEOUT).setup_retry_cnt(ATTEMPTS).setup_rnr_retry(NOT_READY_FOREVER);
        self.pair.modify(&attributes).map_err(|e| failed("ibv_modify_qp to RTS", e))
    }

    /// Allows `count` more reports of pieces.
    pub(super) fn post_receives(&mut self, count: u32) -> Result<(), RdmaError> {
        let mut guard = self.pair.start_post_recv();
        for _ in 0..count {
            guard.construct_wr(0);
        }
        guard.post().map_err(|e| failed("ibv_post_recv", e))
    }

    /// Posts the writes of a piece, see [`verbs::post`].
    pub(super) fn post_writes(&mut self, runs: &[Run], number: u32) -> Result<(), RdmaError> {
        verbs::post(&mut self.pair, runs, number)
    }

    /// The next completion: its immediate value, or why the work has failed.
    fn poll(&mut self) -> Result<Option<u32>, RdmaError> {
        if self.reported.is_empty() {
            match self.completions.start_poll() {
                // One call takes several completions from the queue.
                Ok(poller) => self.reported.extend(poller.map(|c| (c.status(), u32::from_be(c.imm_data())))),
                Err(PollCompletionQueueError::CompletionQueueEmpty) => {}
                Err(error) => return Err(failed("ibv_poll_cq", error)),
            }
        }
        match self.reported.pop_front() {
            None => Ok(None),
            Some((0, value)) => Ok(Some(value)),
            // Later codes make the conversion panic.
            Some((code @ 1..=23, _)) => Err(RdmaError::Work(format!("{:?}", WorkCompletionStatus::from(code)))),
            Some((code, _)) => Err(RdmaError::Work(format!("status {code}"))),
        }
    }

    /// Waits for the next completion and returns its immediate value, which has a meaning on the receiver only. The caller
    /// limits the time. Cancel safe: dropping the future loses nothing.
    pub(super) async fn next(&mut self) -> Result<u32, RdmaError> {
        loop {
            if let Some(value) = self.poll()? {
                return Ok(value);
            }
            self.events.get_ref().arm()?;
            // What came before it was armed is not announced.
            if let Some(value) = self.poll()? {
                return Ok(value);
            }
            let mut ready = self.events.readable().await.map_err(|e| failed("epoll", e))?;
            while self.events.get_ref().take() {}
            ready.clear_ready();
        }
    }

    /// Takes the queue pair to the error state, then destroys it. When this returns, the device neither writes nor reads
    /// for it.
    ///
    /// If the device refuses to destroy it, the library panics while it destroys the queue pair, and again while
    /// it destroys the completion queue, so the process ends. Then the system destroys everything, and no block was released too early.
    pub async fn end(mut self) {
        let ended = tokio::task::spawn_blocking(move || {
            let mut attributes = QueuePairAttribute::new();
            attributes.setup_state(QueuePairState::Error);
            // Faster than destroying: the sender is stopped from here on.
            if let Err(error) = self.pair.modify(&attributes) {
                tracing::error!(%error, "a queue pair could not be stopped; destroying it");
            }
            drop(self);
        });
        // Not run while the runtime shuts down; then `self` is dropped, which also destroys it.
        let _ = ended.await;
    }
}
