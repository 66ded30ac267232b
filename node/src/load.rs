//! What a node is doing now: counted where it happens, watched by routers, shown as gauges.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use overfill_kv::BlockPool;
use tokio::sync::watch;
use tracing::info;

use overfill_cluster::Health;

use crate::NodeMetrics;

/// How old a watched load may be when nothing has told of a change.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// A snapshot of the node's load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Blocks that a new request could have.
    pub free_blocks: usize,
    /// Requests that hold blocks.
    pub running: usize,
    /// Requests accepted that hold none.
    pub waiting: usize,
    /// Prompt tokens accepted but not computed.
    pub queued_tokens: u64,
    /// Handoffs whose transfer has not ended.
    pub open_handoffs: usize,
    /// KV bytes held for handoffs whose request has gone.
    pub stranded_bytes: u64,
    /// Nothing new is taken.
    pub draining: bool,
    /// The engine has been at one step for longer than it may.
    pub stalled: bool,
}

impl Load {
    /// Does nothing run, wait or change hands?
    pub fn is_idle(&self) -> bool {
        self.running + self.waiting + self.open_handoffs == 0
    }
}

/// Open handoffs and stranded bytes of a receiving side, which counts them itself.
pub type Receiving = Box<dyn Fn() -> (usize, u64) + Send + Sync>;

/// Counters behind [`Load`], shared by the engine, the service and the handoffs.
pub struct LoadState {
    pool: BlockPool,
    metrics: NodeMetrics,
    running: AtomicUsize,
    waiting: AtomicUsize,
    queued_tokens: AtomicU64,
    open_handoffs: AtomicUsize,
    routers: AtomicUsize,
    router_has_joined: AtomicBool,
    stranded_bytes: AtomicU64,
    receiving: Option<Receiving>,
    draining: AtomicBool,
    /// What the engine's steps are measured against.
    start: Instant,
    step_timeout: Duration,
    /// Nanoseconds after `start` at which the step now under way began; 0 between steps.
    step_began: AtomicU64,
    watch: watch::Sender<Load>,
}

impl LoadState {
    /// Of an idle node, whose engine may take `step_timeout` for a step.
    pub fn new(
        pool: BlockPool,
        metrics: NodeMetrics,
        receiving: Option<Receiving>,
        step_timeout: Duration,
    ) -> Arc<Self> {
        let state = Self {
            pool,
            metrics,
            running: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            queued_tokens: AtomicU64::new(0),
            open_handoffs: AtomicUsize::new(0),
            routers: AtomicUsize::new(0),
            router_has_joined: AtomicBool::new(false),
            stranded_bytes: AtomicU64::new(0),
            receiving,
            draining: AtomicBool::new(false),
            start: Instant::now(),
            step_timeout,
            step_began: AtomicU64::new(0),
            watch: watch::Sender::new(Load::default()),
        };
        state.publish();
        Arc::new(state)
    }

    /// The load now.
    pub fn load(&self) -> Load {
        let (receiving, stranded) = self.receiving.as_ref().map_or((0, 0), |receiving| receiving());
        Load {
            free_blocks: self.pool.available(),
            running: self.running.load(Relaxed),
            waiting: self.waiting.load(Relaxed),
            queued_tokens: self.queued_tokens.load(Relaxed),
            open_handoffs: self.open_handoffs.load(Relaxed) + receiving,
            stranded_bytes: self.stranded_bytes.load(Relaxed) + stranded,
            draining: self.draining.load(Relaxed),
            stalled: self.is_stalled(),
        }
    }

    /// The load, and its changes.
    pub fn watch(&self) -> watch::Receiver<Load> {
        self.watch.subscribe()
    }

    /// Tells the watchers, if anything has changed.
    pub fn publish(&self) {
        let load = self.load();
        self.watch.send_if_modified(|last| std::mem::replace(last, load) != load);
    }

    /// Resolves when the load is another one than `watch` has seen last.
    ///
    /// Looks by itself now and then: a block that the KV plane lets go of tells nobody.
    pub async fn changed(&self, watch: &mut watch::Receiver<Load>) {
        loop {
            tokio::select! {
                // The sender is in `self`, so there is no other outcome than a change.
                _ = watch.changed() => return,
                () = tokio::time::sleep(LOOK_INTERVAL) => self.publish(),
            }
        }
    }

