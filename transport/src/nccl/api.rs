//! NCCL's calls, and CUDA's streams and events for them.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_int, c_void};
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError};
use cudarc::nccl::sys::{self, ncclResult_t};

use super::{CommunicatorId, ID_BYTES, NcclError};

impl From<DriverError> for NcclError {
    fn from(error: DriverError) -> Self {
        Self::Cuda(error.to_string())
    }
}

/// Whether the library can be opened.
pub(super) fn is_installed() -> bool {
    // SAFETY: only asks whether the library can be opened.
    unsafe { sys::is_culib_present() }
}

/// NCCL's version, such as 23000.
pub(super) fn version() -> Result<i32, NcclError> {
    let mut version = 0;
    // SAFETY: `version` is valid for the call.
    check("ncclGetVersion", unsafe { sys::ncclGetVersion(&raw mut version) })?;
    Ok(version)
}

/// A new id, and with it a thread of NCCL's at which the ranks meet.
pub(super) fn new_id() -> Result<CommunicatorId, NcclError> {
    let mut id = sys::ncclUniqueId { internal: [0; ID_BYTES] };
    // SAFETY: `id` is valid for the call.
    check("ncclGetUniqueId", unsafe { sys::ncclGetUniqueId(&raw mut id) })?;
    Ok(CommunicatorId(id.internal.map(|byte| byte.cast_unsigned())))
}

/// Whether a call has ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    Done,
    /// [`Raw::progress`] tells when.
    InProgress,
}

fn check(call: &'static str, result: ncclResult_t) -> Result<Call, NcclError> {
    match result {
        ncclResult_t::ncclSuccess => Ok(Call::Done),
        ncclResult_t::ncclInProgress => Ok(Call::InProgress),
        error => {
            // SAFETY: NCCL returns a static string for every value.
            let text = unsafe { sys::ncclGetErrorString(error) };
            let error = if text.is_null() {
                format!("{error:?}")
            } else {
                // SAFETY: not null, and a C string as above.
                unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
            };
            Err(NcclError::Call { call, error })
        }
    }
}

/// What a rank does with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Send,
    Receive,
}

impl Direction {
    /// Rank of this side.
    pub fn rank(self) -> c_int {
        match self {
            Self::Send => 0,
            Self::Receive => 1,
        }
    }
}

/// A communicator of two ranks. Its calls return at once. It must be ended with [`Self::abort`].
pub(super) struct Raw {
    communicator: sys::ncclComm_t,
    direction: Direction,
    stream: Arc<CudaStream>,
}

// SAFETY: NCCL allows the use of a communicator by any thread, by one at a time.
unsafe impl Send for Raw {}

impl Raw {
    /// Begins to join. [`Self::progress`] tells when both ranks have.
    pub fn join(context: &Arc<CudaContext>, id: &CommunicatorId, direction: Direction) -> Result<Self, NcclError> {
        context.bind_to_thread()?;
        let stream = context.new_stream()?;
        let id = sys::ncclUniqueId { internal: id.0.map(|byte| byte.cast_signed()) };
        let mut config = non_blocking();
        let mut communicator = std::ptr::null_mut();
        // SAFETY: the pointers are valid for the call; NCCL copies the configuration.
        let result =
            unsafe { sys::ncclCommInitRankConfig(&raw mut communicator, 2, id, direction.rank(), &raw mut config) };
        if communicator.is_null() {
            check("ncclCommInitRankConfig", result)?;
            return Err(NcclError::Ended);
        }
        // If it has failed with a handle, `progress` says so, and the handle must still be aborted.
        Ok(Self { communicator, direction, stream })
    }

    /// Whether the last call has ended, and whether the communicator works.
    pub fn progress(&self) -> Result<Call, NcclError> {
        let mut state = ncclResult_t::ncclSuccess;
        // SAFETY: the communicator exists until `abort`, and `state` is valid for the call.
        let asked = unsafe { sys::ncclCommGetAsyncError(self.communicator, &raw mut state) };
        check("ncclCommGetAsyncError", asked)?;
        check("communicator", state)
    }

    /// Queues one group: all of `runs`, addresses and sizes in bytes of device memory. The other rank must queue the same
    /// sizes.
    ///
    /// # Safety
    /// The memory must stay, and nothing may access it in a conflicting way, until an event that is recorded after the call has ended has
    /// completed, or the communicator was aborted and its stream is idle.
    pub unsafe fn queue(&self, runs: &[(u64, usize)]) -> Result<Call, NcclError> {
        // SAFETY: no conditions.
        check("ncclGroupStart", unsafe { sys::ncclGroupStart() })?;
        let peer = 1 - self.direction.rank();
        let stream = self.stream.cu_stream().cast();
        let mut queued = Ok(Call::Done);
        for (address, bytes) in runs {
            let kind = sys::ncclDataType_t::ncclUint8;
            let at = *address as *mut c_void;
            // SAFETY: the caller vouches for the memory. Communicator and stream exist.
            let result = unsafe {
                match self.direction {
                    Direction::Send => sys::ncclSend(at, *bytes, kind, peer, self.communicator, stream),
                    Direction::Receive => sys::ncclRecv(at, *bytes, kind, peer, self.communicator, stream),
                }
            };
            queued = check("ncclSend or ncclRecv", result);
            if queued.is_err() {
                break;
            }
        }
        // A group that was started must be ended.
        // SAFETY: no conditions.
        let ended = check("ncclGroupEnd", unsafe { sys::ncclGroupEnd() });
        queued.and(ended)
    }

    /// An event after everything that is queued.
    pub fn record(&self) -> Result<CudaEvent, NcclError> {
        Ok(self.stream.record_event(None)?)
    }

    /// Ends the communicator and its kernels, and waits until its stream is idle: nothing that was queued accesses memory
    /// any more. May take long, or never return.
    pub fn abort(self) -> Result<(), NcclError> {
        // An error that the context remembers must not keep the abort from being made.
        let _ = self.stream.context().bind_to_thread();
        // SAFETY: aborted once, since `self` is consumed.
        check("ncclCommAbort", unsafe { sys::ncclCommAbort(self.communicator) })?;
        Ok(self.stream.synchronize()?)
    }
}

/// The configuration that NCCL_CONFIG_INITIALIZER makes, but not blocking.
fn non_blocking() -> sys::ncclConfig_t {
    // NCCL's values for "not set", and its mark of a configuration.
    const UNDEFINED: c_int = c_int::MIN;
    const MAGIC: u32 = 0xcafe_beef;
    sys::ncclConfig_t {
        size: size_of::<sys::ncclConfig_t>(),
        magic: MAGIC,
        version: VERSION,
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: std::ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: std::ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
        graphUsageMode: UNDEFINED,
        numRmaCtx: UNDEFINED,
        maxP2pPeers: UNDEFINED,
    }
}

/// Version of the configuration's layout: 2.30.
const VERSION: u32 = 23000;
