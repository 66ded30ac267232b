//! Memory of the device, and pinned memory of the host.
//!
//! The only module that frees or copies memory. Kernels get addresses ([`Pointer`]); that their parameters stay within
//! buffers is checked where buffers are sized, in `workspace.rs` and `linear.rs`.
#![allow(unsafe_code)]

use std::{
    ffi::c_void,
    ops::Range,
    os::fd::{FromRawFd, OwnedFd, RawFd},
    sync::Arc,
};

use bytemuck::Pod;
use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use super::device::Fault;

/// An address in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct Pointer(sys::CUdeviceptr);

impl Pointer {
    /// No address; kernels take it for an absent operand.
    pub(super) const NULL: Self = Self(0);

    /// The address `bytes` further.
    pub(super) fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as sys::CUdeviceptr)
    }

    /// The address as a number.
    pub(super) fn address(self) -> u64 {
        self.0
    }

    /// For libraries that take C pointers.
    pub(super) fn as_c(self) -> *mut c_void {
        self.0 as *mut c_void
    }
}

/// The largest pages of a host. Memory is exported in whole pages, and a multiple of this size is one of any page size.
const PAGE_BYTES: usize = 64 << 10;

/// A buffer in device memory, a multiple of 256 bytes in address.
pub(super) struct Buffer {
    context: Arc<CudaContext>,
    at: Pointer,
    bytes: usize,
    /// What the driver has allocated. It starts at or before `at`.
    allocated: Pointer,
}

impl Buffer {
    /// Allocates `bytes` bytes, at least one, filled with zeros.
    pub(super) fn zeroed(stream: &CudaStream, bytes: usize) -> Result<Self, Fault> {
        let context = stream.context().clone();
        context.bind_to_thread()?;
        let bytes = bytes.max(1);
        // SAFETY: the memory is filled before anything reads it. The fill is queued on `stream`, and waited for.
        let at = match unsafe { result::malloc_sync(bytes) } {
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                return Err(Fault::OutOfMemory { wanted_bytes: bytes, free_bytes: context.mem_get_info()?.0 });
            }
            allocated => allocated?,
        };
        let buffer = Self { context, at: Pointer(at), bytes, allocated: Pointer(at) };
        // SAFETY: `at` has `bytes` bytes, and lives as long as `buffer`, which is longer than the wait below.
        unsafe { result::memset_d8_async(at, 0, bytes, stream.cu_stream())? };
        stream.synchronize()?;
        Ok(buffer)
    }

    /// Allocates `bytes` bytes that [`Self::export`] accepts, filled with zeros: they start with a page, and no other
    /// buffer is on their last one.
    pub(super) fn pages(stream: &CudaStream, bytes: usize) -> Result<Self, Fault> {
        let whole = bytes.next_multiple_of(PAGE_BYTES);
        let mut buffer = Self::zeroed(stream, whole + PAGE_BYTES)?;
        buffer.at = Pointer(buffer.allocated.0.next_multiple_of(PAGE_BYTES as u64));
        buffer.bytes = whole;
        Ok(buffer)
    }

    /// Exports a buffer of [`Self::pages`] as a dma-buf, which keeps the memory as long as it is open.
    pub(super) fn export(&self) -> Result<OwnedFd, DriverError> {
        let mut descriptor: RawFd = -1;
        let kind = sys::CUmemRangeHandleType::CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD;
        self.context.bind_to_thread()?;
        // SAFETY: the range is inside the allocation. With this kind, the driver writes a file descriptor, which is ours.
        unsafe {
            let handle = (&raw mut descriptor).cast();
            sys::cuMemGetHandleForAddressRange(handle, self.at.0, self.bytes, kind, 0).result()?;
            Ok(OwnedFd::from_raw_fd(descriptor))
        }
    }

    /// Allocates memory and copies `data` there.
    pub(super) fn of<T: Pod>(stream: &CudaStream, data: &[T]) -> Result<Self, Fault> {
        let buffer = Self::zeroed(stream, size_of_val(data))?;
        buffer.upload(stream, 0, data)?;
        Ok(buffer)
    }

    /// Address of the first byte.
    pub(super) fn pointer(&self) -> Pointer {
        self.at
    }

    /// Size in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies `data` to `offset` bytes after the start, and waits for the copy.
    pub(super) fn upload<T: Pod>(&self, stream: &CudaStream, offset: usize, data: &[T]) -> Result<(), DriverError> {
        self.check(offset, size_of_val(data));
        self.context.bind_to_thread()?;
        // SAFETY: the range is inside the buffer. `data` lives until the copy has ended.
        unsafe { result::memcpy_htod_async(self.at.offset(offset).0, data, stream.cu_stream())? };
        stream.synchronize()
    }

    /// Queues a copy of a range of `from` to `offset` bytes after the start. The caller must not change it before the
    /// stream has got there.
    pub(super) fn queue_upload<T: Pod>(
        &self,
        stream: &CudaStream,
        offset: usize,
        from: &Pinned<T>,
        range: Range<usize>,
    ) -> Result<(), DriverError> {
        let from = &from.as_slice()[range];
        self.check(offset, size_of_val(from));
        self.context.bind_to_thread()?;
        // SAFETY: the range is inside the buffer. Pinned memory is freed only after the device is idle.
        unsafe { result::memcpy_htod_async(self.at.offset(offset).0, from, stream.cu_stream()) }
    }

    /// Queues a copy of `count` elements from `offset` bytes after the start to the element `at` of `to`. Its values are
    /// there when the stream has got there.
    pub(super) fn queue_download<T: Pod>(
        &self,
        stream: &CudaStream,
        offset: usize,
        to: &mut Pinned<T>,
        at: usize,
        count: usize,
    ) -> Result<(), DriverError> {
        let to = &mut to.as_mut_slice()[at..at + count];
        self.check(offset, size_of_val(to));
        self.context.bind_to_thread()?;
        // SAFETY: the range is inside the buffer. Pinned memory is freed only after the device is idle.
        unsafe { result::memcpy_dtoh_async(to, self.at.offset(offset).0, stream.cu_stream()) }
    }

    /// Queues a copy of all bytes of `from`.
    pub(super) fn queue_copy(&self, stream: &CudaStream, from: &Self) -> Result<(), DriverError> {
        self.check(0, from.bytes);
        self.context.bind_to_thread()?;
        // SAFETY: both buffers are at least as long as `from`, as was checked. Freeing them waits for the copy.
        unsafe { result::memcpy_dtod_async(self.at.0, from.at.0, from.bytes, stream.cu_stream()) }
    }

    /// Panics if the range is not inside the buffer.
    fn check(&self, offset: usize, bytes: usize) {
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= self.bytes);
        assert!(inside, "{bytes} bytes at {offset} are outside a buffer of {}", self.bytes);
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated by `malloc_sync`, and freed once. cuMemFree waits for work that uses the memory.
        let freed = self.context.bind_to_thread().and_then(|()| unsafe { result::free_sync(self.allocated.0) });
        if let Err(error) = freed {
            tracing::warn!(%error, "device memory could not be freed");
        }
    }
}

