//! The prefill engine: a thread that owns the model. It computes prompts in batches of chunks. After each layer, the KV
//! of the chunks is handed to the transfer.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, mpsc as std_mpsc},
    time::Duration,
};

use overfill_kv::{BlockPool, Role, Ticket, block_hashes, blocks_for};
use overfill_model::{Engine as ModelEngine, ModelError};
use overfill_node::{LoadState, Refused, Turn, spawn_engine};
use overfill_transport::TransferConfig;
use tokio::{
    runtime,
    sync::{mpsc, oneshot},
    time::Instant,
};
use tracing::{debug, info_span};

use crate::{
    compute::{ChunkOutput, Compute, ModelCompute, PromptChunk, StepLayers},
    extension::{ExtendError, Extension, OpenLimits, OpenPrefills},
    gather::{self, StepTimes},
    handoff::HandoffContext,
    job::{JOB_EVENTS, Job, JobEvent, Request, Running},
    scheduler::{self, Chunk, Pace},
    score::{MAX_WAITING_SCORES, Score, ScoreReply, ScoreRequest, Scores},
};

/// Polling interval while prompts wait but none can run. The engine must poll, because no message tells it that a
/// handoff has freed blocks.
const POLL: Duration = Duration::from_millis(5);

/// Polling interval while nothing but open prefills is there. No message tells the engine that one of them is over.
const OPEN_POLL: Duration = Duration::from_millis(50);

/// Limits of the engine.
#[derive(Clone, Copy, Debug)]
pub struct EngineLimits {
    /// Maximum number of prompt tokens in one step.
    pub max_batch_tokens: usize,
    /// Target time of one step. A new prompt waits for the running step to end.
    pub step_target: Duration,
    /// Maximum number of prompts in progress.
    pub max_running: usize,
    /// Maximum number of waiting prompts.
    pub max_waiting: usize,
    /// Limits of idle open prefills.
    pub open: OpenLimits,
}

/// Capacity of the engine's queue for extensions. Each open prefill has at most one.
const MAX_EXTENSIONS: usize = 1024;

enum Command {
    Prefill(Box<Job>),
    Extend(Box<Extension>),
    Score(Box<Score>),
}

/// Handle for submitting requests to the engine. The engine ends when all handles are dropped and its work is done.
#[derive(Clone)]
pub struct EngineHandle {
    commands: std_mpsc::SyncSender<Command>,
    load: Arc<LoadState>,
    producer: Arc<str>,
    max_waiting: usize,
}

impl EngineHandle {
    /// Queues a request and returns the receiver of its events. Dropping the receiver cancels the request.
    ///
    /// # Errors
    /// The queue is full, or the node is draining.
    pub fn submit(&self, request: Request) -> Result<mpsc::Receiver<JobEvent>, Refused> {
        if self.load.is_draining() {
            return Err(Refused::Draining);
        }
        let waiting = self.load.try_wait(self.max_waiting).ok_or(Refused::QueueFull(self.max_waiting))?;
        let queued_tokens = self.load.count_tokens(request.tokens.len());
        let (events, receiver) = mpsc::channel(JOB_EVENTS);
        let hashes = block_hashes(&request.tokens, &self.producer);
        let queued = info_span!(parent: &request.span, "queue");
        let job = Job { request, hashes, arrived: Instant::now(), events, waiting, queued_tokens, queued };
        self.send(Command::Prefill(Box::new(job)), self.max_waiting)?;
        self.load.publish();
        Ok(receiver)
    }

    /// Queues an extension of an open prefill. A draining node takes it, because the request is one that it finishes.
    ///
    /// # Errors
    /// The queue is full, or the engine has ended.
    pub fn extend(&self, extension: Extension) -> Result<(), Refused> {
        self.send(Command::Extend(Box::new(extension)), MAX_EXTENSIONS)
    }

