//! The decode engine: a thread that owns the model. Continuous batching: requests join and leave the batch between
//! steps.

use std::{
    collections::{HashMap, VecDeque},
    io,
    sync::{Arc, mpsc as std_mpsc},
    time::Duration,
};

use overfill_kv::{BlockLease, BlockPool, KvStore, Mode, OutputToken, Role, Windows};
use overfill_model::ModelError;
use overfill_node::{LoadState, Turn, spawn_engine};
use tokio::{
    sync::{Notify, oneshot},
    time::Instant,
};
use tracing::debug;

use crate::{
    compute::{Compute, Stepping},
    drafts::DraftRecord,
    extension::{Chosen, Verdict},
    flow::Flow,
    handle::{Command, EngineHandle},
    scheduler::{self, Growth, Occupancy},
    sequence::{Job, Request, Reserved, Sequence, SequenceEvent, Swapped},
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

/// Starts the engine thread, which computes over the KV in `store`. The returned receiver resolves when the thread has ended,
/// also after a panic.
///
/// # Errors
/// The operating system refused to start a thread.
pub fn start(
    compute: impl Compute + Send + 'static,
    store: Arc<dyn KvStore>,
    pool: BlockPool,
    load: Arc<LoadState>,
    limits: EngineLimits,
) -> io::Result<(EngineHandle, oneshot::Receiver<()>)> {
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
    /// Recent mean of the duration of a step.
    step_mean: Duration,
    /// What is known of the drafts of each variant.
    records: HashMap<usize, DraftRecord>,
    /// Origin of the times of verdicts.
    origin: Instant,
    /// The device has failed. Then the engine ends, and with it the process.
    lost: bool,
}

/// A computed step.
struct Step {
    /// Indices of its sequences in the batch, in ascending order, and the end of what it computes of each.
    stepping: Vec<(usize, usize)>,
    began: Instant,
    result: Result<Vec<Option<OutputToken>>, ModelError>,
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
        // Enough for every message: `Submit` of each waiting request, and one of every other kind for
        // each seated request.
        let (sender, commands) = std_mpsc::sync_channel(limits.max_waiting + 4 * limits.max_running);
        let commanded = Arc::new(Notify::new());
        let handle = EngineHandle::new(sender, commanded.clone(), load.clone(), limits.max_waiting);
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
            step_mean: Duration::ZERO,
            records: HashMap::new(),
            origin: Instant::now(),
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
        self.swapped.retain(|request| !request.flow.is_over());
        self.reserved.retain(|_, request| !request.is_over());
        self.running.retain(|sequence| !sequence.flow.is_over());
        self.running.iter_mut().for_each(|sequence| sequence.forget(self.limits.windows));
        self.resume();
        self.reserve();
        self.extend();
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

    /// Requests that the full model's KV for a block is on its way to: the tokens, the index of the block, and its place.
    pub fn landings(&self) -> impl Iterator<Item = (&[u32], usize, &Arc<BlockLease>)> {
        let running = self.running.iter().map(|sequence| &sequence.flow);
        running.chain(self.swapped.iter().map(|swapped| &swapped.flow)).filter_map(|flow| {
            let extensions = &flow.extensions;
            Some((&flow.tokens[..], extensions.refreshed_blocks(), extensions.landing()?))
        })
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
                let flow = &mut sequence.flow;
                match flow.finish() {
                    Some(finish) => flow.tell(SequenceEvent::Finished(finish)),
                    None => match flow.constrain() {
                        Ok(()) => self.seat(sequence),
                        Err(e) => flow.refuse(&e),
                    },
                }
            }
            Command::Verdict { arrival, chosen } => self.verdict(arrival, &chosen),
            Command::Lost { arrival } => {
                let Some(flow) = self.flow(arrival) else { return };
                flow.tell(SequenceEvent::LandingOver);
                if !flow.extensions.lost() {
                    flow.fail("the full model's KV did not arrive");
                    self.remove(arrival);
                }
            }
            Command::Landed { arrival, number, ok } => {
                let is_running = self.running.iter().any(|sequence| sequence.flow.arrival == arrival);
                let Some(flow) = self.flow(arrival).filter(|flow| flow.extensions.is_landing(number)) else { return };
                if !is_running {
                    // Its block is needed to resume. The full model is asked again then.
                    flow.extensions.give_up_landing();
                } else if ok {
                    flow.extensions.landed();
                } else if !flow.extensions.not_landed() {
                    flow.fail("the full model's KV did not arrive");
                    self.remove(arrival);
                }
            }
        }
    }

    /// The request `arrival`, if it decodes or is preempted.
    fn flow(&mut self, arrival: u64) -> Option<&mut Flow> {
        let running = self.running.iter_mut().map(|sequence| &mut sequence.flow);
        let mut flows = running.chain(self.swapped.iter_mut().map(|swapped| &mut swapped.flow));
        flows.find(|flow| flow.arrival == arrival)
    }

    fn remove(&mut self, arrival: u64) {
        self.running.retain(|sequence| sequence.flow.arrival != arrival);
        self.swapped.retain(|swapped| swapped.flow.arrival != arrival);
    }

    fn verdict(&mut self, arrival: u64, chosen: &Chosen) {
        let origin = self.origin;
        let Some(variant) = self.flow(arrival).map(|flow| flow.request.variant) else { return };
        let requests = self.running.iter().map(|sequence| &sequence.flow.request);
        let sequences = requests.filter(|other| other.mode == Mode::Exact && other.variant == variant).count();
        let Some(flow) = self.flow(arrival) else { return };
        let verdict = match flow.verdict(chosen, origin) {
            Ok(verdict) => verdict,
            Err(e) => {
                flow.refuse(&e);
                return self.remove(arrival);
            }
        };
        if let Some(finish) = flow.finish() {
            flow.tell(SequenceEvent::Finished(finish));
            self.remove(arrival);
        }
        if let Some(Verdict { round, .. }) = verdict {
            self.records.entry(variant).or_default().observe(&round, sequences, origin.elapsed());
            let metrics = self.load.metrics();
            metrics.drafts.inc();
            metrics.draft_tokens.inc_by(round.drafted as u64);
            metrics.accepted_tokens.inc_by(round.accepted as u64);
        }
    }

    /// Uses the full model's KV that has arrived, and asks it to go on where it is time.
    fn extend(&mut self) {
        let (step, origin, seated) = (self.step_mean, self.origin, self.seated());
        for sequence in self.running.iter_mut().filter(|sequence| sequence.flow.request.mode.extends()) {
            sequence.refresh();
            // A block in reserve for each request is left alone. In mode refresh, `make_room` gets a block in any case.
            let spare = self.pool.available() > seated;
            let place =
                if spare && sequence.flow.wants_landing() { self.pool.allocate(1).ok().map(Arc::new) } else { None };
            let record = self.records.entry(sequence.flow.request.variant).or_default();
            sequence.flow.ask(place, step, record, origin);
        }
    }

    fn seat(&mut self, sequence: Sequence) {
        let arrival = sequence.flow.arrival;
        let place = self.running.partition_point(|other| other.flow.arrival < arrival);
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
            let (step, origin) = (self.step_mean, self.origin);
            let seats: Vec<_> = self.running.iter().map(Sequence::seat).collect();
            // Only this thread allocates blocks, so an available block stays available.
            match scheduler::next_growth(&seats, self.pool.available() > 0) {
                Some(Growth::Grow(i)) => match self.pool.allocate(1) {
                    Ok(lease) if self.running[i].lacks_landing() => {
                        let flow = &mut self.running[i].flow;
                        let record = self.records.entry(flow.request.variant).or_default();
                        flow.ask(Some(Arc::new(lease)), step, record, origin);
                    }
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
        debug!(request = %sequence.flow.request.id, blocks = sequence.blocks.len(), "request preempted");
        match sequence.swap_out(&*self.store, &self.load) {
            Ok(request) => {
                let place = self.swapped.partition_point(|other| other.flow.arrival < request.flow.arrival);
                self.swapped.insert(place, request);
            }
            Err((sequence, e)) => {
                sequence.flow.fail(&format!("copying KV to host memory: {e}"));
            }
        }
    }

    /// Computes the next token of every sequence that can go on. Returns false if there is no such sequence.
    fn step(&mut self) -> bool {
        self.make_room();
        let indices: Vec<usize> = (0..self.running.len()).filter(|i| self.running[*i].steps()).collect();
        if indices.is_empty() {
            return false;
        }
        // Some sequences have more than one token to compute, after a verdict. An engine has room for a row per request.
        let mut spare_rows = self.limits.max_running - indices.len();
        let stepping = indices.into_iter().map(|i| {
            let flow = &self.running[i].flow;
            let more = (flow.tokens.len() - flow.computed - 1).min(spare_rows);
            spare_rows -= more;
            (i, flow.computed + 1 + more)
        });
        let stepping: Vec<(usize, usize)> = stepping.collect();
        let sequence = |(i, end): &(usize, usize)| {
            let sequence = &self.running[*i];
            Stepping { sequence, tokens: sequence.flow.computed..*end }
        };
        let sequences: Vec<Stepping<'_>> = stepping.iter().map(sequence).collect();
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
                let took = began.elapsed();
                self.step_mean = if self.step_mean.is_zero() { took } else { (self.step_mean * 7 + took) / 8 };
                self.load.decoded(stepping.len(), took);
                self.advance(&stepping, tokens);
            }
            Some(Step { stepping, result: Err(e), .. }) => {
                self.lost = e.is_lost_device();
                for (i, _) in stepping.into_iter().rev() {
                    self.running.remove(i).flow.fail(&format!("computing a token: {e}"));
                }
            }
        }
        self.load.step_ended();
        self.load.publish();
    }

    fn advance(&mut self, stepping: &[(usize, usize)], tokens: Vec<Option<OutputToken>>) {
        let metrics = self.load.metrics();
        // In reverse order, because removing a sequence shifts the indices behind it.
        for (&(i, end), token) in stepping.iter().zip(tokens).rev() {
            let flow = &mut self.running[i].flow;
            let Some(token) = token else {
                flow.computed = end;
                continue;
            };
            if let Some(since) = flow.push(token) {
                metrics.inter_token_latency_seconds.observe(since.as_secs_f64());
                metrics.generation_tokens.inc();
            }
            if let Some(finish) = flow.finish() {
                flow.tell(SequenceEvent::Finished(finish));
                self.running.remove(i);
            } else if let Err(e) = flow.constrain() {
                flow.refuse(&e);
                self.running.remove(i);
            }
        }
    }
}
