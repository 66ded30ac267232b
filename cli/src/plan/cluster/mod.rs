//! A cluster in simulated time: what a plan is judged by.
//!
//! Closed formulas of queueing theory need assumptions that do not hold here: prompts share a step, an answer's speed
//! depends on its neighbours, and a request holds a place at a decode node while it waits for a prefill node. And they
//! give means, while limits are percentiles. So the plan replays some thousand requests event by event. What decides is
//! the code that also runs in the services: the router's choice of nodes, the prefill scheduler with its measured pace,
//! and the decode scheduler with its preemption. What takes time comes from the profile.
//!
//! - The router admits as many sequences as the nodes compute at once, first come, first served.
//! - A decode node reserves blocks between two steps. Then the prompt goes to the prefill node.
//! - A prefill node computes chunks of prompts in steps. The KV of a step travels while it is computed. One prefill node
//!   sends one byte at a time.
//! - A decode node computes one token for every sequence in its batch per step.
//!
//! Not simulated: failures, several routers, priorities and tenants, and the delay of load reports.

mod colocated;
mod decode;
mod histogram;
mod outcome;
mod prefill;
mod seats;
#[cfg(test)]
pub mod tests;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use overfill_kv::blocks_for;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::curve::StepCurve;
use super::mix::{Ask, Mix};
use super::profile::{ModelProfile, Overhead, Profile};
use colocated::ColocatedNode;
use decode::DecodeNode;
use prefill::PrefillNode;

pub use histogram::Histogram;
use outcome::Recorder;
pub use outcome::{LEGS, Outcome, Shares};

/// Looks at the nodes while the measured requests arrive.
const SAMPLES: f64 = 1000.0;

/// How the nodes are arranged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Prefill nodes and decode nodes.
    TwoStage {
        /// Number of prefill nodes.
        prefill: usize,
        /// Number of decode nodes.
        decode: usize,
    },
    /// Nodes that do both with one model.
    Colocated {
        /// Number of nodes.
        nodes: usize,
    },
}

/// Limits of the engines and of the router.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EngineLimits {
    /// Maximum number of prompt tokens in one step of a prefill node.
    pub max_batch_tokens: usize,
    /// Target time of one step of a prefill node.
    pub step_target: Duration,
    /// Maximum number of prompts that a prefill node computes at once.
    pub prefill_running: usize,
    /// Maximum number of requests that hold blocks on a decode node.
    pub decode_running: usize,
    /// Maximum number of sequences that the router lets run.
    pub router_running: usize,
}

/// A model on a machine.
#[derive(Clone, Debug)]
pub struct NodeModel {
    /// Steps of a prefill node.
    pub prefill: StepCurve,
    /// Steps of a decode node.
    pub decode: StepCurve,
    /// Capacity of the KV cache, in blocks.
    pub kv_blocks: usize,
    /// Equally likely factors on the duration of a prefill step.
    pub prefill_spread: Vec<f64>,
    /// The same for decode steps.
    pub decode_spread: Vec<f64>,
    /// Added to a decode step by its number of sequences.
    pub step_overhead: Option<StepCurve>,
    /// Equally likely values of what serving adds to the first token, and between the first two, in seconds.
    pub request_seconds: Vec<f64>,
    /// See [`request_seconds`](Self::request_seconds).
    pub handoff_seconds: Vec<f64>,
}

impl NodeModel {
    /// The model on the profile's machine. `None` if the profile lists no steps.
    pub fn new(profile: &Profile, model: &ModelProfile) -> Option<Self> {
        let (prefill, decode) = model.curves()?;
        let Overhead { request_seconds, handoff_seconds, steps } = profile.overhead.clone();
        Some(Self {
            prefill,
            decode,
            kv_blocks: profile.kv_blocks(),
            prefill_spread: profile.prefill_spread.clone(),
            decode_spread: profile.decode_spread.clone(),
            step_overhead: StepCurve::fit(&steps),
            request_seconds,
            handoff_seconds,
        })
    }

    /// Duration in seconds of a decode step of `sequences` that read `context` tokens of KV in total, with the work
    /// between steps.
    pub fn decode_seconds(&self, sequences: usize, context: usize) -> f64 {
        let rows = sequences as f64;
        let overhead = self.step_overhead.as_ref().map_or(0.0, |curve| curve.base(rows));
        self.decode.seconds(rows, context as f64) + overhead
    }
}

/// Draws one of equally likely values; `none` if there are none.
pub fn draw(values: &[f64], none: f64, rng: &mut StdRng) -> f64 {
    match values.len() {
        0 => none,
        count => values[rng.random_range(0..count)],
    }
}

