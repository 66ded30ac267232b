//! Memory that a step reads and writes.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use memmap2::MmapMut;

/// Size of a large page. Memory aligned to it can use large pages from its beginning.
const LARGE_PAGE_BYTES: usize = 2 << 20;

/// Zero-initialised bytes, in large pages if the system supports them. With small pages, address translation slows down
/// reading weights, and slows down reading KV blocks even more, because they are scattered.
pub(crate) struct LargePages {
    memory: MmapMut,
    /// Offset of the bytes in `memory`.
    first: usize,
    size: usize,
}

impl LargePages {
    /// Allocates `size` bytes. Pages that are never accessed use no memory.
    pub(crate) fn zeroed(size: usize) -> std::io::Result<Self> {
        let memory = MmapMut::map_anon(size + LARGE_PAGE_BYTES)?;
        let first = memory.as_ptr().align_offset(LARGE_PAGE_BYTES).min(LARGE_PAGE_BYTES);
        // The error is ignored: large pages are only an optimisation.
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

/// Makes valgrind report accesses to these bytes; without valgrind it does nothing. A mapping consists of whole pages,
/// so it is larger than the bytes in use.
#[cfg(all(test, target_arch = "x86_64"))]
#[allow(unsafe_code)]
fn hide_from_memcheck(bytes: &[u8]) {
    /// `VALGRIND_MAKE_MEM_NOACCESS` of valgrind's memcheck.h.
    const MAKE_NO_ACCESS: usize = (b'M' as usize) << 24 | (b'C' as usize) << 16;
    let request = [MAKE_NO_ACCESS, bytes.as_ptr().addr(), bytes.len(), 0, 0, 0];
    // SAFETY: valgrind recognises these instructions as a request. On a processor they have no effect: they rotate a
    // register by 128 bits in total and exchange a register with itself.
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

/// Values that parallel tasks write to, each in its own disjoint parts.
pub(crate) struct Shared<'a> {
    values: *mut f32,
    count: usize,
    of: PhantomData<&'a mut [f32]>,
}

// SAFETY: it stands for a `&mut [f32]`. The contract of `part` keeps accesses disjoint.
#[allow(unsafe_code)]
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub(crate) fn new(values: &'a mut [f32]) -> Self {
        Self { values: values.as_mut_ptr(), count: values.len(), of: PhantomData }
    }

    /// The `count` values starting at `at`.
    ///
    /// # Safety
    /// While the result is in use, no other part in use, in this or another task, may overlap it.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, at: usize, count: usize) -> &mut [f32] {
        assert!(at <= self.count && count <= self.count - at, "{count} values at {at} exceed {}", self.count);
        // SAFETY: the assert checked the range, and the caller guarantees that no other part overlaps it.
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
