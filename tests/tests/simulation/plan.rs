//! Plan of a simulation. All events are drawn from the seed before it starts.

use std::{ops::Range, sync::Arc, time::Duration};

use overfill_kv::{Mode, Role};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use crate::{client::Ask, content::output, node::Size};

/// Time limit that no fault exhausts, for requests that must succeed.
pub const LONG: Duration = Duration::from_secs(90);

/// Request limit that is never reached.
const MANY: usize = 256;

/// Plan of a simulation.
pub struct Plan {
    /// Time step of the simulated network.
    pub tick: Duration,
    /// Range of message latencies.
    pub latency: Range<Duration>,
    /// Capacity of a connection in segments.
    pub tcp_capacity: usize,
    /// Whether hosts run in a random order in each step.
    pub random_order: bool,
    /// Nodes with their names and roles. If `sheltered`, the first node of each role suffers no fault.
    pub nodes: Vec<(String, Role, Size)>,
    /// Idle timeout of KV connections.
    pub idle_timeout: Duration,
    /// Timeout for the hello of a KV connection.
    pub hello_timeout: Duration,
    /// Maximum frame size in bytes.
    pub max_frame_bytes: usize,
    /// Router's timeout for a silent node.
    pub node_timeout: Duration,
    /// Router's timeout for the next token.
    pub progress_timeout: Duration,
    /// Maximum time in the router's queue.
    pub max_queue: Duration,
    /// Maximum number of requests that the router runs on the nodes.
    pub max_running: usize,
    /// Maximum number of attempts per request.
    pub max_attempts: u32,
    /// Whether nodes register themselves. Otherwise the router's settings list them.
    pub discovery: bool,
    /// Whether one node of each role suffers no fault. Requests with enough time must then succeed.
    pub sheltered: bool,
    /// Fraction of the KV connections on which a bit is flipped.
    pub damage: f64,
    /// Share of the answers that the full model scores.
    pub watch_share: f64,
    /// Events with their times.
    pub events: Vec<(Duration, Event)>,
    /// Time after which there are no more faults.
    pub calm_from: Duration,
}

/// An event. Hosts are identified by name.
#[derive(Clone, Debug)]
pub enum Event {
    /// A client sends a request. If a time is given, it disconnects after it.
    Ask(Ask, Option<Duration>),
    /// No messages pass between two hosts for a time.
    Partition(String, String, Duration),
    /// No messages pass in one direction for a time.
    OneWay(String, String, Duration),
    /// Messages between two hosts are held for a time, then delivered.
    Hold(String, String, Duration),
    /// A process crashes, and restarts after a time.
    Crash(String, Duration),
    /// A machine loses power without closing its connections, and restarts after a time.
    PowerOff(String, Duration),
    /// A node is asked to drain within the first time. It restarts after the second.
    Drain(String, Duration, Duration),
    /// An engine hangs for a time.
    Stuck(String, Duration),
    /// An engine is slower by this factor for a time.
    Slow(String, u32, Duration),
    /// Discovery loses a node for a time.
    Forget(String, Duration),
    /// Discovery loses all nodes for a time.
    ForgetAll(Duration),
    /// A recorded KV connection is replayed. A high number in 0..1 selects a late one.
    Ghost(f64),
}

fn millis(rng: &mut StdRng, range: Range<u64>) -> Duration {
    Duration::from_millis(rng.random_range(range))
}

/// Draws the duration of a fault: shorter than all timeouts, about as long, or longer.
fn trouble(rng: &mut StdRng) -> Duration {
    match rng.random_range(0..3) {
        0 => millis(rng, 5..200),
        1 => millis(rng, 200..1500),
        _ => millis(rng, 1500..5000),
    }
}

/// Draws an item of a list.
fn one<T: Clone>(rng: &mut StdRng, list: &[T]) -> T {
    list[rng.random_range(0..list.len())].clone()
}