/// A cluster.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Number and kind of nodes.
    pub layout: Layout,
    /// Prefill nodes, or all nodes of a colocated cluster.
    pub prefill: NodeModel,
    /// Decode nodes. Not used in a colocated cluster.
    pub decode: NodeModel,
    /// Speed of a prefill node's handoffs, in bytes per second.
    pub transfer_bytes_per_second: f64,
    /// Size of the KV of one token, in bytes.
    pub kv_bytes_per_token: f64,
    /// Limits of the engines and the router.
    pub limits: EngineLimits,
    /// All nodes share one machine: a step takes longer by the number of nodes that compute when it begins.
    pub one_machine: bool,
}

/// The load and how much of it is measured.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Requests per second.
    pub rate: f64,
    /// Requests before the measured ones, which bring the cluster to its usual load.
    pub warm_up: usize,
    /// Number of measured requests.
    pub measured: usize,
    /// Random seed.
    pub seed: u64,
    /// Requests come at equal distances, whatever the mix says.
    pub even: bool,
}

/// A request on its way.
#[derive(Clone, Copy, Debug)]
struct Job {
    ask: Ask,
    measured: bool,
    arrived: f64,
    /// When it got its turn at the router.
    turn: f64,
    /// When a decode node reserved its blocks.
    reserved: f64,
    /// When the prefill node began with it.
    started: f64,
    /// When it got its last token.
    token: f64,
    /// Prompt tokens that are computed or cached.
    computed: usize,
    /// Output tokens.
    generated: usize,
    prefill_node: usize,
    decode_node: usize,
    /// Order of arrival on the decode node.
    order: u64,
    /// Blocks that it holds on the decode node.
    blocks: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// The next request arrives.
    Arrival,
    /// A step of a prefill node ends.
    PrefillStep(usize),
    /// A step of a decode node ends.
    DecodeStep(usize),
    /// A step of a colocated node ends.
    ColocatedStep(usize),
    /// The KV of a request is complete on its decode node.
    Handoff(usize),
}

/// A time that can be ordered. Times are never NaN.
#[derive(Clone, Copy, PartialEq)]
struct Time(f64);

impl Eq for Time {}

impl PartialOrd for Time {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Time {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// What all nodes share: the clock, the requests and the record.
struct World<'a> {
    setup: &'a Setup,
    now: f64,
    rng: StdRng,
    jobs: Vec<Job>,
    /// By time, then in the order in which they were scheduled.
    events: BinaryHeap<Reverse<(Time, u64, Event)>>,
    scheduled: u64,
    /// Nodes that compute.
    computing: usize,
    record: Recorder,
}

impl World<'_> {
    fn after(&mut self, seconds: f64, event: Event) {
        self.scheduled += 1;
        self.events.push(Reverse((Time(self.now + seconds), self.scheduled, event)));
    }

    /// Begins a step of a node, which takes `seconds` on a machine of its own.
    fn step(&mut self, seconds: f64, event: Event) {
        self.computing += 1;
        let share = if self.setup.one_machine { self.computing as f64 } else { 1.0 };
        self.after(seconds * share, event);
    }

    /// The first token of a job reaches the client.
    fn first_token(&mut self, job: usize) {
        let overhead = draw(&self.setup.prefill.request_seconds, 0.0, &mut self.rng);
        let j = &mut self.jobs[job];
        (j.generated, j.token) = (1, self.now);
        if j.measured {
            let legs =
                [overhead, j.turn - j.arrived, j.reserved - j.turn, j.started - j.reserved, self.now - j.started];
            self.record.first_token(legs);
        }
    }

    /// Another token of a job reaches the client. Returns whether it is the last one.
    fn token(&mut self, job: usize) -> bool {
        let j = &mut self.jobs[job];
        let gap = self.now - j.token;
        (j.generated, j.token) = (j.generated + 1, self.now);
        if j.measured {
            self.record.gap(gap, j.generated == 2);
        }
        j.generated >= j.ask.output_tokens
    }

    fn ended(&mut self, job: usize) {
        if self.jobs[job].measured {
            self.record.ended += 1;
        }
    }
}

struct Cluster<'a> {
    world: World<'a>,
    prefill: Vec<PrefillNode>,
    decode: Vec<DecodeNode>,
    colocated: Vec<ColocatedNode>,
    /// Requests that wait for their turn.
    queue: VecDeque<usize>,
    /// Their prompt tokens.
    queued_tokens: usize,
    /// When the nodes were looked at last.
    sampled: f64,
    running: usize,
    capacity: usize,
    /// Blocks of the smallest node.
    most_blocks: usize,
    orders: u64,
}

