//! The decode engine: a thread that owns the model. Continuous batching: requests join and leave the batch between
//! steps.

use std::{
    collections::{HashMap, VecDeque},
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc as std_mpsc,
    },
    time::Duration,
};

use overfill_kv::{BlockLease, BlockPool, KvStore, OutputToken, Role, Windows, block_hashes};
use overfill_model::{
    Choice, Engine as ModelEngine, LayerSink, ModelError, Outputs, SamplingContext, SequenceSlice, Want, no_layers,
};
use overfill_node::{Constraint, LoadState, Refused, Turn, spawn_engine};
use tokio::{
    sync::{Notify, mpsc, oneshot},
    time::Instant,
};
use tracing::debug;

use crate::{
    scheduler::{self, Growth, Occupancy},
    sequence::{CLIENT_EVENTS, Job, Request, Reserved, Sequence, SequenceEvent, Swapped},
};

/// Polling interval while the engine has requests but can compute none of them.
const POLL: Duration = Duration::from_millis(5);

/// Limits of the engine.
#[derive(Clone, Copy, Debug)]
pub struct EngineLimits {
    /// Maximum number of requests that hold blocks.
    pub max_running: usize,
    /// Maximum number of waiting requests.
    pub max_waiting: usize,
    /// Windows of the model's layers. KV that no layer needs is not kept.
    pub windows: Windows,
}

enum Command {
    Submit(Box<Job>),
    Ready { arrival: u64, first_token: u32 },
}

/// Handle for submitting requests to the engine. The engine ends when all handles are dropped and its work is done.
#[derive(Clone)]
pub struct EngineHandle {
    commands: std_mpsc::SyncSender<Command>,
    commanded: Arc<Notify>,
    load: Arc<LoadState>,
    arrivals: Arc<AtomicU64>,
    max_waiting: usize,
}

impl EngineHandle {
    /// Queues a request. Returns its arrival number and the receiver of its events. Dropping the receiver cancels the
    /// request.
    ///
    /// # Errors
    /// The queue is full, or the node is draining.
    pub fn submit(&self, request: Request) -> Result<(u64, mpsc::Receiver<SequenceEvent>), Refused> {
        if self.load.is_draining() {
            return Err(Refused::Draining);
        }
        let waiting = self.load.try_wait(self.max_waiting).ok_or(Refused::QueueFull(self.max_waiting))?;
        let (events, receiver) = mpsc::channel(CLIENT_EVENTS);
        let hashes = request.producer.as_ref().map(|producer| block_hashes(&request.tokens, producer));
        let arrival = self.arrivals.fetch_add(1, Ordering::Relaxed);
        let job = Job { arrival, request, hashes: hashes.unwrap_or_default(), events, waiting };
        self.send(Command::Submit(Box::new(job)))?;
        self.load.publish();
        Ok((arrival, receiver))
    }

    /// Tells the engine that the KV of the request `arrival` is complete and verified (KV-5). `first_token` is the
    /// token that the prefill node sampled.
    ///
    /// # Errors
    /// The queue is full, or the engine has ended.
    pub fn ready(&self, arrival: u64, first_token: u32) -> Result<(), Refused> {
        self.send(Command::Ready { arrival, first_token })
    }

    fn send(&self, command: Command) -> Result<(), Refused> {
        self.commands.try_send(command).map_err(|e| match e {
            std_mpsc::TrySendError::Full(_) => Refused::QueueFull(self.max_waiting),
            std_mpsc::TrySendError::Disconnected(_) => Refused::Draining,
        })?;
        self.commanded.notify_one();
        Ok(())
    }
}

/// The computation of tokens: by the model's engine, or simulated in tests.
pub trait Compute {
    /// Computes the KV of the last token of each sequence, and returns the next token of each.
    ///
    /// # Errors
    /// The computation failed. Then all sequences of the batch have failed.
    fn step(&mut self, sequences: &[&Sequence]) -> Result<Vec<OutputToken>, ModelError>;
}

struct ModelCompute {
    engine: Box<dyn ModelEngine>,
    layers: Arc<dyn LayerSink>,
    outputs: Outputs,
}

impl Compute for ModelCompute {
    fn step(&mut self, sequences: &[&Sequence]) -> Result<Vec<OutputToken>, ModelError> {
        let slices: Vec<_> = sequences.iter().map(|sequence| slice(sequence)).collect();
        self.engine.run(&slices, &self.layers, &mut self.outputs)?;
        (0..slices.len()).map(|i| self.outputs.take_next(i)).collect()
    }
}

fn slice(sequence: &Sequence) -> SequenceSlice<'_> {
    let start = sequence.tokens.len() - 1;
    let (prompt, output) = sequence.prompt_and_output();
    let allowed = sequence.request.constraint.as_ref().map(Constraint::mask);
    let context = SamplingContext { allowed, ..SamplingContext::following(prompt, output) };
    let want = Want::Next(Choice { params: &sequence.request.sampling, context });
    SequenceSlice { tokens: &sequence.tokens[start..], start, blocks: &sequence.blocks, want }
}

