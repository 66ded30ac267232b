//! Target for the receiver's state machine of a handoff: `kv/src/handoff/receiver.rs`.

use std::collections::HashSet;
use std::time::Duration;

use overfill_kv::Ticket;
use overfill_kv::handoff::{
    Commit, Failure, HandoffSpec, Hello, Piece, ReceiverAction, ReceiverEvent, ReceiverHandoff, WriteMode,
};

use crate::input::Input;

const TICKET: Ticket = Ticket([7; 16]);
const DIGEST: [u8; 32] = [9; 32];
const BLOCK_BYTES: usize = 64;
const DEADLINE: Duration = Duration::from_secs(1000);
const IDLE: Duration = Duration::from_secs(100);

/// The state machine, with a record of its actions that determines which actions are allowed next.
struct Watched {
    machine: ReceiverHandoff,
    spec: HandoffSpec,
    now: Duration,
    accepted: bool,
    /// A writer was accepted and has not been reported as stopped, so it may write.
    writer: bool,
    mode: WriteMode,
    /// A commit was right, and the request is ready when the writer's one-sided access has ended.
    committed: bool,
    /// First token of the last commit.
    first_token: Option<u32>,
    landing: Option<Piece>,
    landed: HashSet<(u32, u32)>,
    frames: u64,
    bytes: u64,
    told: bool,
    released: bool,
}

/// Gives the machine arbitrary events in any order, with time passing between them. The invariants KV-1 to KV-6 are
/// those of ARCHITECTURE.md.
pub fn handoff(data: &[u8]) {
    let mut input = Input::new(data);
    let layers = input.byte();
    let (held_blocks, blocks) = (u32::from(input.below(3)), 1 + u32::from(input.below(4)));
    let end = held_blocks + blocks;
    // Each layer may have a window, which leaves up to three blocks behind.
    let left = |layer: u8| u32::from(layers / 3 / 4_u8.pow(layer.into()) % 4);
    let due = (0..1 + layers % 3).map(|layer| (held_blocks + left(layer)).min(end - 1)..end).collect();
    let spec = HandoffSpec {
        ticket: TICKET,
        schema_digest: DIGEST,
        due,
        held_blocks,
        blocks,
        block_bytes: BLOCK_BYTES,
        prompt_tokens: 100,
        deadline: DEADLINE,
        idle_timeout: IDLE,
    };
    let mut watched = Watched {
        machine: ReceiverHandoff::new(spec.clone()),
        spec,
        now: Duration::ZERO,
        accepted: false,
        writer: false,
        mode: WriteMode::Framed,
        committed: false,
        first_token: None,
        landing: None,
        landed: HashSet::new(),
        frames: 0,
        bytes: 0,
        told: false,
        released: false,
    };
    while !input.is_empty() {
        let event = event(&mut input, &watched);
        watched.give(event);
    }
    // KV-3, KV-6: after any history, the end of the request and of the writer ends the handoff.
    watched.give(ReceiverEvent::Cancel);
    watched.give(ReceiverEvent::WriterStopped);
    assert!(watched.told, "no outcome was reported to the owner");
    assert!(watched.released, "blocks were not released");
    assert!(watched.machine.next_tick().is_none() && !watched.machine.is_stranded());
}

/// Draws the next event. Somewhat more than half are what a correct sender would send.
fn event(input: &mut Input<'_>, watched: &Watched) -> ReceiverEvent {
    let spec = &watched.spec;
    match input.byte() % 32 {
        kind @ 0..4 => {
            let hello = Hello {
                ticket: TICKET,
                schema_digest: DIGEST,
                held_blocks: spec.held_blocks,
                prompt_tokens: spec.prompt_tokens,
            };
            ReceiverEvent::Hello(hello, if kind < 2 { WriteMode::Framed } else { WriteMode::OneSided })
        }
        4 => {
            let hello = Hello {
                ticket: Ticket([input.byte(); 16]),
                schema_digest: [input.byte(); 32],
                held_blocks: input.number(),
                prompt_tokens: input.number(),
            };
            ReceiverEvent::Hello(hello, WriteMode::Framed)
        }
        5..13 => {
            let (layer, first_block, blocks) = (input.number(), input.number(), input.number());
            ReceiverEvent::Layer(Piece { layer, first_block, blocks })
        }
        13..21 => ReceiverEvent::Landed { checksum_ok: input.byte() != 0xff },
        21..24 => ReceiverEvent::Commit(Commit { first_token: 5, frames: watched.frames, bytes: watched.bytes }),
        24 => ReceiverEvent::Commit(Commit {
            first_token: input.number(),
            frames: input.number().into(),
            bytes: u64::from(input.number()) * BLOCK_BYTES as u64,
        }),
        25 => ReceiverEvent::Ping,
        26 => ReceiverEvent::DecodeStarted,
        27 => ReceiverEvent::Finished,
        28 => ReceiverEvent::WriterStopped,
        29 => ReceiverEvent::Tick,
        30 => match input.byte() {
            0..64 => ReceiverEvent::Garbage,
            64..128 => ReceiverEvent::StoreFailed,
            128..192 => ReceiverEvent::Lost,
            _ => ReceiverEvent::Cancel,
        },
        _ => ReceiverEvent::Ping,
    }
}

