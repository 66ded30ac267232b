//! Simulation of two nodes with their pools and memories, and an unreliable channel between them.

mod checks;
mod steps;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::{BlockId, BlockLease, BlockPool};
use steps::Step;

const LAYERS: u32 = 2;
const BLOCKS: u32 = 3;
const POOL: usize = 10;

/// One operation of the simulation. The `u16`s choose among the possible targets.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    /// Starts an attempt if both pools have room.
    Begin,
    /// Runs one of the fault-free steps that are possible.
    Step(u16),
    /// Messages are reordered, repeated, lost or damaged.
    Reorder(u16),
    Repeat(u16),
    Lose(u16),
    Damage(u16),
    /// The hello of one attempt reaches another attempt.
    Misdeliver(u16, u16),
    /// A connection breaks. One side, both or neither notice.
    Break(u16),
    Cancel(u16),
    Abort(u16),
    /// The sending task ends at once, in the middle of a frame if one is being sent.
    CrashSender(u16),
    /// The prefill owner makes a mistake: it announces a piece twice or commits early.
    Blunder(u16),
    /// Another request allocates blocks on both nodes and fills them.
    Compete,
    /// Another request frees its blocks.
    Yield,
    /// Advances the clock by this many seconds.
    Wait(u8),
}

pub fn faulty_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => Just(Op::Begin),
        60 => any::<u16>().prop_map(Op::Step),
        1 => any::<u16>().prop_map(Op::Reorder),
        1 => any::<u16>().prop_map(Op::Repeat),
        1 => any::<u16>().prop_map(Op::Lose),
        1 => any::<u16>().prop_map(Op::Damage),
        1 => (any::<u16>(), any::<u16>()).prop_map(|(a, b)| Op::Misdeliver(a, b)),
        1 => any::<u16>().prop_map(Op::Break),
        1 => any::<u16>().prop_map(Op::Cancel),
        1 => any::<u16>().prop_map(Op::Abort),
        1 => any::<u16>().prop_map(Op::CrashSender),
        1 => any::<u16>().prop_map(Op::Blunder),
        3 => Just(Op::Compete),
        3 => Just(Op::Yield),
        2 => (0u8..20).prop_map(Op::Wait),
    ]
}

/// The blocks that are due in each layer. In some attempts, a layer has a window.
fn due(attempt: usize) -> Vec<Range<u32>> {
    let (start, end) = (spec().held_blocks, spec().held_blocks + BLOCKS);
    let window = [start..end, end - 2..end, end - 1..end][attempt / 2 % 3].clone();
    vec![start..end, window]
}

/// Expected content of a (layer, block) of an attempt. Never 0.
fn content(attempt: usize, layer: u32, block: u32) -> u64 {
    1 + (attempt as u64 * 100 + u64::from(layer) * 10 + u64::from(block))
}
const SCRIBBLE: u64 = u64::MAX;

#[derive(Clone, Debug)]
enum Message {
    Hello(Hello),
    /// The content at the time the frame was sent, and whether the channel damaged it.
    Layer(Piece, Vec<u64>, bool),
    /// The header of a piece that is written one-sided.
    Written(Piece),
    Ping,
    Commit(Commit),
    Garbage,
}

#[derive(Clone, Copy, Debug)]
enum Answer {
    Accept,
    Refuse(RefuseReason),
    Confirm,
}

type Memory = HashMap<(u32, BlockId), u64>;

struct Attempt {
    id: usize,
    sender: SenderHandoff,
    receiver: ReceiverHandoff,
    sender_lease: Option<BlockLease>,
    /// Pieces that prefill still has to announce.
    to_announce: Vec<Piece>,
    committed: bool,
    reading: Option<Piece>,
    sender_stops: bool,
    /// The transport's share of the lease.
    write_hold: Option<Arc<BlockLease>>,
    /// The owner's share of the lease.
    owner: Option<Arc<BlockLease>>,
    target: Vec<BlockId>,
    landing: Option<(Piece, Vec<u64>, bool)>,
    mode: WriteMode,
    /// One-sided writes that the sender's device has sent and that have not reached the receiver's memory yet.
    flying: VecDeque<(Piece, Vec<u64>, bool)>,
    /// One-sided writes that the receiver's device has reported, and whether they were damaged.
    reported: Vec<(Piece, bool)>,
    /// The piece whose header has come, while the receiver waits for the report.
    awaited: Option<Piece>,
    writer_attached: bool,
    writer_stops: bool,
    to_receiver: Vec<Message>,
    to_sender: Vec<Answer>,
    accepts: usize,
    receiver_outcome: Option<Result<u32, Failure>>,
    sender_outcome: Option<Result<(), Failure>>,
}

