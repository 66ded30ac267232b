//! Runs every target on its seeds and on thousands of mutations. No input may cause a panic or exceed the memory limit.
//!
//! Mutations use a fixed seed and a random seed. A failure prints the seed and the input. `OVERFILL_FUZZ_SEED=N` runs
//! all targets with that seed, `OVERFILL_FUZZ_TARGET=NAME` runs one target, and `OVERFILL_FUZZ_INPUT=TARGET:HEX` one
//! input.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::any::Any;
use std::cell::Cell;
use std::collections::hash_map::RandomState;
use std::fs;
use std::hash::BuildHasher as _;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use overfill_fuzz::mutate::{Random, from_hex, mutated, to_hex};
use overfill_fuzz::{TARGETS, Target};

const FIXED_SEED: u64 = 1;

/// Bytes currently allocated by all threads, and the peak. Templates run on their own threads.
static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: all calls are forwarded to the system allocator.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(now, Relaxed);
        // SAFETY: the caller upholds the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller upholds the contract of `dealloc`.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    static PANIC: Cell<Option<String>> = const { Cell::new(None) };
}

fn folder(target: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "seeds", target].iter().collect()
}

/// Reads the committed seeds of a target, sorted by file name.
fn committed(target: &str) -> Vec<Vec<u8>> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder(target)).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

fn text_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without a text")
}

/// Runs one input and returns its failure, if any.
fn fault(target: &Target, input: &[u8]) -> Option<String> {
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (target.run)(input))) {
        return Some(format!("{} {}", text_of(&*panic), PANIC.take().unwrap_or_default()));
    }
    let (taken, limit) = (PEAK.load(Relaxed) - before, target.base_bytes + target.bytes_per_byte * input.len());
    (taken > limit).then(|| format!("{taken} bytes were allocated for {} of input, more than {limit}", input.len()))
}

fn run(target: &Target, seed: u64) -> Result<(), String> {
    let seeds = committed(target.name);
    let mut random = Random::new(seed);
    // The first run also allocates lazily initialised state, so memory is not limited here.
    if let Some(fault) = seeds.iter().find_map(|input| fault(&Target { base_bytes: usize::MAX >> 1, ..*target }, input))
    {
        return Err(format!("a seed of {}: {fault}", target.name));
    }
    let mutations = (0..target.runs).map(|_| mutated(&seeds, &mut random));
    for input in seeds.iter().cloned().chain(mutations) {
        if let Some(fault) = fault(target, &input) {
            let (name, hex) = (target.name, to_hex(&input));
            return Err(format!("{fault}\nseed {seed}; this input alone: OVERFILL_FUZZ_INPUT={name}:{hex}"));
        }
    }
    Ok(())
}

/// Runs the targets and inputs that the environment selects.
fn run_all() -> Result<(), String> {
    if let Ok(text) = std::env::var("OVERFILL_FUZZ_INPUT") {
        let (name, hex) = text.split_once(':').expect("OVERFILL_FUZZ_INPUT=TARGET:HEX");
        let target = TARGETS.iter().find(|target| target.name == name).expect("the name of a target");
        let input = from_hex(hex).expect("an input in hex");
        // Run twice, so that lazily initialised state does not count in the second run.
        return fault(target, &input).and_then(|_| fault(target, &input)).map_or(Ok(()), Err);
    }
    let seeds = match std::env::var("OVERFILL_FUZZ_SEED") {
        Ok(seed) => vec![seed.parse().expect("OVERFILL_FUZZ_SEED=NUMBER")],
        Err(_) => vec![FIXED_SEED, RandomState::new().hash_one(0)],
    };
    let only = std::env::var("OVERFILL_FUZZ_TARGET").ok();
    let mut faults = Vec::new();
    for target in TARGETS.iter().filter(|target| only.as_ref().is_none_or(|only| only == target.name)) {
        // Bypasses the test's output capture. If a target aborts the process (stack or memory), this line names it.
        let _ = writeln!(std::io::stderr(), "{} with OVERFILL_FUZZ_SEED of {seeds:?}", target.name);
        faults.extend(seeds.iter().find_map(|seed| run(target, *seed).err()));
    }
    if faults.is_empty() { Ok(()) } else { Err(faults.join("\n\n")) }
}

/// The only test in this process, since other tests would also allocate.
#[test]
fn every_target_holds() {
    // The default hook would print each panic a second time, without its input.
    std::panic::set_hook(Box::new(|info| PANIC.set(info.location().map(|at| format!("({at})")))));
    let result = run_all();
    drop(std::panic::take_hook());
    if let Err(fault) = result {
        panic!("{fault}");
    }
}