    /// Resolves when nothing runs, waits or changes hands any more.
    pub async fn drained(&self) {
        let mut watch = self.watch();
        loop {
            if watch.borrow_and_update().is_idle() {
                return;
            }
            self.changed(&mut watch).await;
        }
    }

    /// Sets the gauges.
    pub fn refresh_metrics(&self) {
        let load = self.load();
        self.metrics.requests_running.set(load.running as i64);
        self.metrics.requests_waiting.set(load.waiting as i64);
        self.metrics.kv_cache_usage.set(self.pool.in_use() as f64 / self.pool.total() as f64);
        self.metrics.open_handoffs.set(load.open_handoffs as i64);
        self.metrics.routers.set(self.routers.load(Relaxed) as i64);
        self.metrics.stranded_bytes.set(load.stranded_bytes as i64);
    }

    /// The metrics that are counted.
    pub fn metrics(&self) -> &NodeMetrics {
        &self.metrics
    }

    /// Takes nothing new from now on.
    pub fn drain(&self) {
        self.draining.store(true, Relaxed);
        self.publish();
    }

    /// Has [`drain`](Self::drain) been called?
    pub fn is_draining(&self) -> bool {
        self.draining.load(Relaxed)
    }

    /// The engine begins a step: everything it does between two looks for new work.
    pub fn step_began(&self) {
        let now = self.start.elapsed().as_nanos() as u64;
        self.step_began.store(now.max(1), Relaxed);
    }

    /// And ends it.
    pub fn step_ended(&self) {
        self.step_began.store(0, Relaxed);
    }

    /// Has the engine been at one step for longer than it may?
    ///
    /// An engine that hangs can't say so. Whoever asks is the watchdog: the routers' load streams, at least once a
    /// second, and `/ready`.
    pub fn is_stalled(&self) -> bool {
        match self.step_began.load(Relaxed) {
            0 => false,
            began => self.start.elapsed().saturating_sub(Duration::from_nanos(began)) > self.step_timeout,
        }
    }

    /// A place among at most `max` waiting requests; `None` if there is none.
    pub fn try_wait(self: &Arc<Self>, max: usize) -> Option<Counted> {
        let more = |n| (n < max).then_some(n + 1);
        self.waiting.fetch_update(Relaxed, Relaxed, more).ok()?;
        Some(Counted { state: self.clone(), what: What::Waiting })
    }

    /// Counts a request as waiting, however many do, until the guard is dropped.
    pub fn count_waiting(self: &Arc<Self>) -> Counted {
        self.waiting.fetch_add(1, Relaxed);
        Counted { state: self.clone(), what: What::Waiting }
    }

    /// Counts a request as running until the guard is dropped.
    pub fn count_running(self: &Arc<Self>) -> Counted {
        self.running.fetch_add(1, Relaxed);
        Counted { state: self.clone(), what: What::Running }
    }

    /// Counts a handoff as open until the guard is dropped.
    pub fn count_handoff(self: &Arc<Self>) -> Counted {
        self.open_handoffs.fetch_add(1, Relaxed);
        Counted { state: self.clone(), what: What::Handoff }
    }

    /// Counts a router that has joined the node, and watches its load, until the guard is dropped.
    pub fn count_router(self: &Arc<Self>) -> Counted {
        let routers = self.routers.fetch_add(1, Relaxed) + 1;
        self.router_has_joined.store(true, Relaxed);
        info!(routers, "a router has joined this node");
        Counted { state: self.clone(), what: What::Router }
    }

    /// Would the node serve a request now? Not before a router has joined it, for nobody else sends it any. A node that
    /// its routers leave later stays ready: it can't be at fault for all of them.
    pub fn health(&self) -> Health {
        match (self.is_draining(), self.is_stalled(), self.router_has_joined.load(Relaxed)) {
            (true, _, _) => Health::NotServing("draining".into()),
            (_, true, _) => Health::NotServing("the engine does not get on with its work".into()),
            (_, _, false) => Health::NotServing("no router has joined this node yet".into()),
            (false, false, true) => Health::Serving,
        }
    }