pub struct World {
    now: Duration,
    sender_pool: BlockPool,
    receiver_pool: BlockPool,
    sender_memory: Memory,
    receiver_memory: Memory,
    attempts: Vec<Attempt>,
    competitors: Vec<(BlockLease, BlockLease)>,
}

impl World {
    pub fn new() -> Self {
        Self {
            now: Duration::ZERO,
            sender_pool: BlockPool::new(POOL),
            receiver_pool: BlockPool::new(POOL),
            sender_memory: Memory::new(),
            receiver_memory: Memory::new(),
            attempts: Vec::new(),
            competitors: Vec::new(),
        }
    }

    pub fn succeeded(&self) -> usize {
        let whole = |a: &&Attempt| a.receiver.state() == HandoffState::Done && a.sender_outcome == Some(Ok(()));
        self.attempts.iter().filter(whole).count()
    }

    /// Applies an operation. False if there was nothing to do.
    pub fn apply(&mut self, op: Op) -> bool {
        let n = self.attempts.len();
        match op {
            Op::Begin => return self.begin(),
            Op::Compete => return self.compete(),
            Op::Yield => return self.competitors.pop().is_some(),
            Op::Wait(seconds) => {
                self.now += Duration::from_secs(u64::from(seconds));
                self.tick();
                return true;
            }
            _ if n == 0 => return false,
            Op::Step(pick) => {
                let enabled: Vec<(usize, Step)> =
                    (0..n).flat_map(|i| self.enabled(i).into_iter().map(move |s| (i, s))).collect();
                let Some((i, step)) = enabled.get(pick as usize % enabled.len().max(1)).copied() else { return false };
                self.step(i, step, pick);
            }
            Op::Reorder(pick) => self.attempts[pick as usize % n].to_receiver.reverse(),
            Op::Repeat(pick) => {
                let a = &mut self.attempts[pick as usize % n];
                let copies = (a.to_receiver.first().cloned(), a.to_sender.first().copied());
                a.to_receiver.extend(copies.0);
                a.to_sender.extend(copies.1);
            }
            Op::Lose(pick) => {
                let a = &mut self.attempts[pick as usize % n];
                drop((a.to_receiver.pop(), a.to_sender.pop()));
            }
            Op::Damage(pick) if pick & 0x100 == 0 && !self.attempts[pick as usize % n].flying.is_empty() => {
                let (_, data, spoilt) = &mut self.attempts[pick as usize % n].flying[0];
                data[0] = SCRIBBLE;
                *spoilt = true;
            }
            Op::Damage(pick) => match self.attempts[pick as usize % n].to_receiver.first_mut() {
                Some(Message::Layer(_, data, spoilt)) => {
                    data[0] = SCRIBBLE;
                    *spoilt = true;
                }
                Some(other) => *other = Message::Garbage,
                None => return false,
            },
            Op::Misdeliver(from, to) => {
                let hello = self.attempts[from as usize % n].hello();
                let to = to as usize % n;
                self.receive(to, ReceiverEvent::Hello(hello, self.attempts[to].mode));
            }
            Op::Break(pick) => {
                let i = pick as usize % n;
                let a = &mut self.attempts[i];
                (a.to_receiver, a.to_sender) = (Vec::new(), Vec::new());
                if pick & 0x100 == 0 {
                    self.receive(i, ReceiverEvent::Lost);
                }
                if pick & 0x200 == 0 {
                    self.send(i, SenderEvent::Lost);
                }
            }
            Op::Cancel(pick) => {
                let i = pick as usize % n;
                self.receive(i, ReceiverEvent::Cancel);
                self.attempts[i].owner = None;
            }
            Op::Abort(pick) => self.send(pick as usize % n, SenderEvent::Abort),
            Op::CrashSender(pick) => {
                let i = pick as usize % n;
                self.attempts[i].reading = None;
                self.send(i, SenderEvent::Stopped);
            }
            Op::Blunder(pick) => {
                let piece = Piece { layer: 0, first_block: u32::from(pick >> 9 & 3), blocks: 1 };
                let a = &self.attempts[pick as usize % n];
                let event = match pick & 0x100 {
                    0 => SenderEvent::Commit { first_token: (pick as usize % n) as u32 },
                    // Nobody can detect that a whole piece is announced before it is computed.
                    _ if a.to_announce.contains(&piece) => return false,
                    _ => SenderEvent::LayerReady(piece),
                };
                self.send(pick as usize % n, event);
            }
        }
        true
    }

