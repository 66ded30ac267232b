//! Checks of the invariants after every event.

use std::time::Duration;

use super::{HandoffState, LAYERS, SCRIBBLE, World, content, due, steps::Step};

impl World {
    /// KV-5: the request decodes over exactly the KV that prefill computed for it.
    pub(super) fn check_content(&self, i: usize) {
        let a = &self.attempts[i];
        for (due, layer) in due(a.id).into_iter().zip(0..LAYERS) {
            for block in due {
                let id = a.target[(block - a.receiver.spec().held_blocks) as usize];
                let got = self.receiver_memory.get(&(layer, id));
                assert_eq!(got, Some(&content(a.id, layer, block)), "KV-5: layer {layer}, block {block}");
            }
        }
        assert_eq!(a.receiver_outcome, Some(Ok(i as u32)), "KV-5: the first token is the sender's");
    }

    pub fn check(&self) {
        for a in &self.attempts {
            assert!(a.accepts <= 1, "KV-4: a ticket was taken twice");
            if a.receiver.state() == HandoffState::Decoding {
                self.check_content(a.id);
            }
            let told = a.receiver_outcome.is_some();
            assert_eq!(
                told,
                !a.receiver.state().is_open(),
                "KV-6: the owner gets an outcome if and only if the attempt is decided"
            );
            assert_eq!(a.sender_outcome.is_some(), a.sender.state().is_over(), "KV-6: the same on the sender");
            let overdue = self.now > a.receiver.spec().deadline;
            assert!(!overdue || told, "KV-6: no outcome after the deadline");
        }
        for (layer, (_, theirs)) in (0..LAYERS).flat_map(|l| self.competitors.iter().map(move |c| (l, c))) {
            for id in theirs.blocks() {
                let got = self.receiver_memory[&(layer, *id)];
                assert_eq!(got, SCRIBBLE, "KV-1: a block of another request was written");
            }
        }
    }

    /// Advances the clock past every deadline. Tasks that were told to stop do so, and owners of ready requests decode
    /// them to the end.
    pub fn settle(&mut self) {
        self.competitors.clear();
        self.now += Duration::from_secs(61);
        self.tick();
        for i in 0..self.attempts.len() {
            for step in [Step::WriterStopped, Step::SenderStopped, Step::Decode, Step::Finish] {
                let possible = self.enabled(i).into_iter().any(|s| s as usize == step as usize);
                if possible {
                    self.step(i, step, 0);
                }
            }
            // The owner of a request that is over drops its lease.
            if self.attempts[i].receiver.state().is_over() {
                self.attempts[i].owner = None;
            }
        }
    }

    /// KV-3: all blocks are free. KV-6: every attempt has its outcome.
    pub fn check_settled(&self) {
        for a in &self.attempts {
            assert!(a.receiver_outcome.is_some() && a.sender_outcome.is_some(), "KV-6: no outcome after the deadline");
            assert!(!a.receiver.is_stranded() && !a.sender.is_stranded());
        }
        assert_eq!(self.sender_pool.in_use(), 0, "KV-3: the sender's blocks are free after one lease");
        assert_eq!(self.receiver_pool.in_use(), 0, "KV-3: the receiver's blocks are free after one lease");
    }
}
