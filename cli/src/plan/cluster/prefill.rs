//! Prefill nodes.

use std::collections::VecDeque;
use std::time::Duration;

use overfill_kv::blocks_for;
use overfill_prefill_node::scheduler::{self, Chunk, Pace, PromptProgress};
use overfill_router::parts::{DecodeCandidate, PrefillCandidate, pick_decode, pick_prefill};

use super::{Cluster, Event, Shares, World, draw};

/// A prefill node.
pub(super) struct PrefillNode {
    waiting: VecDeque<usize>,
    /// In order of arrival.
    running: Vec<usize>,
    free_blocks: usize,
    queued_tokens: usize,
    /// Requests, and their tokens to compute, that the router has chosen this node for and that have no first token yet.
    /// The router counts them itself, so that requests that come at once do not all choose the same node.
    own_requests: usize,
    own_tokens: usize,
    pace: Pace,
    step: Option<Step>,
    /// When everything is sent that was computed so far.
    sent: f64,
    sending: usize,
}

struct Step {
    began: f64,
    chunks: Vec<Chunk>,
}

impl PrefillNode {
    pub(super) fn new(kv_blocks: usize) -> Self {
        Self {
            waiting: VecDeque::new(),
            running: Vec::new(),
            free_blocks: kv_blocks,
            queued_tokens: 0,
            own_requests: 0,
            own_tokens: 0,
            pace: Pace::default(),
            step: None,
            sent: 0.0,
            sending: 0,
        }
    }

    pub(super) fn add_to(&self, sums: &mut Shares) {
        sums.prefill_busy_nodes += f64::from(u8::from(self.step.is_some()));
        sums.prefill_queued_tokens += self.queued_tokens as f64;
        sums.sending_nodes += f64::from(u8::from(self.sending > 0));
    }

    fn candidate(&self, cached: usize) -> PrefillCandidate {
        PrefillCandidate {
            queued_tokens: self.queued_tokens.max(self.own_tokens) as u64,
            matched_tokens: cached as u64,
            requests: (self.waiting.len() + self.running.len()).max(self.own_requests) as u32,
        }
    }

    /// Begins a step if the node is idle and has work.
    fn turn(&mut self, id: usize, world: &mut World<'_>) {
        if self.step.is_some() {
            return;
        }
        let limits = &world.setup.limits;
        while self.running.len() < limits.prefill_running
            && let Some(&job) = self.waiting.front()
        {
            let j = &mut world.jobs[job];
            let blocks = blocks_for(j.ask.prompt_tokens);
            if blocks > self.free_blocks {
                break;
            }
            self.free_blocks -= blocks;
            self.waiting.pop_front();
            (j.started, j.computed) = (world.now, j.ask.cached_tokens);
            self.queued_tokens -= j.ask.cached_tokens;
            self.running.push(job);
        }
        if self.running.is_empty() {
            return;
        }
        let tokens = self.pace.step_tokens(limits.step_target, limits.max_batch_tokens);
        let progress = |job: &usize| {
            let j = &world.jobs[*job];
            PromptProgress { computed: j.computed, total: j.ask.prompt_tokens, max_chunk: usize::MAX }
        };
        let chunks = scheduler::plan(self.running.iter().map(progress), tokens);
        let model = &world.setup.prefill;
        let (rows, context) = size(&chunks);
        let seconds = model.prefill.seconds(rows as f64, context) * draw(&model.prefill_spread, 1.0, &mut world.rng);
        self.step = Some(Step { began: world.now, chunks });
        world.step(seconds, Event::PrefillStep(id));
    }
}

/// Tokens of a step, and the tokens of KV that they read from before the step in total.
pub(super) fn size(chunks: &[Chunk]) -> (usize, f64) {
    let rows = chunks.iter().map(|chunk| chunk.tokens.len()).sum();
    (rows, chunks.iter().map(|chunk| (chunk.tokens.len() * chunk.tokens.start) as f64).sum())
}