    /// Queues a score. `reply` receives its result; closing it cancels the score.
    ///
    /// # Errors
    /// The queue is full, or the node is draining.
    pub fn score(&self, request: ScoreRequest, reply: ScoreReply) -> Result<(), Refused> {
        if self.load.is_draining() {
            return Err(Refused::Draining);
        }
        let hashes = block_hashes(request.prompt(), &self.producer);
        self.send(Command::Score(Box::new(Score { request, hashes, reply })), MAX_WAITING_SCORES)
    }

    fn send(&self, command: Command, capacity: usize) -> Result<(), Refused> {
        self.commands.try_send(command).map_err(|e| match e {
            std_mpsc::TrySendError::Full(_) => Refused::QueueFull(capacity),
            std_mpsc::TrySendError::Disconnected(_) => Refused::Draining,
        })
    }
}

/// Starts the engine thread. The returned receiver resolves when the thread has ended, also after a panic. `producer`
/// is the fingerprint of the model.
///
/// # Errors
/// The operating system refused to start a thread.
pub fn start(
    engine: Box<dyn ModelEngine>,
    producer: Arc<str>,
    pool: BlockPool,
    load: Arc<LoadState>,
    limits: EngineLimits,
    transfer: TransferConfig,
) -> io::Result<(EngineHandle, oneshot::Receiver<()>)> {
    let context = HandoffContext {
        runtime: runtime::Handle::current(),
        store: engine.kv(),
        pool,
        config: transfer,
        load: load.clone(),
    };
    let (handle, engine) = Engine::new(ModelCompute::new(engine), producer, limits, context);
    let end = spawn_engine(Role::Prefill, move || engine.run())?;
    Ok((handle, end))
}

/// State of the engine: the waiting and the running prompts.
pub struct Engine<C> {
    compute: C,
    producer: Arc<str>,
    load: Arc<LoadState>,
    limits: EngineLimits,
    context: HandoffContext,
    commands: std_mpsc::Receiver<Command>,
    /// Prompts without blocks, in order of arrival.
    waiting: VecDeque<Job>,
    /// Prompts and extensions in the batch, in order of arrival.
    running: Vec<Running>,
    /// Open prefills that wait for an extension.
    open: OpenPrefills,
    /// Scores, which run while there is nothing else to compute.
    scores: Scores,
    pace: Pace,
    step_times: StepTimes,
    /// Duration of the last step that had extensions only.
    extension_step: Duration,
    /// While extensions wait for more of them: when they began to wait, and the end of their wait.
    gathering: Option<(Instant, Instant)>,
    /// The step whose results have not been applied yet.
    computed: Option<Step>,
    /// The device has failed. Then the engine ends, and with it the process.
    lost: bool,
}

/// A computed step.
struct Step {
    plan: Vec<Chunk>,
    began: Instant,
    result: Result<Vec<ChunkOutput>, ModelError>,
}

