//! The current load of a node: counters that the engine, the service and the handoffs update. Routers watch the load,
//! and metrics export it.

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

/// Interval at which a watched load is refreshed if no change is published.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// A snapshot of the node's load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// KV blocks available to new requests: free and cached blocks.
    pub free_blocks: usize,
    /// Requests that hold blocks.
    pub running: usize,
    /// Accepted requests that hold no blocks.
    pub waiting: usize,
    /// Prompt tokens that are accepted but not computed yet.
    pub queued_tokens: u64,
    /// Handoffs whose transfer has not ended.
    pub open_handoffs: usize,
    /// KV bytes held for handoffs whose request has ended but whose transfer has not stopped yet.
    pub stranded_bytes: u64,
    /// The node is draining and accepts no requests.
    pub draining: bool,
    /// The current engine step has exceeded the step timeout.
    pub stalled: bool,
    /// Prompt tokens computed per second, a recent mean. 0 before the first prompt; prefill nodes only.
    pub prefill_tokens_per_second: u32,
    /// Duration of a decode step, a recent mean. 0 while nothing is decoded; decode nodes only.
    pub decode_step_microseconds: u32,
}

impl Load {
    /// Whether the node has no running or waiting requests and no open handoffs.
    pub fn is_idle(&self) -> bool {
        self.running + self.waiting + self.open_handoffs == 0
    }
}

/// Returns the open handoffs and the stranded bytes of a decode node's KV receiver.
pub type Receiving = Box<dyn Fn() -> (usize, u64) + Send + Sync>;

/// The counters from which [`Load`] is computed, shared by the engine, the service and the handoffs.
pub struct LoadState {
    pool: BlockPool,
    metrics: NodeMetrics,
    running: AtomicUsize,
    waiting: AtomicUsize,
    queued_tokens: AtomicU64,
    open_handoffs: AtomicUsize,
    routers: AtomicUsize,
    router_has_joined: AtomicBool,
    router_has_sent: AtomicBool,
    prefill_rate: Mean,
    decode_step: Mean,
    stranded_bytes: AtomicU64,
    receiving: Option<Receiving>,
    draining: AtomicBool,
    /// Origin of `step_began`.
    start: Instant,
    step_timeout: Duration,
    /// Start of the current engine step, in nanoseconds after `start`; 0 between steps.
    step_began: AtomicU64,
    watch: watch::Sender<Load>,
}

impl LoadState {
    /// Creates the counters of an idle node. `receiving` counts incoming handoffs; the node counts as stalled when a
    /// step takes longer than `step_timeout`.
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
            router_has_sent: AtomicBool::new(false),
            prefill_rate: Mean::default(),
            decode_step: Mean::default(),
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

    /// Computes the current load.
    pub fn load(&self) -> Load {
        let (receiving, stranded) = self.receiving.as_ref().map_or((0, 0), |receiving| receiving());
        let running = self.running.load(Relaxed);
        Load {
            free_blocks: self.pool.available(),
            running,
            waiting: self.waiting.load(Relaxed),
            queued_tokens: self.queued_tokens.load(Relaxed),
            open_handoffs: self.open_handoffs.load(Relaxed) + receiving,
            stranded_bytes: self.stranded_bytes.load(Relaxed) + stranded,
            draining: self.draining.load(Relaxed),
            stalled: self.is_stalled(),
            prefill_tokens_per_second: self.prefill_rate.get() as u32,
            // An idle node decodes nothing, whatever its last steps took.
            decode_step_microseconds: if running > 0 { (self.decode_step.get() * 1e6) as u32 } else { 0 },
        }
    }

    /// Subscribes to published loads.
    pub fn watch(&self) -> watch::Receiver<Load> {
        self.watch.subscribe()
    }

    /// Computes the current load and publishes it to the watchers if it has changed.
    pub fn publish(&self) {
        let load = self.load();
        self.watch.send_if_modified(|last| std::mem::replace(last, load) != load);
    }

