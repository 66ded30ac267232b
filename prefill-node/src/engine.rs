//! The thread that owns the model: takes prompts in, computes them together in chunks, lets their KV leave layer by
//! layer.

use std::{
    collections::VecDeque,
    io,
    ops::Range,
    sync::{Arc, mpsc as std_mpsc},
    thread,
    time::Duration,
};

use overfill_cluster::LoadState;
use overfill_kv::{BlockPool, block_hashes};
use overfill_model::{KvCache, Logits, Model, SequenceSlice, Want, report, sample};
use overfill_transport::TransferConfig;
use tokio::{
    runtime,
    sync::{mpsc, oneshot},
    time::Instant,
};
use tracing::{debug, error};

use crate::{
    job::{Event, HandoffContext, JOB_EVENTS, Job, Request, Running},
    scheduler::{self, Chunk, Pace},
};

/// How long the engine sleeps when prompts wait but none can run: their room comes from handoffs that end elsewhere.
const POLL: Duration = Duration::from_millis(5);

/// What bounds the engine.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most prompt tokens in one step.
    pub max_batch_tokens: usize,
    /// How long a step should take: a prompt that comes waits for the one under way.
    pub step_target: Duration,
    /// Most prompts at once.
    pub max_running: usize,
    /// Most prompts waiting.
    pub max_waiting: usize,
}

/// A request that the engine does not take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Too many wait already.
    #[error("{0} prompts are waiting, which is the most")]
    QueueFull(usize),
    /// The node is shutting down, or the engine has ended.
    #[error("the node is shutting down")]
    Draining,
}

/// The way into the engine. The engine ends when all handles are gone and its work is done.
#[derive(Clone)]
pub struct EngineHandle {
    jobs: std_mpsc::SyncSender<Job>,
    load: Arc<LoadState>,
    producer: Arc<str>,
    max_waiting: usize,
}

impl EngineHandle {
    /// Queues a request. Dropping the receiver cancels it.
    pub fn submit(&self, request: Request) -> Result<mpsc::Receiver<Event>, Refused> {
        if self.load.is_draining() {
            return Err(Refused::Draining);
        }
        let waiting = self.load.try_wait(self.max_waiting).ok_or(Refused::QueueFull(self.max_waiting))?;
        let queued_tokens = self.load.count_tokens(request.tokens.len());
        let (events, receiver) = mpsc::channel(JOB_EVENTS);
        let hashes = block_hashes(&request.tokens, &self.producer);
        let job = Job { request, hashes, arrived: Instant::now(), events, waiting, queued_tokens };
        self.jobs.try_send(job).map_err(|e| match e {
            std_mpsc::TrySendError::Full(_) => Refused::QueueFull(self.max_waiting),
            std_mpsc::TrySendError::Disconnected(_) => Refused::Draining,
        })?;
        self.load.publish();
        Ok(receiver)
    }
}

/// The way into an engine, and what comes by it: [`start`] has one that computes with a model.
pub fn queue(load: Arc<LoadState>, producer: Arc<str>, max_waiting: usize) -> (EngineHandle, std_mpsc::Receiver<Job>) {
    let (jobs, queue) = std_mpsc::sync_channel(max_waiting);
    (EngineHandle { jobs, load, producer, max_waiting }, queue)
}

/// Starts the engine's thread. The second value resolves when it has ended, for whatever reason.
pub fn start(
    model: Model,
    cache: KvCache,
    pool: BlockPool,
    load: Arc<LoadState>,
    limits: Limits,
    transfer: TransferConfig,
) -> io::Result<(EngineHandle, oneshot::Receiver<()>)> {
    let (handle, jobs) = queue(load.clone(), model.fingerprint().into(), limits.max_waiting);
    let context = HandoffContext {
        runtime: runtime::Handle::current(),
        store: Arc::new(cache.clone()),
        config: transfer,
        load: load.clone(),
    };
    let engine = Engine {
        model,
        cache,
        pool,
        load,
        limits,
        context,
        jobs,
        waiting: VecDeque::new(),
        running: Vec::new(),
        logits: Logits::default(),
        pace: Pace::default(),
    };
    let (ended, end) = oneshot::channel();
    thread::Builder::new().name("prefill-engine".into()).spawn(move || {
        let _ended: oneshot::Sender<()> = ended;
        engine.run();
    })?;
    Ok((handle, end))
}

struct Engine {
    model: Model,
    cache: KvCache,
    pool: BlockPool,
    load: Arc<LoadState>,
    limits: Limits,
    context: HandoffContext,
    jobs: std_mpsc::Receiver<Job>,
    waiting: VecDeque<Job>,
    running: Vec<Running>,
    logits: Logits,
    pace: Pace,
}

