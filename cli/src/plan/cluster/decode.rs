//! Decode nodes.

use super::{Cluster, Event, Shares, draw, seats::Seats};

/// A decode node.
pub(super) struct DecodeNode {
    pub(super) seats: Seats,
    /// Requests whose KV has arrived since the last step.
    ready: Vec<usize>,
    computes: bool,
}

impl DecodeNode {
    pub(super) fn new(kv_blocks: usize, max_running: usize) -> Self {
        Self { seats: Seats::new(kv_blocks, max_running), ready: Vec::new(), computes: false }
    }

    pub(super) fn add_to(&self, sums: &mut Shares) {
        sums.decode_busy_nodes += f64::from(u8::from(self.computes));
        self.seats.add_to(sums);
    }

    pub(super) fn submit(&mut self, job: usize) {
        self.seats.waiting.push_back(job);
    }

    pub(super) fn ready(&mut self, job: usize) {
        self.ready.push(job);
    }
}

impl Cluster<'_> {
    /// What the node's engine does between two steps, and the beginning of the next step.
    pub(super) fn decode_turn(&mut self, id: usize) {
        let (node, world) = (&mut self.decode[id], &mut self.world);
        if node.computes {
            return;
        }
        for job in std::mem::take(&mut node.ready) {
            node.seats.reserved -= 1;
            node.seats.seat(job, &world.jobs);
        }
        node.seats.resume(&mut world.jobs);
        let reserved: Vec<usize> = std::iter::from_fn(|| node.seats.reserve(&mut world.jobs)).collect();
        node.seats.make_room(world);
        let sequences = node.seats.running.len();
        if sequences > 0 {
            let model = &world.setup.decode;
            let seconds = model.decode_seconds(sequences, node.seats.context(&world.jobs));
            let seconds = seconds * draw(&model.decode_spread, 1.0, &mut world.rng);
            node.computes = true;
            world.step(seconds, Event::DecodeStep(id));
        }
        for job in reserved {
            self.prefill_submit(job);
        }
    }

    pub(super) fn decode_step_ended(&mut self, id: usize) {
        let (node, world) = (&mut self.decode[id], &mut self.world);
        node.computes = false;
        world.record.decoded(node.seats.running.len());
        let ended = node.seats.tokens(world);
        self.decode_turn(id);
        for job in ended {
            self.end(job);
        }
    }
}
