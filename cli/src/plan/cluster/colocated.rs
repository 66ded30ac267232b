//! Nodes that compute prompts and answers with one model: chunked prefill, as other engines do it.
//!
//! This project has no such node. It is what two-stage serving is compared with, so it gets the benefit of the doubt: the
//! rows of the batch and of the prompts share one pass over the weights.

use std::time::Duration;

use overfill_kv::{BLOCK_TOKENS, blocks_for};
use overfill_prefill_node::scheduler::{self, Chunk, Pace, PromptProgress};
use overfill_router::parts::{DecodeCandidate, pick_decode};

use super::{Cluster, Event, Shares, World, draw, prefill::size, seats::Seats};

/// A node for prompts and answers.
pub(super) struct ColocatedNode {
    seats: Seats,
    /// Prompts in progress, in order of arrival.
    prompts: Vec<usize>,
    queued_tokens: usize,
    pace: Pace,
    step: Option<Step>,
}

struct Step {
    began: f64,
    chunks: Vec<Chunk>,
}

impl ColocatedNode {
    pub(super) fn new(kv_blocks: usize, max_running: usize) -> Self {
        Self {
            seats: Seats::new(kv_blocks, max_running),
            prompts: Vec::new(),
            queued_tokens: 0,
            pace: Pace::default(),
            step: None,
        }
    }

    pub(super) fn add_to(&self, sums: &mut Shares) {
        sums.prefill_busy_nodes += f64::from(u8::from(self.step.is_some()));
        sums.prefill_queued_tokens += self.queued_tokens as f64;
        self.seats.add_to(sums);
    }

    /// Begins a step if the node is idle and has work.
    fn turn(&mut self, id: usize, world: &mut World<'_>) {
        if self.step.is_some() {
            return;
        }
        self.seats.resume(&mut world.jobs);
        while let Some(job) = self.seats.reserve(&mut world.jobs) {
            let j = &mut world.jobs[job];
            (j.reserved, j.started, j.computed) = (j.turn, world.now, j.ask.cached_tokens);
            self.queued_tokens -= j.ask.cached_tokens;
            self.prompts.push(job);
        }
        self.seats.make_room(world);
        let sequences = self.seats.running.len();
        let limits = &world.setup.limits;
        let room = self.pace.step_tokens(limits.step_target, limits.max_batch_tokens);
        let progress = |job: &usize| {
            let j = &world.jobs[*job];
            PromptProgress { computed: j.computed, total: j.ask.prompt_tokens, max_chunk: usize::MAX }
        };
        let chunks =
            scheduler::plan(self.prompts.iter().map(progress), room.saturating_sub(sequences).max(BLOCK_TOKENS));
        if chunks.is_empty() && sequences == 0 {
            return;
        }
        let model = &world.setup.prefill;
        let context = self.seats.context(&world.jobs);
        let (rows, before) = size(&chunks);
        let decode = if sequences > 0 { model.decode_seconds(sequences, context) } else { 0.0 };
        let seconds = if rows > 0 {
            let joint = model.prefill.seconds((rows + sequences) as f64, before) + model.decode.context(context as f64);
            joint.max(decode)
        } else {
            decode
        };
        let spread = if rows > 0 { &model.prefill_spread } else { &model.decode_spread };
        let seconds = seconds * draw(spread, 1.0, &mut world.rng);
        self.step = Some(Step { began: world.now, chunks });
        world.step(seconds, Event::ColocatedStep(id));
    }
}

impl Cluster<'_> {
    /// Sends a request to the least occupied node.
    pub(super) fn choose_colocated(&mut self, job: usize) {
        let ask = self.world.jobs[job].ask;
        let nodes: Vec<DecodeCandidate> = self.colocated.iter().map(|node| node.seats.candidate()).collect();
        let blocks = blocks_for(ask.prompt_tokens + ask.output_tokens) as u32;
        let Some(id) = pick_decode(blocks, &nodes) else { return };
        let node = &mut self.colocated[id];
        node.queued_tokens += ask.prompt_tokens;
        node.seats.waiting.push_back(job);
        node.turn(id, &mut self.world);
    }

    pub(super) fn colocated_step_ended(&mut self, id: usize) {
        let (node, world) = (&mut self.colocated[id], &mut self.world);
        let Some(Step { began, chunks }) = node.step.take() else { return };
        let (rows, _) = size(&chunks);
        node.pace.observe(rows, Duration::from_secs_f64(world.now - began));
        node.queued_tokens -= rows;
        world.record.prefilled(rows);
        world.record.decoded(node.seats.running.len());
        let mut ended = node.seats.tokens(world);
        for chunk in chunks.iter().rev() {
            let job = node.prompts[chunk.job];
            let j = &mut world.jobs[job];
            j.computed = chunk.tokens.end;
            if j.computed < j.ask.prompt_tokens {
                continue;
            }
            let (single, blocks) = (j.ask.output_tokens == 1, j.blocks);
            node.prompts.remove(chunk.job);
            node.seats.reserved -= 1;
            world.first_token(job);
            if single {
                node.seats.free(blocks);
                ended.push(job);
            } else {
                node.seats.seat(job, &world.jobs);
            }
        }
        node.turn(id, &mut self.world);
        for job in ended {
            self.end(job);
        }
    }
}