/// Draws prompts. Some share a beginning, and some continue an earlier answer.
pub struct Prompts {
    beginnings: Vec<Vec<u32>>,
    /// Earlier prompts with their answers.
    said: Vec<Vec<u32>>,
}

impl Prompts {
    /// Draws the shared beginnings.
    pub fn new(rng: &mut StdRng) -> Self {
        Self { beginnings: (0..3).map(|_| letters(rng, 64)).collect(), said: Vec::new() }
    }

    /// Draws the next prompt. Its answer will have up to `max_tokens` tokens.
    pub fn next(&mut self, rng: &mut StdRng, max_tokens: u32) -> Arc<[u32]> {
        let mut prompt = match rng.random_bool(0.3) && !self.said.is_empty() {
            true => one(rng, &self.said),
            false => {
                let mut beginning = one(rng, &self.beginnings);
                beginning.truncate(rng.random_range(0..=64));
                beginning
            }
        };
        let tail = rng.random_range(1..30);
        prompt.extend(letters(rng, tail));
        // The smallest node has KV for 128 tokens.
        prompt.truncate(100.min(126 - max_tokens as usize));
        self.said.push([&*prompt, &output(&prompt, max_tokens, false)].concat());
        prompt.into()
    }
}

fn letters(rng: &mut StdRng, n: usize) -> Vec<u32> {
    (0..n).map(|_| u32::from(b'a') + 3 + rng.random_range(0..26)).collect()
}

/// Draws a request with time limit `time`.
pub fn ask(rng: &mut StdRng, prompts: &mut Prompts, time: Duration) -> Ask {
    let pause = if rng.random_bool(0.1) { millis(rng, 5..150) } else { Duration::ZERO };
    let mode = one(rng, &[Mode::Draft, Mode::Draft, Mode::Refresh, Mode::Exact]);
    let most = if mode.extends() && rng.random_bool(0.5) { 80 } else { 26 };
    let max_tokens = if rng.random_bool(0.05) { 1 } else { rng.random_range(2..most) };
    Ask {
        prompt: prompts.next(rng, max_tokens),
        max_tokens,
        mode,
        time,
        ignore_eos: rng.random_bool(0.3),
        pause,
        tenant: one(rng, &["a", "b", "c"]),
        priority: rng.random_range(0..2),
    }
}

impl Plan {
    /// Draws a plan.
    pub fn new(rng: &mut StdRng, prompts: &mut Prompts) -> Self {
        let sheltered = rng.random_bool(0.4);
        let discovery = rng.random_bool(0.5);
        let nodes = nodes(rng);
        let calm_from = millis(rng, 1000..6000);
        let mut events = requests(rng, prompts, sheltered, calm_from);
        faults(rng, &nodes, sheltered, discovery, calm_from, &mut events);
        events.sort_by_key(|(at, _)| *at);
        let max_running = if sheltered { MANY } else { one(rng, &[1, 2, 4, MANY]) };
        let latency = millis(rng, 0..4)..millis(rng, 4..40);
        Self {
            tick: one(rng, &[2, 5, 5, 10].map(Duration::from_millis)),
            latency,
            tcp_capacity: one(rng, &[64, 1024]),
            random_order: rng.random_bool(0.5),
            nodes,
            idle_timeout: millis(rng, 600..1500),
            hello_timeout: millis(rng, 500..2000),
            max_frame_bytes: rng.random_range(1..1500),
            node_timeout: millis(rng, 1000..3000),
            progress_timeout: millis(rng, 1500..4000),
            max_running,
            // A shorter limit would reject requests that only wait behind others.
            max_queue: if sheltered || max_running < MANY { LONG } else { millis(rng, 1000..8000) },
            max_attempts: if sheltered { 1000 } else { rng.random_range(1..6) },
            discovery,
            sheltered,
            damage: if rng.random_bool(0.3) { 0.2 } else { 0.0 },
            watch_share: if rng.random_bool(0.5) { 1.0 } else { 0.0 },
            events,
            calm_from,
        }
    }
}