/// Simulates the cluster under the load.
pub fn run(setup: &Setup, mix: &Mix, load: &Load) -> Outcome {
    let limits = &setup.limits;
    let (prefill, decode, colocated) = match setup.layout {
        Layout::TwoStage { prefill, decode } => (prefill, decode, 0),
        Layout::Colocated { nodes } => (0, 0, nodes),
    };
    let places = prefill * limits.prefill_running + (decode + colocated) * limits.decode_running;
    let cluster = Cluster {
        world: World {
            setup,
            now: 0.0,
            rng: StdRng::seed_from_u64(!load.seed),
            jobs: Vec::new(),
            events: BinaryHeap::new(),
            scheduled: 0,
            computing: 0,
            record: Recorder::default(),
        },
        prefill: (0..prefill).map(|_| PrefillNode::new(setup.prefill.kv_blocks)).collect(),
        decode: (0..decode).map(|_| DecodeNode::new(setup.decode.kv_blocks, limits.decode_running)).collect(),
        colocated: (0..colocated).map(|_| ColocatedNode::new(setup.prefill.kv_blocks, limits.decode_running)).collect(),
        queue: VecDeque::new(),
        queued_tokens: 0,
        sampled: 0.0,
        running: 0,
        capacity: places.clamp(1, limits.router_running),
        most_blocks: match setup.layout {
            Layout::TwoStage { .. } => setup.prefill.kv_blocks.min(setup.decode.kv_blocks),
            Layout::Colocated { .. } => setup.prefill.kv_blocks,
        },
        orders: 0,
    };
    cluster.run(mix, load)
}

impl Cluster<'_> {
    fn run(mut self, mix: &Mix, load: &Load) -> Outcome {
        let mut asks = mix.asks(load.seed).map(|(gap, ask)| (if load.even { 1.0 } else { gap }, ask));
        let mut coming = asks.next();
        let interval = load.measured as f64 / load.rate / SAMPLES;
        if let Some((gap, _)) = coming {
            self.world.after(gap / load.rate, Event::Arrival);
        }
        // Requests keep coming until the measured ones have ended, so that those do not end in an empty cluster.
        while self.world.record.ended < load.measured
            && let Some(Reverse((Time(at), _, event))) = self.world.events.pop()
        {
            self.sample(at, interval);
            self.world.now = at;
            match event {
                Event::Arrival => {
                    let Some((_, ask)) = coming else { continue };
                    self.arrive(ask, load);
                    coming = asks.next();
                    if let Some((gap, _)) = coming {
                        self.world.after(gap / load.rate, Event::Arrival);
                    }
                }
                Event::PrefillStep(node) => {
                    self.world.computing -= 1;
                    self.prefill_step_ended(node);
                }
                Event::DecodeStep(node) => {
                    self.world.computing -= 1;
                    self.decode_step_ended(node);
                }
                Event::ColocatedStep(node) => {
                    self.world.computing -= 1;
                    self.colocated_step_ended(node);
                }
                Event::Handoff(job) => self.handoff_ended(job),
            }
        }
        self.world.record.finish()
    }

    fn arrive(&mut self, ask: Ask, load: &Load) {
        let now = self.world.now;
        let job = self.world.jobs.len();
        let measured = (load.warm_up..load.warm_up + load.measured).contains(&job);
        self.world.record.window(job >= load.warm_up && job < load.warm_up + load.measured, now);
        self.world.jobs.push(Job {
            ask,
            measured,
            arrived: now,
            turn: now,
            reserved: now,
            started: now,
            token: now,
            computed: 0,
            generated: 0,
            prefill_node: 0,
            decode_node: 0,
            order: 0,
            blocks: 0,
        });
        // A node refuses a request that it could not finish even alone.
        if blocks_for(ask.prompt_tokens + ask.output_tokens) > self.most_blocks {
            if measured {
                self.world.record.refused();
            }
            return;
        }
        self.queue.push_back(job);
        self.queued_tokens += ask.prompt_tokens;
        self.admit();
    }

    /// Lets waiting requests run while there is capacity.
    fn admit(&mut self) {
        while self.running < self.capacity {
            let Some(job) = self.queue.pop_front() else { return };
            self.running += 1;
            self.queued_tokens -= self.world.jobs[job].ask.prompt_tokens;
            let order = self.orders;
            self.orders += 1;
            let j = &mut self.world.jobs[job];
            (j.turn, j.reserved, j.order) = (self.world.now, self.world.now, order);
            match self.world.setup.layout {
                Layout::TwoStage { .. } => self.choose(job),
                Layout::Colocated { .. } => self.choose_colocated(job),
            }
        }
    }

    /// A request is complete.
    fn end(&mut self, job: usize) {
        self.world.ended(job);
        self.running -= 1;
        self.admit();
    }

    /// Looks at the nodes at equal distances in time until `at`. Events would be a biased sample.
    fn sample(&mut self, at: f64, interval: f64) {
        if !self.world.record.is_open() {
            self.sampled = self.world.now;
            return;
        }
        let times = ((at - self.sampled) / interval).floor();
        if times < 1.0 {
            return;
        }
        self.sampled += times * interval;
        let mut sums = Shares { prefill_queued_tokens: self.queued_tokens as f64, ..Shares::default() };
        self.prefill.iter().for_each(|node| node.add_to(&mut sums));
        self.decode.iter().for_each(|node| node.add_to(&mut sums));
        self.colocated.iter().for_each(|node| node.add_to(&mut sums));
        self.world.record.sample(times, &sums);
    }
}