/// Starts the engine thread. The returned receiver resolves when the thread has ended, also after a panic.
///
/// # Errors
/// The operating system refused to start a thread.
pub fn start(
    engine: Box<dyn ModelEngine>,
    pool: BlockPool,
    load: Arc<LoadState>,
    limits: EngineLimits,
) -> io::Result<(EngineHandle, oneshot::Receiver<()>)> {
    let store = engine.kv();
    let compute = ModelCompute { engine, layers: no_layers(), outputs: Outputs::default() };
    let (handle, engine) = Engine::new(compute, store, pool, load, limits);
    let end = spawn_engine(Role::Decode, move || engine.run())?;
    Ok((handle, end))
}

/// State of the engine: the requests, by stage.
pub struct Engine<C> {
    compute: C,
    store: Arc<dyn KvStore>,
    pool: BlockPool,
    load: Arc<LoadState>,
    limits: EngineLimits,
    commands: std_mpsc::Receiver<Command>,
    commanded: Arc<Notify>,
    /// New requests without blocks, in order of arrival.
    waiting: VecDeque<Box<Job>>,
    /// Preempted requests, in order of arrival.
    swapped: VecDeque<Swapped>,
    /// Requests with blocks whose KV has not arrived yet, by arrival number.
    reserved: HashMap<u64, Reserved>,
    /// Requests in the batch, in order of arrival.
    running: Vec<Sequence>,
    /// The step whose results have not been applied yet.
    computed: Option<Step>,
    /// The device has failed. Then the engine ends, and with it the process.
    lost: bool,
}

/// A computed step.
struct Step {
    /// Indices of its sequences in the batch, in ascending order.
    stepping: Vec<usize>,
    began: Instant,
    result: Result<Vec<OutputToken>, ModelError>,
}

impl<C: Compute> Engine<C> {
    /// Creates an engine and its handle, without a thread. The caller must call [`turn`](Self::turn) repeatedly;
    /// [`start`] does so on a thread.
    pub fn new(
        compute: C,
        store: Arc<dyn KvStore>,
        pool: BlockPool,
        load: Arc<LoadState>,
        limits: EngineLimits,
    ) -> (EngineHandle, Self) {
        // Enough for every message: `Submit` of each waiting request, and `Ready` of each request that holds blocks.
        let (sender, commands) = std_mpsc::sync_channel(limits.max_waiting + limits.max_running);
        let commanded = Arc::new(Notify::new());
        let handle = EngineHandle {
            commands: sender,
            commanded: commanded.clone(),
            load: load.clone(),
            arrivals: Arc::default(),
            max_waiting: limits.max_waiting,
        };
        let engine = Self {
            compute,
            store,
            pool,
            load,
            limits,
            commands,
            commanded,
            waiting: VecDeque::new(),
            swapped: VecDeque::new(),
            reserved: HashMap::new(),
            running: Vec::new(),
            computed: None,
            lost: false,
        };
        (handle, engine)
    }

    fn run(mut self) {
        loop {
            match self.turn() {
                Turn::Computed => {}
                Turn::Idle => self.wait(),
                Turn::Over => break,
            }
        }
        debug!("the engine has ended");
    }

    /// Runs one turn: takes commands from the queue, drops requests that are over, resumes preempted requests, reserves
    /// blocks for new ones, computes one step, and applies its results.
    pub fn turn(&mut self) -> Turn {
        let turn = self.begin();
        self.finish();
        if self.lost { Turn::Over } else { turn }
    }

    /// The part of a turn up to the end of the computation. The caller must call [`finish`](Self::finish) next. A
    /// simulation lets the time of the step pass in between.
    pub fn begin(&mut self) -> Turn {
        let can_come = loop {
            match self.commands.try_recv() {
                Ok(command) => self.take(command),
                Err(e) => break e == std_mpsc::TryRecvError::Empty,
            }
        };
        self.load.step_began();
        self.waiting.retain(|job| !job.is_over());
        self.swapped.retain(|request| !request.is_over());
        self.reserved.retain(|_, request| !request.is_over());
        self.running.retain(|sequence| !sequence.is_over());
        self.running.iter_mut().for_each(|sequence| sequence.forget(self.limits.windows));
        self.resume();
        self.reserve();
        let computed = self.step();
        match (computed, can_come || !self.is_idle()) {
            (true, _) => Turn::Computed,
            (false, true) => Turn::Idle,
            (false, false) => Turn::Over,
        }
    }

    /// Is notified of every command, for a caller of [`turn`](Self::turn) that has nothing to compute.
    pub fn commanded(&self) -> Arc<Notify> {
        self.commanded.clone()
    }

    /// Requests whose KV has not arrived yet, and the blocks reserved for it.
    pub fn reserved(&self) -> impl Iterator<Item = (&Request, &Arc<BlockLease>)> {
        self.reserved.values().map(Reserved::to_fill)
    }

    /// Blocks until a command arrives, or for at most [`POLL`] if there are requests.
    fn wait(&mut self) {
        let received = match self.is_idle() {
            true => self.commands.recv().ok(),
            false => self.commands.recv_timeout(POLL).ok(),
        };
        if let Some(command) = received {
            self.take(command);
        }
    }

    fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty() && self.swapped.is_empty() && self.reserved.is_empty()
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Submit(job) => self.waiting.push_back(job),
            Command::Ready { arrival, first_token } => {
                // Absent if the request has ended meanwhile.
                let Some(reserved) = self.reserved.remove(&arrival) else { return };
                let mut sequence = reserved.ready(first_token, &self.pool, self.limits.windows);
                match sequence.finish() {
                    Some(finish) => sequence.tell(SequenceEvent::Finished(finish)),
                    None => match sequence.constrain() {
                        Ok(()) => self.seat(sequence),
                        Err(e) => sequence.refuse(&e),
                    },
                }
            }
        }
    }

    fn seat(&mut self, sequence: Sequence) {
        let place = self.running.partition_point(|other| other.arrival < sequence.arrival);
        self.running.insert(place, sequence);
    }

    fn seated(&self) -> usize {
        self.running.len() + self.reserved.len()
    }

    /// Moves preempted requests back into the batch, the oldest first, while there is room.
    fn resume(&mut self) {
        while let Some(first) = self.swapped.front() {
            let seated = self.seated();
            let node = Occupancy { available: self.pool.available(), seated, max_seated: self.limits.max_running };
            if !node.admits(first.blocks) {
                return;
            }
            let Ok(lease) = self.pool.allocate(first.blocks) else { return };
            let Some(first) = self.swapped.pop_front() else { return };
            // After an error there is nothing to do: `swap_in` has logged it and sent it to the client.
            if let Ok(sequence) = first.swap_in(lease, &*self.store, &self.load) {
                self.seat(sequence);
            }
        }
    }

    /// Reserves blocks for new requests, first come, first served, but only while no preempted request waits.
    fn reserve(&mut self) {
        while self.swapped.is_empty() {
            let Some(job) = self.waiting.pop_front() else { return };
            match job.reserve(&self.pool, self.seated(), &self.limits, &self.load) {
                Ok(reserved) => drop(self.reserved.insert(reserved.arrival, reserved)),
                Err(job) => return self.waiting.push_front(job),
            }
        }
    }

    /// Gives a block to every sequence that needs one for the next step. If no block is available, preempts the
    /// youngest sequence.
    fn make_room(&mut self) {
        loop {
            let seats: Vec<_> = self.running.iter().map(Sequence::seat).collect();
            // Only this thread allocates blocks, so an available block stays available.
            match scheduler::next_growth(&seats, self.pool.available() > 0) {
                Some(Growth::Grow(i)) => match self.pool.allocate(1) {
                    Ok(lease) => self.running[i].grow(lease),
                    Err(_) => self.swap_out(self.running.len() - 1),
                },
                Some(Growth::Preempt(i)) => self.swap_out(i),
                None => return,
            }
        }
    }

    fn swap_out(&mut self, i: usize) {
        let sequence = self.running.remove(i);
        debug!(request = %sequence.request.id, blocks = sequence.blocks.len(), "request preempted");
        match sequence.swap_out(&*self.store, &self.load) {
            Ok(request) => {
                let place = self.swapped.partition_point(|other| other.arrival < request.arrival);
                self.swapped.insert(place, request);
            }
            Err((sequence, e)) => {
                sequence.fail(&format!("copying KV to host memory: {e}"));
            }
        }
    }

    /// Computes one token for every sequence whose client keeps up. Returns false if there is no such sequence.
    fn step(&mut self) -> bool {
        self.make_room();
        let stepping: Vec<usize> = (0..self.running.len()).filter(|i| self.running[*i].steps()).collect();
        if stepping.is_empty() {
            return false;
        }
        let sequences: Vec<&Sequence> = stepping.iter().map(|i| &self.running[*i]).collect();
        let began = Instant::now();
        let result = self.compute.step(&sequences);
        self.computed = Some(Step { stepping, began, result });
        true
    }

    /// The rest of a turn: applies the results of the step. If it failed, all its sequences fail.
    pub fn finish(&mut self) {
        match self.computed.take() {
            None => {}
            Some(Step { stepping, began, result: Ok(tokens) }) => {
                self.load.decoded(stepping.len(), began.elapsed());
                self.advance(&stepping, tokens);
            }
            Some(Step { stepping, result: Err(e), .. }) => {
                self.lost = e.is_lost_device();
                for i in stepping.into_iter().rev() {
                    self.running.remove(i).fail(&format!("computing a token: {e}"));
                }
            }
        }
        self.load.step_ended();
        self.load.publish();
    }

    fn advance(&mut self, stepping: &[usize], tokens: Vec<OutputToken>) {
        let metrics = self.load.metrics();
        // In reverse order, because removing a sequence shifts the indices behind it.
        for (&i, token) in stepping.iter().zip(tokens).rev() {
            let sequence = &mut self.running[i];
            metrics.inter_token_latency_seconds.observe(sequence.push(token).as_secs_f64());
            metrics.generation_tokens.inc();
            if let Some(finish) = sequence.finish() {
                self.running.remove(i).tell(SequenceEvent::Finished(finish));
            } else if let Err(e) = sequence.constrain() {
                self.running.remove(i).refuse(&e);
            }
        }
    }
}