fn nodes(rng: &mut StdRng) -> Vec<(String, Role, Size)> {
    let decoders = rng.random_range(2..=3);
    let names = (0..2).map(|i| (format!("prefill-{i}"), Role::Prefill));
    let layers = one(rng, &[vec![0, 1, 2], vec![0, 2], vec![1]]);
    let windows =
        one(rng, &[[None; 3], [Some(40), None, Some(24)], [None, Some(20), None], [Some(50), Some(17), Some(50)]]);
    names
        .chain((0..decoders).map(|i| (format!("decode-{i}"), Role::Decode)))
        .map(|(name, role)| {
            // Fast nodes finish most requests before a fault. Slow ones are hit in the middle of requests.
            let slowest = one(rng, &[30, 120]);
            let size = Size {
                blocks: rng.random_range(8..30),
                max_running: rng.random_range(1..5),
                max_waiting: rng.random_range(1..8),
                max_batch_tokens: rng.random_range(16..80),
                step: millis(rng, 1..slowest),
                layers: layers.clone(),
                windows,
            };
            (name, role, size)
        })
        .collect()
}

fn requests(rng: &mut StdRng, prompts: &mut Prompts, sheltered: bool, calm_from: Duration) -> Vec<(Duration, Event)> {
    let count = rng.random_range(2..10);
    let request = |_| {
        let at = millis(rng, 100..calm_from.as_millis() as u64);
        let time = match rng.random_range(0..4) {
            0 => millis(rng, 50..1000),
            _ if sheltered => LONG,
            _ => millis(rng, 1000..6000),
        };
        let leaves = rng.random_bool(0.25).then(|| trouble(rng) / 2);
        (at, Event::Ask(ask(rng, prompts, time), leaves))
    };
    (0..count).map(request).collect()
}

fn faults(
    rng: &mut StdRng,
    nodes: &[(String, Role, Size)],
    sheltered: bool,
    discovery: bool,
    calm_from: Duration,
    events: &mut Vec<(Duration, Event)>,
) {
    let names: Vec<&str> = nodes.iter().map(|(name, ..)| name.as_str()).collect();
    let is_spared = |name: &str| sheltered && name.ends_with("-0") || name == "router";
    let hosts: Vec<&str> = names.iter().copied().chain(["router"]).collect();
    for _ in 0..rng.random_range(0..10) {
        let at = millis(rng, 0..calm_from.as_millis() as u64);
        let long = trouble(rng).min(calm_from - at);
        let (node, a, b) = (one(rng, &names), one(rng, &hosts), one(rng, &hosts));
        let is_link = a != b && !(sheltered && is_spared(a) && is_spared(b));
        let owned = str::to_owned;
        let event = match rng.random_range(0..22) {
            0..3 if is_link => Event::Partition(owned(a), owned(b), long),
            3..6 if is_link => Event::OneWay(owned(a), owned(b), long),
            6..9 if is_link => Event::Hold(owned(a), owned(b), long),
            9..12 if !is_spared(node) => Event::Crash(owned(node), long),
            12..14 if !is_spared(node) => Event::PowerOff(owned(node), long),
            14 if !is_spared(node) => Event::Drain(owned(node), trouble(rng) / 2, long),
            15 if !is_spared(node) => Event::Stuck(owned(node), long),
            16 => Event::Slow(owned(node), rng.random_range(2..20), long),
            17 if discovery => Event::Forget(owned(node), long),
            18 if discovery => Event::ForgetAll(long),
            19 if !sheltered => Event::Crash(owned("router"), long),
            _ => Event::Ghost(rng.random()),
        };
        events.push((at, event));
    }
}

/// Returns the generator for a seed's plan and checks. The code under test draws from its own generators.
pub fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed ^ 0x6f76_6572_6669_6c6c)
}
