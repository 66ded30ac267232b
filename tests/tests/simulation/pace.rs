//! Current speed of an engine.

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, time::sleep};

/// Duration of a step, which a test may stretch. Clones share it.
#[derive(Clone)]
pub struct Pace {
    usual: Duration,
    state: Arc<watch::Sender<State>>,
}

#[derive(Clone, Copy)]
struct State {
    factor: u32,
    stuck: bool,
}

impl Pace {
    /// Starts with steps of duration `usual`.
    pub fn new(usual: Duration) -> Self {
        Self { usual, state: Arc::new(watch::Sender::new(State { factor: 1, stuck: false })) }
    }

    /// Multiplies the duration of later steps by `factor`.
    pub fn slow_down(&self, factor: u32) {
        self.state.send_modify(|state| state.factor = factor);
    }

    /// While set, no step ends.
    pub fn set_stuck(&self, stuck: bool) {
        self.state.send_modify(|state| state.stuck = stuck);
    }

    /// Waits for the duration of a step.
    pub async fn step(&self) {
        let mut state = self.state.subscribe();
        let factor = state.borrow().factor;
        sleep(self.usual * factor).await;
        // Can't fail, since `self` holds the sender.
        let _ = state.wait_for(|state| !state.stuck).await;
    }
}