    fn begin(&mut self) -> bool {
        let (Ok(source), Ok(target)) =
            (self.sender_pool.allocate(BLOCKS as usize), self.receiver_pool.allocate(BLOCKS as usize))
        else {
            return false;
        };
        let id = self.attempts.len();
        let spec = HandoffSpec {
            ticket: Ticket([id as u8 + 1; 16]),
            due: due(id),
            blocks: BLOCKS,
            deadline: self.now + Duration::from_secs(60),
            ..spec()
        };
        let end = spec.held_blocks + BLOCKS;
        let piece = |layer, blocks: Range<u32>| Piece { layer, first_block: blocks.start, blocks: blocks.len() as u32 };
        let pieces = spec.due.iter().zip(0..).flat_map(|(due, layer)| {
            [piece(layer, due.start..due.end.min(end - 1)), piece(layer, due.start.max(end - 1)..end)]
        });
        let to_announce = pieces.filter(|piece| piece.blocks > 0).collect();
        let target = Arc::new(target);
        self.attempts.push(Attempt {
            id,
            sender: SenderHandoff::new(spec.clone(), 1 + id as u32 % 2, self.now),
            receiver: ReceiverHandoff::new(spec),
            sender_lease: Some(source),
            to_announce,
            committed: false,
            reading: None,
            sender_stops: false,
            target: target.blocks().to_vec(),
            write_hold: Some(target.clone()),
            owner: Some(target),
            landing: None,
            mode: if id % 3 == 1 { WriteMode::OneSided } else { WriteMode::Framed },
            flying: VecDeque::new(),
            reported: Vec::new(),
            awaited: None,
            writer_attached: false,
            writer_stops: false,
            to_receiver: Vec::new(),
            to_sender: Vec::new(),
            accepts: 0,
            receiver_outcome: None,
            sender_outcome: None,
        });
        true
    }

    /// Another request allocates blocks and overwrites them. If they were still in use, a check fails.
    fn compete(&mut self) -> bool {
        let (Ok(a), Ok(b)) = (self.sender_pool.allocate(2), self.receiver_pool.allocate(2)) else { return false };
        for layer in 0..LAYERS {
            for id in a.blocks() {
                self.sender_memory.insert((layer, *id), SCRIBBLE);
            }
            for id in b.blocks() {
                self.receiver_memory.insert((layer, *id), SCRIBBLE);
            }
        }
        self.competitors.push((a, b));
        true
    }

    /// Writes the pending bytes to memory and returns whether they were damaged. KV-1: the attempt still holds the
    /// blocks.
    fn land(&mut self, i: usize) -> bool {
        let a = &mut self.attempts[i];
        let Some((piece, data, spoilt)) = a.landing.take() else { return false };
        assert!(a.write_hold.is_some(), "KV-1: a write landed in blocks that were given back");
        for (k, value) in data.into_iter().enumerate() {
            let id = a.target[(piece.first_block - a.receiver.spec().held_blocks) as usize + k];
            self.receiver_memory.insert((piece.layer, id), value);
        }
        spoilt
    }

    /// A one-sided write reaches the receiver, which has not been asked. KV-1: if the sender's access is not revoked,
    /// the attempt still holds the blocks.
    fn arrive(&mut self, i: usize) {
        let a = &mut self.attempts[i];
        let Some((piece, data, spoilt)) = a.flying.pop_front() else { return };
        if a.writer_attached {
            a.landing = Some((piece, data, spoilt));
            self.land(i);
            self.attempts[i].reported.push((piece, spoilt));
        }
    }

