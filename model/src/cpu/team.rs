//! The threads that compute a step.

use std::{
    hint,
    sync::atomic::{AtomicBool, Ordering},
};

use rayon::Yield;

/// Runs `step` within rayon's pool; `awake` keeps the pool's other threads looking for its work until it ends. Then they
/// go to sleep.
///
/// A step shares out a few hundred pieces of work, with a few microseconds of one thread's work between them. A thread
/// that fell asleep there would take longer to wake than that.
pub(super) fn run<T: Send>(awake: bool, step: impl FnOnce() -> T + Send) -> T {
    let others = if awake { rayon::current_num_threads() - 1 } else { 0 };
    let (mut step, mut result) = (Some(step), None);
    let mut once = || result = step.take().map(|step| step());
    beside(others, &AtomicBool::new(false), &mut once);
    result.expect("`beside` calls it once")
}

/// Calls `step` while `others` threads, or as many as are free, look for its work.
fn beside(others: usize, done: &AtomicBool, step: &mut (dyn FnMut() + Send)) {
    if others > 0 {
        // As joins, not spawned tasks: those are allocated.
        rayon::join(|| beside(others - 1, done, step), || look_for_work(done));
        return;
    }
    /// Says so even if `step` panics: the others are waited for.
    struct SetAtEnd<'a>(&'a AtomicBool);
    impl Drop for SetAtEnd<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Release);
        }
    }
    let _done = SetAtEnd(done);
    // Within the pool even if no thread is beside: work is then shared out without waking this thread for each piece.
    rayon::scope(|_| step());
}

fn look_for_work(done: &AtomicBool) {
    while !done.load(Ordering::Acquire) {
        if rayon::yield_now() != Some(Yield::Executed) {
            hint::spin_loop();
        }
    }
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::*;

    #[test]
    fn a_step_gives_its_result_with_threads_beside_and_without() {
        for awake in [false, true] {
            assert_eq!(run(awake, || (0..1000_u64).into_par_iter().sum::<u64>()), 499_500);
        }
    }

    #[test]
    fn a_panic_ends_the_step_and_the_threads_beside() {
        for awake in [false, true] {
            let caught = std::panic::catch_unwind(|| run(awake, || assert!(hint::black_box(false), "as expected")));
            assert!(caught.is_err());
            assert_eq!(run(awake, || 7), 7);
        }
    }
}
