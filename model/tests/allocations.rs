//! A decode step allocates nothing: its memory is the one before's.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
};

use overfill_kv::BlockId;
use overfill_model::{LoadOptions, Logits, Model, SequenceSlice, Want};

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: the system's allocator does the work.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The only test of its process: others would allocate beside it.
#[test]
fn a_decode_step_allocates_nothing() {
    const STEPS: usize = 128;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/qwen3/full");
    let model = Model::load(&folder, &LoadOptions::default()).unwrap();
    let cache = model.new_cache(64).unwrap();
    let tables: Vec<Vec<BlockId>> = (0..4).map(|s| (s * 16..s * 16 + 16).map(BlockId).collect()).collect();
    let mut logits = Logits::default();
    let token = [7];
    let mut step = |start: usize| {
        let slices: [SequenceSlice<'_>; 4] = std::array::from_fn(|i| SequenceSlice {
            tokens: &token,
            start: start + 16 * i,
            blocks: &tables[i],
            want: Want::Last,
        });
        model.forward(&cache, &slices, &mut |_| {}, &mut logits).unwrap();
    };
    // Threads of the pool get memory of their own at their first piece of work, whenever that comes.
    (0..32).for_each(&mut step);
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    (32..32 + STEPS).for_each(&mut step);
    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
    // Not a step's own: the thread pool's queue takes a new block of places for every 31 calls into it, and one of its threads
    // may only now get its first piece of work.
    assert!(allocations <= STEPS / 4, "{allocations} allocations in {STEPS} steps");
}
