//! Memory that a step walks through.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use memmap2::MmapMut;

/// Memory that begins at a multiple of this can be of large pages from the start.
const LARGE_PAGE_BYTES: usize = 2 << 20;

/// Bytes, zero at first, in large pages where the system has them: in small ones, looking up their places costs
/// time beside reading weights, and more beside reading blocks of KV, which are scattered.
pub(crate) struct LargePages {
    memory: MmapMut,
    /// Where the bytes lie in `memory`.
    first: usize,
    size: usize,
}

impl LargePages {
    /// What is never touched takes no memory.
    pub(crate) fn zeroed(size: usize) -> std::io::Result<Self> {
        let memory = MmapMut::map_anon(size + LARGE_PAGE_BYTES)?;
        let first = memory.as_ptr().align_offset(LARGE_PAGE_BYTES).min(LARGE_PAGE_BYTES);
        // A system without them is no fault.
        #[cfg(target_os = "linux")]
        let _ = memory.advise_range(memmap2::Advice::HugePage, first, size);
        #[cfg(all(test, target_arch = "x86_64"))]
        {
            hide_from_memcheck(&memory[..first]);
            hide_from_memcheck(&memory[first + size..]);
        }
        Ok(Self { memory, first, size })
    }
}

/// Says to valgrind that nobody may read there; elsewhere it does nothing. A mapping is of whole pages, and longer than what is
/// kept in it.
#[cfg(all(test, target_arch = "x86_64"))]
#[allow(unsafe_code)]
fn hide_from_memcheck(bytes: &[u8]) {
    /// `VALGRIND_MAKE_MEM_NOACCESS` of valgrind's memcheck.h.
    const MAKE_NO_ACCESS: usize = (b'M' as usize) << 24 | (b'C' as usize) << 16;
    let request = [MAKE_NO_ACCESS, bytes.as_ptr().addr(), bytes.len(), 0, 0, 0];
    // SAFETY: valgrind knows these instructions as a request; to a processor they change nothing (128 bits of rotation, and
    // an exchange of a register with itself).
    unsafe {
        std::arch::asm!(
            "rol rdi, 3", "rol rdi, 13", "rol rdi, 61", "rol rdi, 51", "xchg rbx, rbx",
            in("rax") request.as_ptr(), inout("rdx") 0_usize => _,
        );
    }
}

impl Deref for LargePages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.first..][..self.size]
    }
}

impl DerefMut for LargePages {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.first..][..self.size]
    }
}

/// Values of which each task of parallel work writes some, in places of its own.
pub(crate) struct Shared<'a> {
    values: *mut f32,
    count: usize,
    of: PhantomData<&'a mut [f32]>,
}

// SAFETY: it stands for a `&mut [f32]`, of which its users give each task other places.
#[allow(unsafe_code)]
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub(crate) fn new(values: &'a mut [f32]) -> Self {
        Self { values: values.as_mut_ptr(), count: values.len(), of: PhantomData }
    }

    /// `count` values from `at` on.
    ///
    /// # Safety
    /// While the result is used, no other part of it is, in this task or another, that has a value in common.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, at: usize, count: usize) -> &mut [f32] {
        assert!(at <= self.count && count <= self.count - at, "{count} values from {at} on, of {}", self.count);
        // SAFETY: they are there, and the caller says that nothing else has them.
        unsafe { std::slice::from_raw_parts_mut(self.values.add(at), count) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_zero_and_as_long_as_asked() {
        for size in [0, 1, 4096, (2 << 20) + 7] {
            let mut memory = LargePages::zeroed(size).unwrap();
            assert_eq!(memory.len(), size);
            assert!(memory.as_ptr().addr().is_multiple_of(LARGE_PAGE_BYTES) && memory.iter().all(|byte| *byte == 0));
            memory.fill(1);
        }
    }
}