/// Host memory that the device copies to and from directly.
pub(super) struct Pinned<T> {
    context: Arc<CudaContext>,
    at: *mut T,
    count: usize,
}

// SAFETY: it owns its memory, like a Box<[T]>.
unsafe impl<T: Send> Send for Pinned<T> {}

impl<T: Pod> Pinned<T> {
    /// Allocates `count` elements, at least one, of zeros.
    pub(super) fn zeroed(context: &Arc<CudaContext>, count: usize) -> Result<Self, DriverError> {
        context.bind_to_thread()?;
        let count = count.max(1);
        // SAFETY: filled with zeros before anything reads it; zeros are valid for every Pod. The driver aligns to pages.
        let at = unsafe {
            let at = result::malloc_host(count * size_of::<T>(), 0)?.cast::<T>();
            std::ptr::write_bytes(at, 0, count);
            at
        };
        Ok(Self { context: context.clone(), at, count })
    }

    pub(super) fn as_slice(&self) -> &[T] {
        // SAFETY: `at` has `count` initialised elements.
        unsafe { std::slice::from_raw_parts(self.at, self.count) }
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.count) }
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        // Copies that are under way use the memory.
        let idle = self.context.synchronize();
        // SAFETY: allocated by `malloc_host`, and freed once.
        let freed = idle.and_then(|()| unsafe { result::free_host(self.at.cast()) });
        if let Err(error) = freed {
            tracing::warn!(%error, "pinned memory could not be freed");
        }
    }
}