impl<C: Compute> Engine<C> {
    /// Creates an engine and its handle, without a thread. The caller must call [`turn`](Self::turn) repeatedly;
    /// [`start`] does so on a thread.
    pub fn new(compute: C, producer: Arc<str>, limits: EngineLimits, context: HandoffContext) -> (EngineHandle, Self) {
        let (commands, queue) = std_mpsc::sync_channel(limits.max_waiting + MAX_EXTENSIONS + MAX_WAITING_SCORES);
        let load = context.load.clone();
        let (max_waiting, names) = (limits.max_waiting, producer.clone());
        let handle = EngineHandle { commands, load: load.clone(), producer: names, max_waiting };
        let engine = Self {
            compute,
            producer,
            load,
            limits,
            context,
            commands: queue,
            waiting: VecDeque::new(),
            running: Vec::new(),
            open: OpenPrefills::new(limits.open),
            scores: Scores::default(),
            pace: Pace::default(),
            step_times: StepTimes::default(),
            extension_step: Duration::ZERO,
            gathering: None,
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

    /// Runs one turn: takes new requests from the queue, drops requests that are over, admits waiting prompts, computes
    /// one step, and applies its results.
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
        self.running.retain(|job| !job.is_over());
        self.open.settle();
        self.scores.settle();
        self.admit();
        self.gather();
        let mut computes = !self.running.is_empty() && self.gathering.is_none();
        if computes {
            self.step();
        } else if self.load.is_draining() {
            self.scores.clear();
        } else if self.running.is_empty() && self.waiting.is_empty() && !self.scores.is_empty() {
            computes = true;
            self.lost |= self.scores.step(&mut self.compute, &self.context.pool).is_err();
        }
        match (computes, can_come || !self.is_idle()) {
            (true, _) => Turn::Computed,
            (false, true) => Turn::Idle,
            (false, false) => Turn::Over,
        }
    }

    /// Decides whether the next step waits for extensions that are expected soon.
    fn gather(&mut self) {
        let asking = self.running.iter().filter(|job| job.extending.is_some()).count();
        let room = self.limits.max_running.saturating_sub(asking);
        let has_prompts = asking < self.running.len() || !self.waiting.is_empty();
        if asking == 0 || room == 0 || has_prompts || self.load.is_draining() {
            self.gathering = None;
            return;
        }
        let now = Instant::now();
        let since = self.gathering.map_or(now, |(since, _)| since);
        let step = self.extension_step;
        let wait = gather::wait(asking, room, self.open.due(), step);
        // Extensions that arrive meanwhile may make a longer wait worthwhile. The whole wait is never longer than a step.
        let end = (now + wait).min(since + step);
        self.gathering = (end > now).then_some((since, end));
    }

    /// Blocks until a command arrives: until the end of the wait for extensions, or for at most [`POLL`] if prompts are waiting, or
    /// for at most [`OPEN_POLL`] if there are open prefills.
    fn wait(&mut self) {
        let received = match (self.gathering, self.is_idle(), self.waiting.is_empty()) {
            (Some((_, end)), ..) => self.commands.recv_timeout(end.saturating_duration_since(Instant::now())).ok(),
            (None, true, _) => self.commands.recv().ok(),
            (None, false, true) => self.commands.recv_timeout(OPEN_POLL).ok(),
            (None, false, false) => self.commands.recv_timeout(POLL).ok(),
        };
        if let Some(command) = received {
            self.take(command);
        }
    }

    fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty() && self.open.is_empty() && self.scores.is_empty()
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Prefill(job) => self.waiting.push_back(*job),
            Command::Extend(extension) => self.extend(*extension),
            Command::Score(score) => self.scores.push(*score),
        }
    }

    /// Begins an extension. The prefill leaves the open ones until it is computed.
    fn extend(&mut self, extension: Extension) {
        let Some(job) = self.open.take(&extension.lease, extension.arrived) else {
            let _ = extension.reply.send(Err(ExtendError::NotOpen(extension.position)));
            return;
        };
        let (open, scores, pool) = (&mut self.open, &mut self.scores, &self.context.pool);
        let allocate = |blocks| loop {
            match pool.allocate(blocks) {
                Ok(lease) => return Some(lease),
                Err(_) if scores.evict() || open.evict() => {}
                Err(_) => return None,
            }
        };
        match job.extend(extension, &self.producer, allocate, &self.context) {
            Ok(job) if job.is_computed() => self.keep_open(job.extended(None, &self.load)),
            Ok(job) => self.running.push(job),
            Err(job) => job.evict(),
        }
    }

    fn keep_open(&mut self, open: Option<(Ticket, Running)>) {
        if let Some((lease, job)) = open {
            self.open.keep(lease, job);
        }
    }

    /// Moves waiting prompts into the batch, first come, first served. A prompt that does not fit blocks those behind
    /// it; otherwise smaller prompts could overtake it forever.
    fn admit(&mut self) {
        // Extensions have places of their own, so they keep no prompt out.
        while self.running.iter().filter(|job| job.extending.is_none()).count() < self.limits.max_running {
            let Some(first) = self.waiting.front() else { return };
            let Some((lease, cached)) = first.take_blocks(&self.context.pool) else {
                if self.scores.evict() {
                    continue;
                }
                // Open prefills make room for prompts, if that is enough.
                let needed = blocks_for(first.request.tokens.len());
                if needed <= self.context.pool.available() + self.open.blocks() && self.open.evict() {
                    continue;
                }
                return;
            };
            let Some(job) = self.waiting.pop_front() else { return };
            self.running.push(Running::start(job, lease, cached, &self.context));
        }
    }

    /// Computes the next chunks in one forward pass.
    fn step(&mut self) {
        let tokens = self.pace.step_tokens(self.limits.step_target, self.limits.max_batch_tokens);
        // As many extensions as prompts: a device has room for a limited number of slices.
        let mut extensions = 0;
        let takes_part = |(i, job): (usize, &Running)| {
            extensions += usize::from(job.extending.is_some());
            (job.extending.is_none() || extensions <= self.limits.max_running).then_some(i)
        };
        let jobs: Vec<usize> = self.running.iter().enumerate().filter_map(takes_part).collect();
        let mut plan = scheduler::plan(jobs.iter().map(|job| self.running[*job].progress()), tokens);
        plan.iter_mut().for_each(|chunk| chunk.job = jobs[chunk.job]);
        let began = Instant::now();
        let chunks: Vec<_> = plan
            .iter()
            .map(|chunk| PromptChunk { job: &self.running[chunk.job], tokens: chunk.tokens.clone() })
            .collect();
        let layers = StepLayers {
            chunks: chunks.iter().map(|chunk| chunk.job.chunk_layers(&chunk.tokens)).collect(),
            pool: self.context.pool.clone(),
            last_layer: self.context.store.num_layers() - 1,
        };
        let result = self.compute.step(&chunks, Arc::new(layers));
        drop(chunks);
        self.computed = Some(Step { plan, began, result });
    }

    /// The rest of a turn: applies the results of the step. If it failed, all prompts of the batch fail.
    pub fn finish(&mut self) {
        match self.computed.take() {
            None => {}
            Some(Step { plan, began, result: Ok(outputs) }) => {
                let (tokens, took) = (plan.iter().map(|chunk| chunk.tokens.len()).sum(), began.elapsed());
                self.pace.observe(tokens, took);
                self.step_times.record(tokens, took);
                if plan.iter().all(|chunk| self.running[chunk.job].extending.is_some()) {
                    self.extension_step = took;
                }
                self.load.prefilled(plan.len(), tokens, took);
                self.advance(&plan, outputs);
            }
            Some(Step { plan, result: Err(e), .. }) => {
                self.lost = e.is_lost_device();
                for chunk in plan.iter().rev() {
                    self.running.remove(chunk.job).fail(&format!("computing the prompt: {e}"));
                }
            }
        }
        self.load.step_ended();
        self.load.publish();
    }

    /// Applies the results of a step. The plan lists the prompts in order of arrival.
    fn advance(&mut self, plan: &[Chunk], outputs: Vec<ChunkOutput>) {
        let extensions = plan.iter().filter(|chunk| self.running[chunk.job].extending.is_some()).count();
        let seconds_per_draft = self.step_times.seconds_per_token().map(|seconds| seconds * extensions as f64);
        // In reverse order, because removing a prompt shifts the indices behind it.
        for (chunk, output) in plan.iter().zip(outputs).rev() {
            let job = &mut self.running[chunk.job];
            job.advance(chunk.tokens.end);
            job.logprobs.extend(output.logprobs);
            if let Some(extending) = &mut job.extending {
                extending.choices.extend(output.choices);
                if job.is_computed() {
                    let open = self.running.remove(chunk.job).extended(seconds_per_draft, &self.load);
                    self.keep_open(open);
                }
            } else if let Some(token) = output.first_token {
                let open = self.running.remove(chunk.job).finish(token, &self.load);
                self.keep_open(open);
            }
        }
    }
}
