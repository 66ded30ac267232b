//! Blocks and places of a node that decodes, with the shipped scheduler's rules.

use std::collections::VecDeque;

use overfill_decode_node::scheduler::{Growth, Occupancy, Seat, next_growth};
use overfill_kv::blocks_for;
use overfill_router::parts::DecodeCandidate;

use super::{Job, Shares, World};

/// Blocks and places of a node.
pub(super) struct Seats {
    total_blocks: usize,
    max_running: usize,
    free_blocks: usize,
    /// Requests without blocks, in order of arrival.
    pub(super) waiting: VecDeque<usize>,
    /// Preempted requests, in order of arrival.
    swapped: VecDeque<usize>,
    /// Requests that hold blocks and do not decode yet.
    pub(super) reserved: usize,
    /// The batch, in order of arrival.
    pub(super) running: Vec<usize>,
}

impl Seats {
    pub(super) fn new(total_blocks: usize, max_running: usize) -> Self {
        Self {
            total_blocks,
            max_running,
            free_blocks: total_blocks,
            waiting: VecDeque::new(),
            swapped: VecDeque::new(),
            reserved: 0,
            running: Vec::new(),
        }
    }

    /// The node as the router sees it.
    pub(super) fn candidate(&self) -> DecodeCandidate {
        DecodeCandidate {
            free_blocks: self.free_blocks as u32,
            total_blocks: self.total_blocks as u32,
            requests: (self.waiting.len() + self.swapped.len() + self.seated()) as u32,
            max_running: self.max_running as u32,
        }
    }

    pub(super) fn add_to(&self, sums: &mut Shares) {
        sums.seated_requests += self.seated() as f64;
        sums.waiting_requests += (self.waiting.len() + self.swapped.len()) as f64;
        sums.used_blocks += (self.total_blocks - self.free_blocks) as f64;
    }

    fn seated(&self) -> usize {
        self.running.len() + self.reserved
    }

    fn admits(&self, blocks: usize) -> bool {
        Occupancy { available: self.free_blocks, seated: self.seated(), max_seated: self.max_running }.admits(blocks)
    }

    /// Puts a request into the batch.
    pub(super) fn seat(&mut self, job: usize, jobs: &[Job]) {
        let place = self.running.partition_point(|other| jobs[*other].order < jobs[job].order);
        self.running.insert(place, job);
    }

    /// Moves preempted requests back into the batch while there is room.
    pub(super) fn resume(&mut self, jobs: &mut [Job]) {
        while let Some(&job) = self.swapped.front()
            && self.admits(jobs[job].blocks)
        {
            self.free_blocks -= jobs[job].blocks;
            self.swapped.pop_front();
            self.seat(job, jobs);
        }
    }

    /// Reserves the blocks of the next waiting request. `None` if there is none, or no room.
    pub(super) fn reserve(&mut self, jobs: &mut [Job]) -> Option<usize> {
        let job = *self.waiting.front().filter(|_| self.swapped.is_empty())?;
        let blocks = blocks_for(jobs[job].ask.prompt_tokens);
        if !self.admits(blocks) {
            return None;
        }
        self.waiting.pop_front();
        self.free_blocks -= blocks;
        jobs[job].blocks = blocks;
        self.reserved += 1;
        Some(job)
    }

    /// Gives every sequence of the batch the block for its next token, and preempts the youngest if there are too few.
    pub(super) fn make_room(&mut self, world: &mut World<'_>) {
        let lacks = |job: &usize| {
            let j = &world.jobs[*job];
            Seat {
                lacks_block: j.blocks < blocks_for(j.ask.prompt_tokens + j.generated),
                sits_out: false,
                waits: false,
            }
        };
        let mut seats: Vec<Seat> = self.running.iter().map(lacks).collect();
        while let Some(growth) = next_growth(&seats, self.free_blocks > 0) {
            match growth {
                Growth::Grow(i) => {
                    self.free_blocks -= 1;
                    world.jobs[self.running[i]].blocks += 1;
                    seats[i].lacks_block = false;
                }
                Growth::Preempt(i) => {
                    let job = self.running.remove(i);
                    seats.remove(i);
                    self.free_blocks += world.jobs[job].blocks;
                    let order = world.jobs[job].order;
                    let place = self.swapped.partition_point(|other| world.jobs[*other].order < order);
                    self.swapped.insert(place, job);
                    world.record.preempted();
                }
            }
        }
    }

    /// Gives every sequence of the batch a token. Returns the requests that are complete, which leave.
    pub(super) fn tokens(&mut self, world: &mut World<'_>) -> Vec<usize> {
        let mut ended = Vec::new();
        self.running.retain(|&job| {
            let last = world.token(job);
            if last {
                ended.push(job);
            }
            !last
        });
        for job in &ended {
            self.free(world.jobs[*job].blocks);
        }
        ended
    }

    /// Tokens of KV that a step of the batch reads.
    pub(super) fn context(&self, jobs: &[Job]) -> usize {
        self.running.iter().map(|job| jobs[*job].ask.prompt_tokens + jobs[*job].generated).sum()
    }

    /// Blocks of a request that has left.
    pub(super) fn free(&mut self, blocks: usize) {
        self.free_blocks += blocks;
        debug_assert!(self.free_blocks <= self.total_blocks, "blocks were freed twice");
    }
}
