//! Keeps the threads that compute a step awake.

use std::{
    cell::Cell,
    hint,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use rayon::Yield;

/// Maximum time that an awake thread waits for the other threads: about the time needed to wake several. Threads that
/// are busy with something else are not waited for any longer.
const PATIENCE: Duration = Duration::from_micros(200);

/// Number of unsuccessful looks for work before a thread yields to other programs.
const SPINS: u32 = 100;

/// Runs `step` within rayon's pool. With `awake`, the pool's other threads keep looking for the step's work until it
/// ends, then go to sleep.
///
/// A step distributes a few hundred pieces of work, with a few microseconds of single-threaded work between them. A
/// thread that fell asleep in between would take longer than that to wake.
pub(super) fn run<T: Send>(awake: bool, step: impl FnOnce() -> T + Send) -> T {
    let others = if awake { rayon::current_num_threads() - 1 } else { 0 };
    let team = Team { others, looking: AtomicUsize::new(0), done: AtomicBool::new(false), patience: PATIENCE };
    team.run(step)
}

/// The threads of one step.
struct Team {
    /// Number of threads that should look for the step's work.
    others: usize,
    /// Number of threads that have begun to look.
    looking: AtomicUsize,
    done: AtomicBool,
    patience: Duration,
}

thread_local! {
    /// Whether this thread is already looking for a step's work.
    static LOOKING: Cell<bool> = const { Cell::new(false) };
}

impl Team {
    fn run<T: Send>(&self, step: impl FnOnce() -> T + Send) -> T {
        let (mut step, mut result) = (Some(step), None);
        let mut once = || result = step.take().map(|step| step());
        self.beside(self.others, &mut once);
        result.expect("`beside` calls it once")
    }

    /// Calls `step` while up to `others` free threads look for its work.
    fn beside(&self, others: usize, step: &mut (dyn FnMut() + Send)) {
        if others > 0 {
            // Uses joins because spawning allocates. Other threads take the oldest work first, and these joins are
            // older than the step's own work. So the step's thread, while it waits for work that another thread took,
            // never picks up one of these joins.
            rayon::join(|| self.beside(others - 1, step), || self.look_for_work());
            return;
        }
        /// Sets the flag even if `step` panics, because the joins wait for the other threads.
        struct SetAtEnd<'a>(&'a AtomicBool);
        impl Drop for SetAtEnd<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Release);
            }
        }
        let _done = SetAtEnd(&self.done);
        // Runs within the pool even without other threads: distributing work then does not wake this thread for each
        // piece.
        rayon::scope(|_| step());
    }

    fn look_for_work(&self) {
        if LOOKING.replace(true) {
            return;
        }
        self.looking.fetch_add(1, Ordering::Relaxed);
        // The first work to be found would be the join that wakes the next thread, so wait until all threads are awake.
        let began = Instant::now();
        while !self.done() && self.looking.load(Ordering::Relaxed) < self.others && began.elapsed() < self.patience {
            hint::spin_loop();
        }
        let mut fruitless = 0_u32;
        while !self.done() {
            if rayon::yield_now() == Some(Yield::Executed) {
                fruitless = 0;
            } else if fruitless < SPINS {
                fruitless += 1;
                hint::spin_loop();
            } else {
                // Lets other processes run, such as the other stage's node.
                std::thread::yield_now();
            }
        }
        LOOKING.set(false);
    }

    fn done(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use rayon::{ThreadPoolBuilder, prelude::*};

    use super::*;

    #[test]
    fn a_step_gives_its_result_with_threads_beside_and_without() {
        for awake in [false, true] {
            assert_eq!(run(awake, || (0..1000_u64).into_par_iter().sum::<u64>()), 499_500);
        }
    }

    #[test]
    fn all_threads_look_for_work() {
        let pool = ThreadPoolBuilder::new().num_threads(4).build().unwrap();
        let patience = Duration::from_secs(20);
        for _ in 0..20 {
            let team = Team { others: 3, looking: AtomicUsize::new(0), done: AtomicBool::new(false), patience };
            let looking = pool.install(|| {
                team.run(|| {
                    let began = Instant::now();
                    while team.looking.load(Ordering::Relaxed) < 3 && began.elapsed() < patience / 2 {
                        std::thread::yield_now();
                    }
                    team.looking.load(Ordering::Relaxed)
                })
            });
            assert_eq!(looking, 3);
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
