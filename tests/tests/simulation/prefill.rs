//! The engine of a simulated prefill node: the real one's queue, scheduler and jobs, but the model takes only time.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::{
        Arc,
        mpsc::{Receiver, TryRecvError},
    },
    time::Duration,
};

use overfill_kv::{BLOCK_TOKENS, BlockPool, KvStore as _, OutputToken};
use overfill_prefill_node::{
    engine::Limits,
    job::{HandoffContext, Job, Running},
    scheduler::{self, Chunk},
};

use crate::{
    content::{BLOCK_BYTES, Content, FULL, LAYERS, next_token},
    guard::Guard,
    pace::Pace,
};

/// As the real engine's.
const POLL: Duration = Duration::from_millis(5);

/// What an engine works with.
pub struct Engine {
    /// New prompts.
    pub jobs: Receiver<Job>,
    /// How KV leaves.
    pub context: HandoffContext,
    /// Blocks.
    pub pool: BlockPool,
    /// Bounds.
    pub limits: Limits,
    /// Memory.
    pub guard: Arc<Guard>,
    /// Time for a layer.
    pub pace: Pace,
}

impl Engine {
    /// Computes until nothing is left and nothing can come.
    pub async fn run(self) {
        let mut waiting: VecDeque<Job> = VecDeque::new();
        let mut running: Vec<(Running, Arc<Content>)> = Vec::new();
        loop {
            let ended = loop {
                match self.jobs.try_recv() {
                    Ok(job) => waiting.push_back(job),
                    Err(e) => break e == TryRecvError::Disconnected,
                }
            };
            waiting.retain(|job| !job.is_over());
            running.retain(|(job, _)| !job.is_over());
            if ended && waiting.is_empty() && running.is_empty() {
                return;
            }
            while running.len() < self.limits.max_running {
                let Some((lease, cached)) = waiting.front().and_then(|job| job.take_blocks(&self.pool)) else { break };
                let Some(job) = waiting.pop_front() else { break };
                let content = Arc::new(Content::new(&job.request.tokens, FULL));
                self.guard.will_send(lease.blocks(), &content);
                running.push((Running::start(job, lease, cached, &self.context), content));
            }
            match running.is_empty() {
                true => tokio::time::sleep(POLL).await,
                false => self.step(&mut running).await,
            }
            self.context.load.publish();
        }
    }

    async fn step(&self, running: &mut Vec<(Running, Arc<Content>)>) {
        let progress = running.iter().map(|(job, _)| job.progress());
        let chunks = scheduler::plan(progress, self.limits.max_batch_tokens);
        for layer in 0..LAYERS as usize {
            for chunk in &chunks {
                let (job, content) = &running[chunk.job];
                self.compute(job, content, layer, chunk);
            }
            self.pace.step().await;
            for chunk in &chunks {
                let (job, _) = &running[chunk.job];
                job.layer_ready(layer, &scheduler::final_blocks(&chunk.tokens, job.request.tokens.len()));
            }
        }
        let mut done = Vec::new();
        for chunk in &chunks {
            let (job, _) = &mut running[chunk.job];
            job.advance(chunk.tokens.end, &self.pool);
            if chunk.tokens.end == job.request.tokens.len() {
                done.push(chunk.job);
            }
        }
        for i in done.into_iter().rev() {
            let (job, _) = running.remove(i);
            let token = next_token(&job.request.tokens);
            job.finish(OutputToken { token, logprob: f32::NAN, top: Vec::new() }, &self.context.load);
        }
    }

    /// Writes the KV of a chunk, to the end of its last block.
    fn compute(&self, job: &Running, content: &Content, layer: usize, chunk: &Chunk) {
        let touched: Range<usize> = chunk.tokens.start / BLOCK_TOKENS..chunk.tokens.end.div_ceil(BLOCK_TOKENS);
        let write = &mut |i: usize, bytes: &mut [u8]| {
            let block: [u8; BLOCK_BYTES] = content.block(layer as u32, touched.start + i);
            bytes.copy_from_slice(&block);
        };
        self.guard.memory.write(layer, &job.blocks[touched.clone()], write).expect("a job's blocks are the node's");
    }
}
