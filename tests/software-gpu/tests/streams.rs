//! The double of libcuda finds code that does not wait: on another stream, or on the host.
#![allow(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, result, sys::CUdeviceptr};
use overfill_software_gpu::SoftwareGpu;

const BYTES: usize = 4096;
/// The order varies from one round to the next. A fault shows in some of them.
const ROUNDS: u8 = 60;

/// Two streams, and a buffer of device memory for each.
struct Device {
    first: (Arc<CudaStream>, CUdeviceptr),
    second: (Arc<CudaStream>, CUdeviceptr),
}

/// `None` if the software GPU can't be built, which is said.
fn device() -> Option<Device> {
    match SoftwareGpu::build(false, &[]).and_then(|gpu| gpu.load()) {
        Ok(()) => {}
        Err(error) if std::env::var_os("OVERFILL_GPU_REQUIRED").is_some() => panic!("{error}"),
        Err(error) => {
            eprintln!("SKIPPED: no software GPU: {error}");
            return None;
        }
    }
    let context = CudaContext::new(0).unwrap();
    context.bind_to_thread().unwrap();
    let half = || {
        // SAFETY: filled before it is read, and never freed.
        (context.new_stream().unwrap(), unsafe { result::malloc_sync(BYTES).unwrap() })
    };
    Some(Device { first: half(), second: half() })
}

impl Device {
    /// The first stream fills its buffer with `value`, and the second one copies it. Returns what arrives on the host.
    /// `waits`: whether the second stream waits for the first, and the host for the second.
    fn round(&self, value: u8, waits: (bool, bool)) -> Vec<u8> {
        let ((first, from), (second, to)) = (&self.first, &self.second);
        let mut pinned = Pinned::new();
        // SAFETY: the buffers have `BYTES` bytes, and live as long as the process. Nothing else uses them.
        unsafe {
            result::memset_d8_async(*from, value, BYTES, first.cu_stream()).unwrap();
            if waits.0 {
                second.wait(&first.record_event(None).unwrap()).unwrap();
            }
            result::memcpy_dtod_async(*to, *from, BYTES, second.cu_stream()).unwrap();
            result::memcpy_dtoh_async(pinned.bytes(), *to, second.cu_stream()).unwrap();
        }
        if waits.1 {
            second.synchronize().unwrap();
        }
        let seen = pinned.bytes().to_vec();
        // The next round begins with idle streams.
        first.synchronize().unwrap();
        second.synchronize().unwrap();
        seen
    }

    /// Rounds in which something else than the value arrived.
    fn wrong_rounds(&self, waits: (bool, bool)) -> usize {
        (1..=ROUNDS).filter(|value| self.round(*value, waits) != vec![*value; BYTES]).count()
    }
}

/// Host memory that the device copies to late.
struct Pinned(*mut u8);

impl Pinned {
    fn new() -> Self {
        // SAFETY: freed once, below.
        Self(unsafe { result::malloc_host(BYTES, 0).unwrap() }.cast())
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: allocated with this size. The device writes to it only between a call that queues a copy and the end of
        // the stream, and the tests look at it in between on purpose.
        unsafe { std::slice::from_raw_parts_mut(self.0, BYTES) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated by `malloc_host`.
        unsafe { result::free_host(self.0.cast()).unwrap() };
    }
}

#[test]
fn a_missing_wait_gives_wrong_values() {
    let Some(device) = device() else { return };
    assert_eq!(device.wrong_rounds((true, true)), 0, "with all waits");
    assert!(device.wrong_rounds((false, true)) > 0, "without the wait of a stream for an event");
    assert!(device.wrong_rounds((true, false)) > 0, "without the wait of the host for a stream");
}
