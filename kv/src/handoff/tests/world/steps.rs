//! The steps that an attempt can take without a fault.

use super::{
    Answer, HandoffState, Message, ReceiverEvent, SCRIBBLE, SenderEvent, SenderState, World, WriteMode, content,
};

/// A fault-free step of an attempt.
#[derive(Clone, Copy)]
pub(super) enum Step {
    Connect,
    Announce,
    Commit,
    Sent,
    SenderStopped,
    Deliver,
    Arrive,
    Land,
    WriterStopped,
    Answer,
    Decode,
    Finish,
}

impl World {
    pub(super) fn enabled(&self, i: usize) -> Vec<Step> {
        let a = &self.attempts[i];
        let alive = !a.sender.state().is_over();
        let state = a.receiver.state();
        [
            (a.sender.state() == SenderState::Connecting, Step::Connect),
            (alive && !a.to_announce.is_empty(), Step::Announce),
            // Possible before, between or after announcements, because a device may report a layer as done late.
            (alive && !a.committed, Step::Commit),
            (a.reading.is_some(), Step::Sent),
            (a.sender_stops, Step::SenderStopped),
            (!a.to_receiver.is_empty() && a.landing.is_none() && a.awaited.is_none(), Step::Deliver),
            (!a.flying.is_empty(), Step::Arrive),
            (a.landing.is_some() || a.report().is_some(), Step::Land),
            (a.writer_stops, Step::WriterStopped),
            (!a.to_sender.is_empty(), Step::Answer),
            (state == HandoffState::Ready, Step::Decode),
            (state == HandoffState::Decoding, Step::Finish),
        ]
        .into_iter()
        .filter_map(|(on, step)| on.then_some(step))
        .collect()
    }

    pub(super) fn step(&mut self, i: usize, step: Step, pick: u16) {
        match step {
            Step::Connect => self.send(i, SenderEvent::Connected),
            Step::Announce => {
                let a = &mut self.attempts[i];
                let piece = a.to_announce.remove(pick as usize % a.to_announce.len());
                if let Some(lease) = &a.sender_lease {
                    for block in piece.first_block..piece.first_block + piece.blocks {
                        let id = lease.blocks()[(block - a.sender.spec().held_blocks) as usize];
                        self.sender_memory.insert((piece.layer, id), content(a.id, piece.layer, block));
                    }
                }
                self.send(i, SenderEvent::LayerReady(piece));
            }
            Step::Commit => {
                self.attempts[i].committed = true;
                self.send(i, SenderEvent::Commit { first_token: i as u32 });
            }
            Step::Sent => {
                let a = &mut self.attempts[i];
                let Some(piece) = a.reading.take() else { return };
                let lease = a.sender_lease.as_ref().expect("KV-2: blocks are kept while they are read");
                let data = (piece.first_block..piece.first_block + piece.blocks)
                    .map(|b| {
                        let id = lease.blocks()[(b - a.sender.spec().held_blocks) as usize];
                        // `Op::Blunder` may announce a block that was never computed.
                        self.sender_memory.get(&(piece.layer, id)).copied().unwrap_or(SCRIBBLE)
                    })
                    .collect();
                match a.mode {
                    WriteMode::Framed => a.to_receiver.push(Message::Layer(piece, data, false)),
                    WriteMode::OneSided => {
                        a.flying.push_back((piece, data, false));
                        a.to_receiver.push(Message::Written(piece));
                    }
                }
                self.send(i, SenderEvent::Sent);
            }
            Step::SenderStopped => {
                self.attempts[i].sender_stops = false;
                self.attempts[i].reading = None;
                self.send(i, SenderEvent::Stopped);
            }
            Step::Deliver => {
                let message = self.attempts[i].to_receiver.remove(0);
                self.deliver(i, message);
            }
            Step::Arrive => self.arrive(i),
            Step::Land => {
                let spoilt = match self.attempts[i].report() {
                    Some(spoilt) => {
                        self.attempts[i].awaited = None;
                        spoilt
                    }
                    None => self.land(i),
                };
                self.receive(i, ReceiverEvent::Landed { checksum_ok: !spoilt });
            }
            Step::WriterStopped => {
                // Worst case: the pending write completes before the writer stops.
                if self.attempts[i].landing.is_some() {
                    self.land(i);
                }
                // What is on its way arrives before the access is revoked; what is sent later never does.
                while !self.attempts[i].flying.is_empty() {
                    self.arrive(i);
                }
                self.attempts[i].awaited = None;
                self.attempts[i].writer_stops = false;
                self.attempts[i].writer_attached = false;
                self.receive(i, ReceiverEvent::WriterStopped);
            }
            Step::Answer => match self.attempts[i].to_sender.remove(0) {
                Answer::Accept => self.send(i, SenderEvent::Accepted),
                Answer::Refuse(reason) => self.send(i, SenderEvent::Refused(reason)),
                Answer::Confirm => self.send(i, SenderEvent::Confirmed),
            },
            Step::Decode => drop(self.receive(i, ReceiverEvent::DecodeStarted)),
            Step::Finish => {
                self.check_content(i);
                self.receive(i, ReceiverEvent::Finished);
                self.attempts[i].owner = None;
            }
        }
    }
}