impl Cluster<'_> {
    /// Chooses the nodes of a request as the router does, and asks the decode node for room.
    pub(super) fn choose(&mut self, job: usize) {
        let ask = self.world.jobs[job].ask;
        let prefill: Vec<PrefillCandidate> =
            self.prefill.iter().map(|node| node.candidate(ask.cached_tokens)).collect();
        let decode: Vec<DecodeCandidate> = self.decode.iter().map(|node| node.seats.candidate()).collect();
        let blocks = blocks_for(ask.prompt_tokens + ask.output_tokens) as u32;
        let (Some(p), Some(d)) = (pick_prefill(ask.prompt_tokens as u64, &prefill), pick_decode(blocks, &decode))
        else {
            return;
        };
        let j = &mut self.world.jobs[job];
        (j.prefill_node, j.decode_node) = (p, d);
        self.prefill[p].own_requests += 1;
        self.prefill[p].own_tokens += ask.prompt_tokens - ask.cached_tokens;
        if ask.output_tokens == 1 {
            // The full model alone answers.
            return self.prefill_submit(job);
        }
        self.decode[d].submit(job);
        self.decode_turn(d);
    }

    /// A decode node has reserved the request's blocks: the prompt goes to the prefill node.
    pub(super) fn prefill_submit(&mut self, job: usize) {
        let j = &mut self.world.jobs[job];
        j.reserved = self.world.now;
        let (id, node) = (j.prefill_node, &mut self.prefill[j.prefill_node]);
        node.queued_tokens += j.ask.prompt_tokens;
        node.waiting.push_back(job);
        node.turn(id, &mut self.world);
    }

    pub(super) fn prefill_step_ended(&mut self, id: usize) {
        let world = &mut self.world;
        let node = &mut self.prefill[id];
        let Some(Step { began, chunks }) = node.step.take() else { return };
        let (rows, _) = size(&chunks);
        node.pace.observe(rows, Duration::from_secs_f64(world.now - began));
        node.queued_tokens -= rows;
        world.record.prefilled(rows);
        // KV leaves layer by layer from the beginning of the step on, and the last layer after its end.
        let byte = world.setup.kv_bytes_per_token / world.setup.transfer_bytes_per_second;
        node.sent = (node.sent.max(began) + rows as f64 * byte).max(world.now);
        let mut alone = Vec::new();
        for chunk in chunks.iter().rev() {
            let job = node.running[chunk.job];
            let j = &mut world.jobs[job];
            j.computed = chunk.tokens.end;
            if j.computed < j.ask.prompt_tokens {
                continue;
            }
            node.running.remove(chunk.job);
            node.own_requests -= 1;
            node.own_tokens -= j.ask.prompt_tokens - j.ask.cached_tokens;
            let sends = j.ask.output_tokens > 1;
            let cached = j.ask.cached_tokens as f64 * byte;
            world.first_token(job);
            if sends {
                // Cached blocks are sent as well.
                node.sent += cached;
                node.sending += 1;
                let seconds = node.sent - world.now + draw(&world.setup.prefill.handoff_seconds, 0.0, &mut world.rng);
                world.after(seconds, Event::Handoff(job));
            } else {
                node.free_blocks += blocks_for(world.jobs[job].ask.prompt_tokens);
                alone.push(job);
            }
        }
        node.turn(id, &mut self.world);
        for job in alone {
            self.end(job);
        }
    }

    /// All KV of a request is on its decode node.
    pub(super) fn handoff_ended(&mut self, job: usize) {
        let j = self.world.jobs[job];
        let node = &mut self.prefill[j.prefill_node];
        node.free_blocks += blocks_for(j.ask.prompt_tokens);
        node.sending -= 1;
        node.turn(j.prefill_node, &mut self.world);
        self.decode[j.decode_node].ready(job);
        self.decode_turn(j.decode_node);
    }
}