impl Watched {
    fn cells(&self, piece: &Piece) -> impl Iterator<Item = (u32, u32)> + use<> {
        let layer = piece.layer;
        let first = u64::from(piece.first_block);
        (first..first + u64::from(piece.blocks)).map(move |block| (layer, block as u32))
    }

    fn give(&mut self, event: ReceiverEvent) {
        // Each event takes a second. A tick jumps to the next time limit.
        if event == ReceiverEvent::Tick {
            self.now = self.machine.next_tick().unwrap_or(self.now).max(self.now);
        } else {
            self.now += Duration::from_secs(1);
        }
        if let (ReceiverEvent::Hello(_, mode), false) = (event, self.accepted) {
            self.mode = mode;
        }
        let was_open = self.machine.state().is_open();
        let actions = self.machine.on_event(event, self.now);
        let in_time = !actions.iter().any(|a| matches!(a, ReceiverAction::Fail(Failure::Deadline | Failure::Idle)));
        if event == ReceiverEvent::WriterStopped {
            self.writer = false;
            self.landing = None;
        }
        let ready = actions.iter().any(|a| matches!(a, ReceiverAction::Ready { .. }));
        let landed = if let ReceiverEvent::Landed { .. } = event { self.landing.take() } else { None };
        if let (Some(piece), true) = (landed, self.machine.state().is_open()) {
            for cell in self.cells(&piece) {
                assert!(self.landed.insert(cell), "{cell:?} was written twice");
            }
            self.frames += 1;
            self.bytes += u64::from(piece.blocks) * BLOCK_BYTES as u64;
        }
        assert_eq!(self.machine.bytes(), self.bytes);
        if let ReceiverEvent::Commit(commit) = event {
            if !self.committed {
                self.first_token = Some(commit.first_token);
            }
            let whole = self.landed.len() == self.spec.due.iter().map(|due| due.len()).sum::<usize>();
            let agreed = (commit.frames, commit.bytes) == (self.frames, self.bytes) && self.landing.is_none();
            // KV-5: a handoff is ready if and only if it is complete.
            let due = was_open && in_time && self.writer && whole && agreed;
            match self.mode {
                WriteMode::Framed => assert_eq!(ready, due, "a commit of {commit:?}"),
                WriteMode::OneSided => {
                    assert!(!ready, "ready while the sender may write");
                    self.committed |= due;
                }
            }
        } else if event == ReceiverEvent::WriterStopped {
            assert_eq!(ready, was_open && in_time && std::mem::take(&mut self.committed));
        } else {
            assert!(!ready, "ready without a commit");
        }
        assert_eq!(ready, actions.contains(&ReceiverAction::Confirm));
        for action in &actions {
            self.check(&event, action);
        }
        if let Some(at) = self.machine.next_tick() {
            assert!(at <= self.spec.deadline, "a limit beyond the deadline");
        }
    }

    fn check(&mut self, event: &ReceiverEvent, action: &ReceiverAction) {
        match *action {
            ReceiverAction::Accept => {
                // KV-4: a ticket admits one writer, once, and only for this attempt.
                assert!(!self.accepted && !self.released);
                let ReceiverEvent::Hello(hello, _) = event else { panic!("accepted {event:?}") };
                let meant = (hello.ticket, hello.schema_digest, hello.held_blocks, hello.prompt_tokens);
                assert_eq!(meant, (TICKET, DIGEST, self.spec.held_blocks, self.spec.prompt_tokens));
                (self.accepted, self.writer) = (true, true);
            }
            ReceiverAction::Refuse(_) => assert!(matches!(event, ReceiverEvent::Hello(..))),
            ReceiverAction::Write(piece) => {
                assert_eq!(*event, ReceiverEvent::Layer(piece));
                // KV-1: writes go only to reserved blocks, by the only writer, and never over received data.
                assert!(self.writer && !self.released && self.landing.is_none() && piece.blocks > 0);
                for (layer, block) in self.cells(&piece) {
                    let due = self.spec.due.get(layer as usize);
                    assert!(due.is_some_and(|due| due.contains(&block)), "{piece:?} reaches outside");
                    assert!(!self.landed.contains(&(layer, block)), "{piece:?} is there already");
                }
                self.landing = Some(piece);
            }
            ReceiverAction::Confirm => {}
            ReceiverAction::Ready { first_token } => {
                assert_eq!(self.first_token, Some(first_token));
                self.tell();
            }
            ReceiverAction::Fail(_) => self.tell(),
            // Time limits are checked first: one may have passed just before the writer's end is reported.
            ReceiverAction::StopWriter { .. } => {
                assert!(self.writer || *event == ReceiverEvent::WriterStopped, "no writer to stop");
            }
            ReceiverAction::ReleaseBlocks => {
                // KV-1: blocks are released once, and only without a writer.
                assert!(!self.released && !self.writer);
                self.released = true;
            }
        }
    }

    /// KV-6: exactly one outcome is reported.
    fn tell(&mut self) {
        assert!(!self.told, "a second outcome");
        self.told = true;
    }
}
