//! The threads that compute a step.

use std::{
    hint,
    sync::atomic::{AtomicBool, Ordering},
};

use rayon::Yield;

/// Runs `step` within rayon's pool, whose threads look for its work without a pause until it ends, and then go to sleep.
///
/// A step shares out a few hundred pieces of work with a few microseconds of one thread's work between them. Threads that
/// fall asleep there take longer to wake than that.
pub(super) fn keep_awake<T: Send>(step: impl FnOnce() -> T + Send) -> T {
    let done = AtomicBool::new(false);
    rayon::scope(|scope| {
        // Set whichever way `step` ends.
        struct SetAtEnd<'a>(&'a AtomicBool);
        impl Drop for SetAtEnd<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Release);
            }
        }
        let _done = SetAtEnd(&done);
        for _ in 1..rayon::current_num_threads() {
            scope.spawn(|_| {
                while !done.load(Ordering::Acquire) {
                    if rayon::yield_now() != Some(Yield::Executed) {
                        hint::spin_loop();
                    }
                }
            });
        }
        step()
    })
}