    /// Counts bytes as stranded until the guard is dropped.
    pub fn count_stranded(self: &Arc<Self>, bytes: u64) -> Counted {
        self.stranded_bytes.fetch_add(bytes, Relaxed);
        Counted { state: self.clone(), what: What::Stranded(bytes) }
    }

    /// Counts tokens as queued until they are taken off the guard, or it is dropped.
    pub fn count_tokens(self: &Arc<Self>, tokens: usize) -> QueuedTokens {
        self.queued_tokens.fetch_add(tokens as u64, Relaxed);
        QueuedTokens { state: self.clone(), left: tokens as u64 }
    }
}

enum What {
    Running,
    Waiting,
    Handoff,
    Router,
    Stranded(u64),
}

/// Something that counts for as long as this lives.
pub struct Counted {
    state: Arc<LoadState>,
    what: What,
}

impl Drop for Counted {
    fn drop(&mut self) {
        match self.what {
            What::Running => drop(self.state.running.fetch_sub(1, Relaxed)),
            What::Waiting => drop(self.state.waiting.fetch_sub(1, Relaxed)),
            What::Handoff => drop(self.state.open_handoffs.fetch_sub(1, Relaxed)),
            What::Router => {
                let routers = self.state.routers.fetch_sub(1, Relaxed) - 1;
                info!(routers, "a router has left this node");
            }
            What::Stranded(bytes) => drop(self.state.stranded_bytes.fetch_sub(bytes, Relaxed)),
        }
        self.state.publish();
    }
}

/// Tokens of one prompt that are still to be computed.
pub struct QueuedTokens {
    state: Arc<LoadState>,
    left: u64,
}

impl QueuedTokens {
    /// `tokens` more have been computed.
    pub fn computed(&mut self, tokens: usize) {
        let done = self.left.min(tokens as u64);
        self.left -= done;
        self.state.queued_tokens.fetch_sub(done, Relaxed);
    }
}

impl Drop for QueuedTokens {
    fn drop(&mut self) {
        self.computed(usize::MAX);
        self.state.publish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_takes_too_long_is_a_stall_until_it_ends() {
        let new = |limit| LoadState::new(BlockPool::new(4), NodeMetrics::new("m").unwrap(), None, limit);
        let (strict, lenient) = (new(Duration::ZERO), new(Duration::MAX));
        for state in [&strict, &lenient] {
            assert!(!state.load().stalled);
            state.step_began();
        }
        while !strict.is_stalled() {
            std::thread::yield_now();
        }
        assert!(strict.load().stalled && !lenient.load().stalled);
        strict.step_ended();
        assert!(!strict.load().stalled);
    }

    #[test]
    fn a_node_is_ready_from_its_first_router_on() {
        let state = LoadState::new(BlockPool::new(4), NodeMetrics::new("m").unwrap(), None, Duration::MAX);
        assert_eq!(state.health(), Health::NotServing("no router has joined this node yet".into()));
        let routers = (state.count_router(), state.count_router());
        state.refresh_metrics();
        assert_eq!((state.health(), state.metrics().routers.get()), (Health::Serving, 2));
        drop(routers);
        state.refresh_metrics();
        assert_eq!((state.health(), state.metrics().routers.get()), (Health::Serving, 0));
        state.drain();
        assert_eq!(state.health(), Health::NotServing("draining".into()));
    }

    #[test]
    fn what_is_counted_returns_to_zero() {
        let state = LoadState::new(BlockPool::new(4), NodeMetrics::new("m").unwrap(), None, Duration::MAX);
        let idle = state.load();
        let watch = state.watch();
        {
            let _first = state.try_wait(1).unwrap();
            assert!(state.try_wait(1).is_none());
            let mut tokens = state.count_tokens(10);
            tokens.computed(4);
            let _others = (state.count_running(), state.count_handoff(), state.count_stranded(7));
            let load = state.load();
            assert_eq!((load.waiting, load.running, load.open_handoffs), (1, 1, 1));
            assert_eq!((load.queued_tokens, load.stranded_bytes), (6, 7));
        }
        assert_eq!(state.load(), idle);
        assert_eq!(*watch.borrow(), idle);
    }
}