    /// Resolves when the load differs from the last one that `watch` has seen.
    ///
    /// Refreshes the load every second, because some changes are not published, such as blocks freed by the KV plane.
    pub async fn changed(&self, watch: &mut watch::Receiver<Load>) {
        loop {
            tokio::select! {
                // It can't fail: `self` owns the sender.
                _ = watch.changed() => return,
                () = tokio::time::sleep(LOOK_INTERVAL) => self.publish(),
            }
        }
    }

    /// Resolves when the node is idle: [`Load::is_idle`].
    pub async fn drained(&self) {
        let mut watch = self.watch();
        loop {
            if watch.borrow_and_update().is_idle() {
                return;
            }
            self.changed(&mut watch).await;
        }
    }

    /// Sets the gauges to the current load.
    pub fn refresh_metrics(&self) {
        let load = self.load();
        self.metrics.requests_running.set(load.running as i64);
        self.metrics.requests_waiting.set(load.waiting as i64);
        let (cached, held) = (self.pool.cached(), self.pool.in_use());
        let free = self.pool.total().saturating_sub(cached + held);
        for (state, blocks) in [("free", free), ("cached", cached), ("held", held)] {
            self.metrics.kv_blocks.with_label_values(&[state]).set(blocks as i64);
        }
        self.metrics.kv_cache_usage.set(self.pool.in_use() as f64 / self.pool.total() as f64);
        self.metrics.open_handoffs.set(load.open_handoffs as i64);
        self.metrics.routers.set(self.routers.load(Relaxed) as i64);
        self.metrics.stranded_bytes.set(load.stranded_bytes as i64);
    }

    /// Metrics of the node. Counters and histograms are updated where the events happen.
    pub fn metrics(&self) -> &NodeMetrics {
        &self.metrics
    }

    /// Marks the node as draining: it accepts no requests from now on.
    pub fn drain(&self) {
        self.draining.store(true, Relaxed);
        self.publish();
    }

    /// Whether [`drain`](Self::drain) has been called.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Relaxed)
    }

    /// Records that the engine begins a step: all its work between two polls for new requests.
    pub fn step_began(&self) {
        let now = self.start.elapsed().as_nanos() as u64;
        self.step_began.store(now.max(1), Relaxed);
    }

    /// Records that the engine has ended its step.
    pub fn step_ended(&self) {
        self.step_began.store(0, Relaxed);
    }

    /// Records a step of a prefill node that computed `tokens` tokens of `prompts` prompts.
    pub fn prefilled(&self, prompts: usize, tokens: usize, took: Duration) {
        self.metrics.step(prompts, tokens, took);
        if !took.is_zero() {
            self.prefill_rate.add(tokens as f64 / took.as_secs_f64());
        }
    }

    /// Records a step of a decode node that computed a token of each of `sequences` sequences.
    pub fn decoded(&self, sequences: usize, took: Duration) {
        self.metrics.step(sequences, sequences, took);
        self.decode_step.add(took.as_secs_f64());
    }

    /// Whether the current engine step has exceeded the step timeout.
    ///
    /// An engine that hangs can't report it, so the readers of the load act as the watchdog: the load streams to
    /// routers, which call this at least once a second, and `/ready`.
    pub fn is_stalled(&self) -> bool {
        match self.step_began.load(Relaxed) {
            0 => false,
            began => self.start.elapsed().saturating_sub(Duration::from_nanos(began)) > self.step_timeout,
        }
    }

    /// Counts a request as waiting until the guard is dropped. Returns `None` if `max` requests are waiting already.
    pub fn try_wait(self: &Arc<Self>, max: usize) -> Option<Counted> {
        let more = |n| (n < max).then_some(n + 1);
        self.waiting.fetch_update(Relaxed, Relaxed, more).ok()?;
        Some(Counted { state: self.clone(), what: What::Waiting })
    }

    /// Counts a request as waiting until the guard is dropped, without a limit.
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

    /// Counts a router that watches the node's load until the guard is dropped.
    pub fn count_router(self: &Arc<Self>) -> Counted {
        let routers = self.routers.fetch_add(1, Relaxed) + 1;
        self.router_has_joined.store(true, Relaxed);
        info!(routers, "a router has joined this node");
        Counted { state: self.clone(), what: What::Router }
    }

    /// Records that a router sends requests to this node from now on.
    pub fn router_sends(&self) {
        if !self.router_has_sent.swap(true, Relaxed) {
            info!("a router sends requests to this node from now on");
        }
    }

    /// Health of the node for probes. A node is not ready before a router would send it requests, which needs a node of
    /// the other role that may work with it. So a rollout waits until the new nodes can serve. A node stays ready when its
    /// routers or partners leave later, because the node is usually not the cause.
    pub fn health(&self) -> Health {
        let why = match (self.router_has_joined.load(Relaxed), self.router_has_sent.load(Relaxed)) {
            _ if self.is_draining() => "draining",
            _ if self.is_stalled() => "the engine step exceeds the step timeout",
            (false, false) => "no router has joined this node yet",
            (true, false) => "no router knows a node of the other role that may work with this one",
            (_, true) => return Health::Serving,
        };
        Health::NotServing(why.into())
    }

    /// Counts bytes as stranded until the guard is dropped.
    pub fn count_stranded(self: &Arc<Self>, bytes: u64) -> Counted {
        self.stranded_bytes.fetch_add(bytes, Relaxed);
        Counted { state: self.clone(), what: What::Stranded(bytes) }
    }

    /// Counts the tokens of a prompt as queued until they are computed or the guard is dropped.
    pub fn count_tokens(self: &Arc<Self>, tokens: usize) -> QueuedTokens {
        self.queued_tokens.fetch_add(tokens as u64, Relaxed);
        QueuedTokens { state: self.clone(), left: tokens as u64 }
    }
}