    fn deliver(&mut self, i: usize, message: Message) {
        match message {
            Message::Hello(hello) => drop(self.receive(i, ReceiverEvent::Hello(hello, self.attempts[i].mode))),
            // Frames on a connection that was not accepted are ignored.
            _ if !self.attempts[i].writer_attached => {}
            Message::Layer(piece, data, spoilt) => {
                if self.receive(i, ReceiverEvent::Layer(piece)) {
                    self.attempts[i].landing = Some((piece, data, spoilt));
                }
            }
            Message::Written(piece) => {
                if self.receive(i, ReceiverEvent::Layer(piece)) {
                    self.attempts[i].awaited = Some(piece);
                }
            }
            Message::Ping => drop(self.receive(i, ReceiverEvent::Ping)),
            Message::Commit(commit) => drop(self.receive(i, ReceiverEvent::Commit(commit))),
            Message::Garbage => drop(self.receive(i, ReceiverEvent::Garbage)),
        }
    }

    /// Passes an event to the receiver and carries out its actions. True if the announced bytes are to be written.
    fn receive(&mut self, i: usize, event: ReceiverEvent) -> bool {
        let actions = self.attempts[i].receiver.on_event(event, self.now);
        let mut write = false;
        for action in actions {
            let a = &mut self.attempts[i];
            match action {
                ReceiverAction::Accept => {
                    a.accepts += 1;
                    a.writer_attached = true;
                    a.to_sender.push(Answer::Accept);
                }
                ReceiverAction::Refuse(_) => {}
                ReceiverAction::Write(_) => write = true,
                ReceiverAction::Confirm => a.to_sender.push(Answer::Confirm),
                ReceiverAction::Ready { first_token } => {
                    assert_eq!(a.receiver_outcome, None, "KV-6: one outcome");
                    let revoked = a.mode == WriteMode::Framed || !a.writer_attached;
                    assert!(revoked, "KV-5: the sender may still change what the request decodes over");
                    a.receiver_outcome = Some(Ok(first_token));
                    self.check_content(i);
                }
                ReceiverAction::Fail(failure) => {
                    assert_eq!(a.receiver_outcome, None, "KV-6: one outcome");
                    a.receiver_outcome = Some(Err(failure));
                    a.owner = None;
                }
                ReceiverAction::StopWriter { tell } => {
                    a.to_sender.extend(tell.map(Answer::Refuse));
                    a.writer_stops = true;
                }
                ReceiverAction::ReleaseBlocks => {
                    assert!(!a.writer_attached && a.landing.is_none(), "KV-1: released under a writer");
                    assert!(a.write_hold.take().is_some(), "released twice");
                }
            }
        }
        write
    }

    fn send(&mut self, i: usize, event: SenderEvent) {
        for action in self.attempts[i].sender.on_event(event, self.now) {
            let a = &mut self.attempts[i];
            match action {
                SenderAction::SendHello(hello) => a.to_receiver.push(Message::Hello(hello)),
                SenderAction::SendLayer(piece) => {
                    assert_eq!(a.reading.replace(piece), None, "one frame at a time");
                }
                SenderAction::SendPing => a.to_receiver.push(Message::Ping),
                SenderAction::SendCommit(commit) => a.to_receiver.push(Message::Commit(commit)),
                SenderAction::Finish(outcome) => {
                    assert_eq!(a.sender_outcome.replace(outcome), None, "KV-6: one outcome");
                }
                SenderAction::Disconnect => a.sender_stops = true,
                SenderAction::ReleaseBlocks => {
                    let confirmed = matches!(a.receiver_outcome, Some(Ok(_)));
                    assert!(a.reading.is_none(), "KV-2: released while read");
                    assert!(a.sender_outcome != Some(Ok(())) || confirmed, "KV-2: success without a confirmation");
                    assert!(a.sender_lease.take().is_some(), "released twice");
                }
            }
        }
    }

    fn tick(&mut self) {
        for i in 0..self.attempts.len() {
            self.receive(i, ReceiverEvent::Tick);
            self.send(i, SenderEvent::Tick);
        }
    }
}

impl Attempt {
    /// Whether the awaited piece was damaged. `None` until it is reported.
    fn report(&self) -> Option<bool> {
        let awaited = self.awaited?;
        self.reported.iter().find(|(piece, _)| *piece == awaited).map(|(_, spoilt)| *spoilt)
    }

    fn hello(&self) -> Hello {
        Hello { ticket: self.sender.spec().ticket, ..hello() }
    }
}
