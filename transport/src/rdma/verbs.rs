//! The calls of the verbs library that the compiler can't check.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr;
use std::sync::Arc;

use overfill_kv::store::{HostRegion, KvRegion};
use rdma_mummy_sys::{ibv_ack_cq_events, ibv_get_cq_event, ibv_req_notify_cq};
use sideway::ibverbs::AccessFlags;
use sideway::ibverbs::completion::{BasicCompletionQueue, CompletionChannel, CompletionQueue};
use sideway::ibverbs::memory_region::MemoryRegion;
use sideway::ibverbs::protection_domain::ProtectionDomain;
use sideway::ibverbs::queue_pair::{BasicQueuePair, PostSendGuard, QueuePair, SetScatterGatherEntry, WorkRequestFlags};
use tokio::io::unix::AsyncFd;

use super::RdmaError;

/// Access of a region into which the other side writes, or from which this side's device reads.
fn access() -> AccessFlags {
    AccessFlags::LocalWrite | AccessFlags::RemoteWrite
}

fn refused(call: &'static str, error: impl std::error::Error, bytes: usize) -> RdmaError {
    let source = error.source().map_or_else(String::new, |source| format!(": {source}"));
    RdmaError::Call { call, error: format!("{bytes} bytes{source} (the limit may be `ulimit -l`)") }
}

/// Memory of a store, registered with a device.
pub(super) struct Registered {
    region: Arc<MemoryRegion>,
    start: usize,
    bytes: usize,
}

impl Registered {
    /// Registers a region of a store. The caller keeps the store longer than the result.
    pub fn store(domain: &Arc<ProtectionDomain>, region: &KvRegion) -> Result<Self, RdmaError> {
        match region {
            KvRegion::Host(region) => Self::host(domain, region),
            KvRegion::DmaBuf(region) => {
                let (bytes, buffer) = (region.bytes(), region.buffer().as_raw_fd());
                // The address at which the device finds the region must be as far into a page as its offset is, which need
                // not be whole pages. So it is the offset.
                let start = region.offset();
                // SAFETY: `DmaBufRegion::new` requires that the memory stays, and that devices may access it.
                let region = unsafe { domain.reg_dmabuf_mr(start, bytes, start, buffer, access()) };
                let region = region.map_err(|e| refused("ibv_reg_dmabuf_mr", e, bytes))?;
                Ok(Self { region, start: start as usize, bytes })
            }
        }
    }

    fn host(domain: &Arc<ProtectionDomain>, region: &HostRegion) -> Result<Self, RdmaError> {
        let (start, bytes) = (region.address(), region.bytes());
        // SAFETY: `HostRegion::new` requires that the memory stays, and that devices may access it.
        let region = unsafe { domain.reg_mr(start, bytes, access()) };
        Ok(Self { region: region.map_err(|e| refused("ibv_reg_mr", e, bytes))?, start, bytes })
    }

    /// Key with which the device finds the region: the local one and the one for the other side.
    pub fn keys(&self) -> (u32, u32) {
        (self.region.lkey(), self.region.rkey())
    }

    /// Address of the `bytes` bytes at `offset`. `None` if they are outside the region.
    pub fn address(&self, offset: usize, bytes: usize) -> Option<u64> {
        let end = offset.checked_add(bytes)?;
        (end <= self.bytes).then_some((self.start + offset) as u64)
    }
}

/// Memory for pieces on their way between a device and a store that it can't access.
pub(super) struct Staging {
    // Declared first, so that the device forgets the memory before it is freed.
    registered: Registered,
    memory: Box<[u8]>,
}

impl Staging {
    /// Allocates and registers `bytes` bytes.
    pub fn new(domain: &Arc<ProtectionDomain>, bytes: usize) -> Result<Self, RdmaError> {
        let mut memory = vec![0; bytes].into_boxed_slice();
        // SAFETY: the memory lives as long as the registration, and does not move when the box does. `Target` and
        // `Writer` access a slot only while no write to or from it is under way.
        let region = unsafe { HostRegion::new(memory.as_mut_ptr(), bytes) };
        Ok(Self { registered: Registered::host(domain, &region)?, memory })
    }

    pub fn registered(&self) -> &Registered {
        &self.registered
    }

    /// The bytes that a device has written. Read from memory, not from what the compiler thinks is there.
    pub fn bytes(&self) -> &[u8] {
        std::hint::black_box(&self.memory)
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory
    }
}

/// One write of consecutive bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub from: u64,
    pub local_key: u32,
    pub bytes: u32,
    pub to: u64,
    pub remote_key: u32,
}

/// Posts the writes of a piece. Only the last one is reported: here when it is done, and on the other side with `number`.
pub(super) fn post(pair: &mut BasicQueuePair, runs: &[Run], number: u32) -> Result<(), RdmaError> {
    let mut guard = pair.start_post_send();
    for (i, run) in runs.iter().enumerate() {
        let last = i + 1 == runs.len();
        let flags = if last { WorkRequestFlags::Signaled } else { WorkRequestFlags::none() };
        let request = guard.construct_wr(u64::from(number), flags);
        let request = match last {
            true => request.setup_write_imm(run.remote_key, run.to, number.to_be()),
            false => request.setup_write(run.remote_key, run.to),
        };
        // SAFETY: `Registered::address` has checked that the bytes are inside the region of the key. The owner of the
        // queue pair keeps the blocks until the last write is reported or the queue pair is destroyed.
        unsafe { request.setup_sge(run.local_key, run.from, run.bytes) };
    }
    guard.post().map_err(|error| RdmaError::Call { call: "ibv_post_send", error: error.to_string() })
}

/// The file descriptor that becomes readable when a completion queue reports something.
pub(super) struct Events {
    queue: Arc<BasicCompletionQueue>,
    channel: Arc<CompletionChannel>,
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.channel.as_raw_fd()
    }
}

impl Events {
    /// The events of `queue`, whose channel is `channel`, in nonblocking mode.
    pub fn watch(queue: Arc<BasicCompletionQueue>, channel: Arc<CompletionChannel>) -> io::Result<AsyncFd<Self>> {
        // SAFETY: the descriptor is the channel's, which `Events` keeps open and never exchanges.
        unsafe { AsyncFd::register(Self { queue, channel }) }.map_err(io::Error::from)
    }

    /// Makes the next completion readable. Completions that are already there are not announced any more.
    pub fn arm(&self) -> Result<(), RdmaError> {
        // SAFETY: the queue exists as long as `self`.
        let code = unsafe { ibv_req_notify_cq(self.queue.cq().as_ptr(), 0) };
        match code {
            0 => Ok(()),
            _ => {
                let error = io::Error::from_raw_os_error(code.abs()).to_string();
                Err(RdmaError::Call { call: "ibv_req_notify_cq", error })
            }
        }
    }

    /// Takes an event from the channel, so that it is not readable any more. False if there was none.
    pub fn take(&self) -> bool {
        let (mut queue, mut context) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: channel and queue exist as long as `self`. The channel does not block, and serves this queue only. Each
        // event is acknowledged, so destroying the queue does not wait.
        unsafe {
            let channel = self.channel.comp_channel().as_ptr();
            let taken = ibv_get_cq_event(channel, &mut queue, &mut context) == 0;
            if taken {
                ibv_ack_cq_events(queue, 1);
            }
            taken
        }
    }
}
