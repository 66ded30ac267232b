//! A decode step allocates nothing: it reuses the memory of earlier steps.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
};

use overfill_kv::{BlockId, SamplingParams};
use overfill_model::{Choice, LoadOptions, Model, Outputs, SamplingContext, SequenceSlice, Want, no_layers};

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: forwards to the system's allocator.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: guaranteed by the caller.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: guaranteed by the caller.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// This must be the only test in its process, because others would allocate at the same time.
#[test]
fn a_decode_step_allocates_nothing() {
    const STEPS: usize = 128;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/qwen3/full");
    let mut engine = Model::load(&folder, &LoadOptions::default(), 64).unwrap().into_engine();
    let tables: Vec<Vec<BlockId>> = (0..4).map(|s| (s * 16..s * 16 + 16).map(BlockId).collect()).collect();
    let mut out = Outputs::default();
    let (token, params, layers) = ([7], SamplingParams::greedy(), no_layers());
    let want = Want::Next(Choice { params: &params, context: SamplingContext::following(&token, &[]) });
    let mut step = |start: usize| {
        let slices: [SequenceSlice<'_>; 4] =
            std::array::from_fn(|i| SequenceSlice { tokens: &token, start: start + 16 * i, blocks: &tables[i], want });
        engine.run(&slices, &layers, &mut out).unwrap();
        assert!((0..4).all(|i| out.take_next(i).is_ok()));
    };
    // Each thread of the pool allocates its own memory at its first piece of work, at an unpredictable time.
    (0..32).for_each(&mut step);
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    (32..32 + STEPS).for_each(&mut step);
    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
    // These allocations are not the step's own. The thread pool's queue allocates a block for every 31 calls into it,
    // and a thread may get its first piece of work only now.
    assert!(allocations <= STEPS / 4, "{allocations} allocations in {STEPS} steps");
}