impl Engine {
    fn run(mut self) {
        while self.receive() {
            self.load.step_began();
            self.waiting.retain(|job| !job.is_over());
            self.running.retain(|job| !job.is_over());
            self.admit();
            if !self.running.is_empty() {
                self.step();
            }
            self.load.step_ended();
            self.load.publish();
        }
        debug!("the engine has ended");
    }

    /// Takes what has come; waits only when there is nothing to compute. False when nothing is left and nothing can come.
    fn receive(&mut self) -> bool {
        if self.running.is_empty() {
            let received = match self.waiting.is_empty() {
                true => self.jobs.recv().map_err(|_| std_mpsc::RecvTimeoutError::Disconnected),
                false => self.jobs.recv_timeout(POLL),
            };
            match received {
                Ok(job) => self.waiting.push_back(job),
                Err(std_mpsc::RecvTimeoutError::Disconnected) if self.waiting.is_empty() => return false,
                Err(_) => {}
            }
        }
        self.waiting.extend(self.jobs.try_iter());
        true
    }

    /// Lets waiting prompts into the batch, first come, first served: one that does not fit holds up those behind it,
    /// so that it is not overtaken for ever.
    fn admit(&mut self) {
        while self.running.len() < self.limits.max_running {
            let Some((lease, cached)) = self.waiting.front().and_then(|job| job.take_blocks(&self.pool)) else {
                return;
            };
            let Some(job) = self.waiting.pop_front() else { return };
            self.running.push(Running::start(job, lease, cached, &self.context));
        }
    }

    /// One forward pass over the next chunks.
    fn step(&mut self) {
        let tokens = self.pace.step_tokens(self.limits.step_target, self.limits.max_batch_tokens);
        let chunks = scheduler::plan(self.running.iter().map(Running::progress), tokens);
        let began = Instant::now();
        let jobs: Vec<&Running> = chunks.iter().map(|chunk| &self.running[chunk.job]).collect();
        let slices: Vec<_> = chunks.iter().zip(&jobs).map(|(chunk, job)| slice(chunk, job)).collect();
        let finals: Vec<Range<usize>> = chunks
            .iter()
            .zip(&jobs)
            .map(|(chunk, job)| scheduler::final_blocks(&chunk.tokens, job.request.tokens.len()))
            .collect();
        let mut on_layer = |layer| {
            for (job, blocks) in jobs.iter().zip(&finals) {
                job.layer_ready(layer, blocks);
            }
        };
        match self.model.forward(&self.cache, &slices, &mut on_layer, &mut self.logits) {
            Ok(()) => {
                self.pace.observe(chunks.iter().map(|chunk| chunk.tokens.len()).sum(), began.elapsed());
                self.advance(&chunks);
            }
            Err(e) => {
                error!(error = %e, prompts = chunks.len(), "computing a batch");
                let failed: Vec<usize> = chunks.iter().map(|chunk| chunk.job).collect();
                let mut index = 0;
                for job in self.running.extract_if(.., |_| (failed.contains(&index), index += 1).0) {
                    job.fail(&format!("computing the prompt: {e}"));
                }
            }
        }
    }

    /// Takes the results of a step.
    fn advance(&mut self, chunks: &[Chunk]) {
        let logits = &self.logits;
        let mut rows = 0..logits.rows();
        let mut done = Vec::new();
        for chunk in chunks {
            let job = &mut self.running[chunk.job];
            let end = chunk.tokens.end;
            job.advance(end, &self.pool);
            if job.request.prompt_logprobs {
                let top = job.request.sampling.logprobs.unwrap_or(0);
                // The row of a position says what follows it; that of the last is the first token's.
                let followed = chunk.tokens.len() - usize::from(end == job.request.tokens.len());
                for (next, row) in job.request.tokens[chunk.tokens.start + 1..].iter().zip(rows.by_ref().take(followed))
                {
                    job.logprobs.push(report(logits.row(row), *next, top));
                }
            }
            if end < job.request.tokens.len() {
                continue;
            }
            if let Some(row) = rows.next() {
                let (prompt, output) = job.request.tokens.split_at(end - job.request.generated);
                done.push((chunk.job, sample(logits.row(row), &job.request.sampling, prompt, output, end)));
            }
        }
        // From the back, so that the places of those in front stay.
        for (job, token) in done.into_iter().rev() {
            self.running.remove(job).finish(token, &self.load);
        }
    }
}

fn slice<'a>(chunk: &Chunk, job: &'a Running) -> SequenceSlice<'a> {
    let want = match () {
        () if job.request.prompt_logprobs => Want::All,
        () if chunk.tokens.end == job.request.tokens.len() => Want::Last,
        () => Want::Nothing,
    };
    SequenceSlice {
        tokens: &job.request.tokens[chunk.tokens.clone()],
        start: chunk.tokens.start,
        blocks: &job.blocks,
        want,
    }
}