/// A recent mean of positive values: each new value has a weight of one eighth. 0 before the first value.
#[derive(Default)]
struct Mean(AtomicU64);

impl Mean {
    fn get(&self) -> f64 {
        f64::from_bits(self.0.load(Relaxed))
    }

    /// Adds a value. Only one thread adds, the engine's.
    fn add(&self, value: f64) {
        let last = self.get();
        let mean = if last > 0.0 { last + (value - last) / 8.0 } else { value };
        self.0.store(mean.to_bits(), Relaxed);
    }
}

enum What {
    Running,
    Waiting,
    Handoff,
    Router,
    Stranded(u64),
}

/// Guard of one counter: dropping it subtracts what it counts.
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

/// Guard for the tokens of one prompt that are not computed yet.
pub struct QueuedTokens {
    state: Arc<LoadState>,
    left: u64,
}

impl QueuedTokens {
    /// Records that `tokens` more tokens have been computed.
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
        let new = |limit| LoadState::new(BlockPool::new(4), NodeMetrics::new("m", "p").unwrap(), None, limit);
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
    fn a_node_is_ready_once_a_router_would_send_it_requests() {
        let state = LoadState::new(BlockPool::new(4), NodeMetrics::new("m", "p").unwrap(), None, Duration::MAX);
        assert_eq!(state.health(), Health::NotServing("no router has joined this node yet".into()));
        let routers = (state.count_router(), state.count_router());
        state.refresh_metrics();
        let unpaired = "no router knows a node of the other role that may work with this one";
        assert_eq!((state.health(), state.metrics().routers.get()), (Health::NotServing(unpaired.into()), 2));
        state.router_sends();
        assert_eq!(state.health(), Health::Serving);
        drop(routers);
        state.refresh_metrics();
        assert_eq!((state.health(), state.metrics().routers.get()), (Health::Serving, 0));
        state.drain();
        assert_eq!(state.health(), Health::NotServing("draining".into()));
    }

    #[test]
    fn what_is_counted_returns_to_zero() {
        let state = LoadState::new(BlockPool::new(4), NodeMetrics::new("m", "p").unwrap(), None, Duration::MAX);
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
