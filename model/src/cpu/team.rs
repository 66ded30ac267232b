//! The threads that compute a step.

use std::{
    cell::Cell,
    hint,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use rayon::Yield;

/// How long a thread that is awake waits for the others to be: about what it takes to wake some. Those that are busy with
/// something else are not waited for any longer.
const PATIENCE: Duration = Duration::from_micros(200);

/// Times that a thread looks for work before it lets other programs go first.
const SPINS: u32 = 100;

/// Runs `step` within rayon's pool; `awake` keeps the pool's other threads looking for its work until it ends. Then they
/// go to sleep.
///
/// A step shares out a few hundred pieces of work, with a few microseconds of one thread's work between them. A thread
/// that fell asleep there would take longer to wake than that.
pub(super) fn run<T: Send>(awake: bool, step: impl FnOnce() -> T + Send) -> T {
    let others = if awake { rayon::current_num_threads() - 1 } else { 0 };
    let team = Team { others, looking: AtomicUsize::new(0), done: AtomicBool::new(false), patience: PATIENCE };
    team.run(step)
}

/// One step's threads.
struct Team {
    /// Threads that are to look for work beside the step.
    others: usize,
    /// Those that do.
    looking: AtomicUsize,
    done: AtomicBool,
    patience: Duration,
}

thread_local! {
    /// Does this thread look for a step's work already?
    static LOOKING: Cell<bool> = const { Cell::new(false) };
}

impl Team {
    fn run<T: Send>(&self, step: impl FnOnce() -> T + Send) -> T {
        let (mut step, mut result) = (Some(step), None);
        let mut once = || result = step.take().map(|step| step());
        self.beside(self.others, &mut once);
        result.expect("`beside` calls it once")
    }

    /// Calls `step` while `others` threads, or as many as are free, look for its work.
    fn beside(&self, others: usize, step: &mut (dyn FnMut() + Send)) {
        if others > 0 {
            // As joins, not spawned tasks: those are allocated. Other threads take the oldest piece of work first, and these are
            // older than the step's own: so the step's thread, waiting for a piece that another has taken, never comes upon one.
            rayon::join(|| self.beside(others - 1, step), || self.look_for_work());
            return;
        }
        /// Says so even if `step` panics: the others are waited for.
        struct SetAtEnd<'a>(&'a AtomicBool);
        impl Drop for SetAtEnd<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Release);
            }
        }
        let _done = SetAtEnd(&self.done);
        // Within the pool even if no thread is beside: work is then shared out without waking this thread for each piece.
        rayon::scope(|_| step());
    }

    fn look_for_work(&self) {
        if LOOKING.replace(true) {
            return;
        }
        self.looking.fetch_add(1, Ordering::Relaxed);
        // The first thing to be found would be the call that wakes the next thread.
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
                // Other processes, such as the other stage's node, may have something to do.
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
