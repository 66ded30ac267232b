//! Tests of both state machines over a simulated channel that loses, repeats, damages and reorders messages. The two
//! nodes cancel, stall and crash, and other requests compete for the same blocks. Invariants are checked after each
//! event.

mod world;

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use world::{Op, World};

fn spec() -> HandoffSpec {
    HandoffSpec {
        ticket: Ticket([7; 16]),
        schema_digest: [1; 32],
        due: vec![1..4, 1..4],
        held_blocks: 1,
        blocks: 3,
        block_bytes: 100,
        prompt_tokens: 60,
        deadline: Duration::from_secs(60),
        idle_timeout: Duration::from_secs(10),
    }
}

fn hello() -> Hello {
    let s = spec();
    Hello {
        ticket: s.ticket,
        schema_digest: s.schema_digest,
        held_blocks: s.held_blocks,
        prompt_tokens: s.prompt_tokens,
    }
}

const T0: Duration = Duration::ZERO;

fn accepted() -> ReceiverHandoff {
    let mut r = ReceiverHandoff::new(spec());
    assert_eq!(r.on_event(ReceiverEvent::Hello(hello(), WriteMode::Framed), T0), [ReceiverAction::Accept]);
    r
}

fn stop(tell: RefuseReason, failure: Failure) -> [ReceiverAction; 2] {
    [ReceiverAction::Fail(failure), ReceiverAction::StopWriter { tell: Some(tell) }]
}

fn land(r: &mut ReceiverHandoff, piece: Piece) {
    assert_eq!(r.on_event(ReceiverEvent::Layer(piece), T0), [ReceiverAction::Write(piece)]);
    assert_eq!(r.on_event(ReceiverEvent::Landed { checksum_ok: true }, T0), []);
}

#[test]
fn a_whole_transfer_is_confirmed() {
    let mut r = accepted();
    land(&mut r, Piece { layer: 1, first_block: 1, blocks: 3 });
    land(&mut r, Piece { layer: 0, first_block: 2, blocks: 2 });
    land(&mut r, Piece { layer: 0, first_block: 1, blocks: 1 });
    let commit = Commit { first_token: 42, frames: 3, bytes: 600 };
    let done =
        [ReceiverAction::Confirm, ReceiverAction::Ready { first_token: 42 }, ReceiverAction::StopWriter { tell: None }];
    assert_eq!(r.on_event(ReceiverEvent::Commit(commit), T0), done);
    assert_eq!(r.on_event(ReceiverEvent::WriterStopped, T0), [ReceiverAction::ReleaseBlocks]);
    r.on_event(ReceiverEvent::DecodeStarted, T0);
    assert_eq!(r.state(), HandoffState::Decoding);
    r.on_event(ReceiverEvent::Finished, T0);
    assert_eq!(r.state(), HandoffState::Done);
}

/// KV-5: nobody can change the KV any more when the request starts to decode.
#[test]
fn one_sided_access_ends_before_the_request_is_ready() {
    let commit = Commit { first_token: 42, frames: 2, bytes: 600 };
    let written = || {
        let mut r = ReceiverHandoff::new(spec());
        assert_eq!(r.on_event(ReceiverEvent::Hello(hello(), WriteMode::OneSided), T0), [ReceiverAction::Accept]);
        land(&mut r, Piece { layer: 1, first_block: 1, blocks: 3 });
        land(&mut r, Piece { layer: 0, first_block: 1, blocks: 3 });
        assert_eq!(r.on_event(ReceiverEvent::Commit(commit), T0), [ReceiverAction::StopWriter { tell: None }]);
        r
    };
    let mut r = written();
    // Nothing that the sender does now matters.
    assert_eq!(r.on_event(ReceiverEvent::Commit(commit), T0), []);
    assert_eq!(r.on_event(ReceiverEvent::Lost, T0), []);
    assert!(r.state().is_open());
    let done = [ReceiverAction::Confirm, ReceiverAction::Ready { first_token: 42 }, ReceiverAction::ReleaseBlocks];
    assert_eq!(r.on_event(ReceiverEvent::WriterStopped, T0), done);

    let mut cancelled = written();
    let told = stop(RefuseReason::Cancelled, Failure::Cancelled);
    assert_eq!(cancelled.on_event(ReceiverEvent::Cancel, T0), told);
    assert_eq!(cancelled.on_event(ReceiverEvent::WriterStopped, T0), [ReceiverAction::ReleaseBlocks]);

    let mut late = written();
    let told = stop(RefuseReason::Deadline, Failure::Deadline);
    assert_eq!(late.on_event(ReceiverEvent::Tick, spec().deadline), told);
    assert_eq!(late.on_event(ReceiverEvent::WriterStopped, spec().deadline), [ReceiverAction::ReleaseBlocks]);
}

#[test]
fn a_ticket_opens_one_attempt_once() {
    let mut r = accepted();
    let refused = [ReceiverAction::Refuse(RefuseReason::Ticket)];
    assert_eq!(r.on_event(ReceiverEvent::Hello(hello(), WriteMode::Framed), T0), refused);
    assert_eq!(r.state(), HandoffState::Prefilling, "the first sender is not disturbed");
    let mut other = ReceiverHandoff::new(spec());
    let stranger = Hello { ticket: Ticket([8; 16]), ..hello() };
    assert_eq!(other.on_event(ReceiverEvent::Hello(stranger, WriteMode::Framed), T0), refused);
    assert_eq!(other.state(), HandoffState::Reserved);
}

#[test]
fn another_schema_or_prompt_is_refused() {
    for (wrong, reason) in [
        (Hello { schema_digest: [2; 32], ..hello() }, RefuseReason::Schema),
        (Hello { held_blocks: 0, ..hello() }, RefuseReason::Range),
        (Hello { prompt_tokens: 61, ..hello() }, RefuseReason::Range),
    ] {
        let mut r = ReceiverHandoff::new(spec());
        let actions = r.on_event(ReceiverEvent::Hello(wrong, WriteMode::Framed), T0);
        let expected = [
            ReceiverAction::Refuse(reason),
            ReceiverAction::Fail(Failure::Rejected(reason)),
            ReceiverAction::ReleaseBlocks,
        ];
        assert_eq!(actions, expected);
    }
}

#[test]
fn blocks_outside_or_twice_are_never_written() {
    let outside = [
        Piece { layer: 2, first_block: 1, blocks: 1 },
        Piece { layer: 0, first_block: 0, blocks: 1 },
        Piece { layer: 0, first_block: 1, blocks: 4 },
        Piece { layer: 0, first_block: 4, blocks: 1 },
        Piece { layer: 0, first_block: 2, blocks: 0 },
        Piece { layer: u32::MAX, first_block: u32::MAX, blocks: u32::MAX },
        Piece { layer: 1, first_block: 2, blocks: 2 },
    ];
    for piece in outside {
        let mut r = accepted();
        land(&mut r, Piece { layer: 1, first_block: 3, blocks: 1 });
        let expected = stop(RefuseReason::Protocol, Failure::Rejected(RefuseReason::Protocol));
        assert_eq!(r.on_event(ReceiverEvent::Layer(piece), T0), expected, "{piece:?}");
    }
}

/// A layer with a window needs fewer blocks. It gets those, and no others.
#[test]
fn complete_means_all_that_is_due() {
    let spec = || HandoffSpec { due: vec![3..4, 1..4], ..spec() };
    let accepted = || {
        let mut r = ReceiverHandoff::new(spec());
        r.on_event(ReceiverEvent::Hello(hello(), WriteMode::Framed), T0);
        land(&mut r, Piece { layer: 1, first_block: 1, blocks: 3 });
        r
    };
    let refused = |reason| stop(reason, Failure::Rejected(reason));
    for first_block in [1, 2] {
        let piece = Piece { layer: 0, first_block, blocks: 2 };
        assert_eq!(accepted().on_event(ReceiverEvent::Layer(piece), T0), refused(RefuseReason::Protocol));
    }
    let early = Commit { first_token: 42, frames: 1, bytes: 300 };
    assert_eq!(accepted().on_event(ReceiverEvent::Commit(early), T0), refused(RefuseReason::Incomplete));
    let mut r = accepted();
    land(&mut r, Piece { layer: 0, first_block: 3, blocks: 1 });
    let commit = Commit { first_token: 42, frames: 2, bytes: 400 };
    assert!(r.on_event(ReceiverEvent::Commit(commit), T0).contains(&ReceiverAction::Confirm));

    let mut s = SenderHandoff::new(spec(), 3, T0);
    let event = SenderEvent::LayerReady(Piece { layer: 0, first_block: 2, blocks: 2 });
    assert!(matches!(s.on_event(event, T0)[0], SenderAction::Finish(Err(Failure::Plan(_)))));
    let mut s = SenderHandoff::new(spec(), 3, T0);
    s.on_event(SenderEvent::Connected, T0);
    s.on_event(SenderEvent::Accepted, T0);
    s.on_event(SenderEvent::LayerReady(Piece { layer: 1, first_block: 1, blocks: 3 }), T0);
    s.on_event(SenderEvent::Commit { first_token: 42 }, T0);
    s.on_event(SenderEvent::LayerReady(Piece { layer: 0, first_block: 3, blocks: 1 }), T0);
    s.on_event(SenderEvent::Sent, T0);
    assert_eq!(s.on_event(SenderEvent::Sent, T0), [SenderAction::SendCommit(commit)]);
}

#[test]
fn a_commit_that_disagrees_is_refused() {
    for commit in [
        Commit { first_token: 0, frames: 1, bytes: 300 },
        Commit { first_token: 0, frames: 2, bytes: 600 },
        Commit { first_token: 0, frames: 1, bytes: 600 },
    ] {
        let mut r = accepted();
        land(&mut r, Piece { layer: 0, first_block: 1, blocks: 3 });
        let expected = stop(RefuseReason::Incomplete, Failure::Rejected(RefuseReason::Incomplete));
        assert_eq!(r.on_event(ReceiverEvent::Commit(commit), T0), expected);
    }
}

#[test]
fn cancelled_blocks_wait_for_the_writer() {
    let mut r = accepted();
    r.on_event(ReceiverEvent::Layer(Piece { layer: 0, first_block: 1, blocks: 1 }), T0);
    let actions = r.on_event(ReceiverEvent::Cancel, T0);
    assert_eq!(actions, stop(RefuseReason::Cancelled, Failure::Cancelled));
    assert!(r.is_stranded());
    assert_eq!(r.on_event(ReceiverEvent::WriterStopped, T0), [ReceiverAction::ReleaseBlocks]);
    assert!(!r.is_stranded());

    let mut nobody_came = ReceiverHandoff::new(spec());
    let expected = [ReceiverAction::Fail(Failure::Cancelled), ReceiverAction::ReleaseBlocks];
    assert_eq!(nobody_came.on_event(ReceiverEvent::Cancel, T0), expected);
}

#[test]
fn silence_and_the_deadline_end_an_attempt() {
    let mut r = accepted();
    assert_eq!(r.next_tick(), Some(Duration::from_secs(10)));
    r.on_event(ReceiverEvent::Ping, Duration::from_secs(9));
    assert_eq!(r.on_event(ReceiverEvent::Tick, Duration::from_secs(18)), []);
    assert_eq!(r.on_event(ReceiverEvent::Tick, Duration::from_secs(19)), stop(RefuseReason::Deadline, Failure::Idle));

    let mut nobody_came = ReceiverHandoff::new(spec());
    let expected = [ReceiverAction::Fail(Failure::Deadline), ReceiverAction::ReleaseBlocks];
    assert_eq!(nobody_came.on_event(ReceiverEvent::Tick, Duration::from_secs(60)), expected);
    assert_eq!(
        nobody_came.on_event(ReceiverEvent::Hello(hello(), WriteMode::Framed), Duration::from_secs(61)),
        [ReceiverAction::Refuse(RefuseReason::Ticket)]
    );
}

#[test]
fn a_sender_splits_pieces_and_sends_one_frame_at_a_time() {
    let mut s = SenderHandoff::new(spec(), 2, T0);
    assert_eq!(s.on_event(SenderEvent::LayerReady(Piece { layer: 0, first_block: 1, blocks: 3 }), T0), []);
    assert_eq!(s.on_event(SenderEvent::Connected, T0), [SenderAction::SendHello(hello())]);
    let first = SenderAction::SendLayer(Piece { layer: 0, first_block: 1, blocks: 2 });
    assert_eq!(s.on_event(SenderEvent::Accepted, T0), [first]);
    assert_eq!(s.on_event(SenderEvent::LayerReady(Piece { layer: 1, first_block: 1, blocks: 2 }), T0), []);
    let second = SenderAction::SendLayer(Piece { layer: 0, first_block: 3, blocks: 1 });
    assert_eq!(s.on_event(SenderEvent::Sent, T0), [second]);
    s.on_event(SenderEvent::Sent, T0);
    s.on_event(SenderEvent::LayerReady(Piece { layer: 1, first_block: 3, blocks: 1 }), T0);
    s.on_event(SenderEvent::Commit { first_token: 5 }, T0);
    s.on_event(SenderEvent::Sent, T0);
    let commit = SenderAction::SendCommit(Commit { first_token: 5, frames: 4, bytes: 600 });
    assert_eq!(s.on_event(SenderEvent::Sent, T0), [commit]);
    let done = [SenderAction::Finish(Ok(())), SenderAction::Disconnect, SenderAction::ReleaseBlocks];
    assert_eq!(s.on_event(SenderEvent::Confirmed, T0), done);
}

#[test]
fn a_sender_with_nothing_to_send_says_that_it_lives() {
    let mut s = SenderHandoff::new(spec(), 2, T0);
    s.on_event(SenderEvent::Connected, T0);
    s.on_event(SenderEvent::Accepted, T0);
    let due = s.next_tick().unwrap();
    assert!(due < spec().idle_timeout / 2);
    assert_eq!(s.on_event(SenderEvent::Tick, due), [SenderAction::SendPing]);
    assert!(s.next_tick().unwrap() > due);
}

#[test]
fn a_sender_out_of_plan_fails_at_once() {
    let plan = |s: &mut SenderHandoff, event| {
        let actions = s.on_event(event, T0);
        matches!(actions[0], SenderAction::Finish(Err(Failure::Plan(_))))
    };
    let piece = Piece { layer: 0, first_block: 1, blocks: 2 };
    let mut s = SenderHandoff::new(spec(), 2, T0);
    s.on_event(SenderEvent::LayerReady(piece), T0);
    assert!(plan(&mut s, SenderEvent::LayerReady(piece)));
    let mut s = SenderHandoff::new(spec(), 2, T0);
    s.on_event(SenderEvent::LayerReady(piece), T0);
    assert_eq!(s.on_event(SenderEvent::Commit { first_token: 1 }, T0), []);
    assert!(plan(&mut s, SenderEvent::Commit { first_token: 1 }));
}

/// A device may report a layer as done after the first token is known.
#[test]
fn a_commit_waits_for_layers_that_are_announced_after_it() {
    let mut s = SenderHandoff::new(spec(), 3, T0);
    s.on_event(SenderEvent::Connected, T0);
    s.on_event(SenderEvent::Accepted, T0);
    assert_eq!(s.on_event(SenderEvent::Commit { first_token: 5 }, T0), []);
    for layer in 0..2 {
        let piece = Piece { layer, first_block: 1, blocks: 3 };
        assert_eq!(s.on_event(SenderEvent::LayerReady(piece), T0), [SenderAction::SendLayer(piece)]);
        let commit = SenderAction::SendCommit(Commit { first_token: 5, frames: 2, bytes: 600 });
        assert_eq!(s.on_event(SenderEvent::Sent, T0), if layer == 1 { vec![commit] } else { vec![] });
    }
}

#[test]
fn a_block_being_read_is_kept_until_the_task_stopped() {
    let mut s = SenderHandoff::new(spec(), 2, T0);
    s.on_event(SenderEvent::Connected, T0);
    s.on_event(SenderEvent::Accepted, T0);
    s.on_event(SenderEvent::LayerReady(Piece { layer: 0, first_block: 1, blocks: 2 }), T0);
    let actions = s.on_event(SenderEvent::Abort, T0);
    assert_eq!(actions, [SenderAction::Finish(Err(Failure::Cancelled)), SenderAction::Disconnect]);
    assert!(s.is_stranded());
    assert_eq!(s.on_event(SenderEvent::Stopped, T0), [SenderAction::ReleaseBlocks]);
}

#[test]
fn reason_codes_survive_the_wire() {
    for reason in RefuseReason::ALL {
        assert_eq!(RefuseReason::from_code(reason as u8), Some(reason));
    }
    assert_eq!(RefuseReason::from_code(0), None);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// KV-1 to KV-6 hold under all kinds of faults, in any order.
    #[test]
    fn invariants_hold_under_faults(ops in proptest::collection::vec(world::faulty_op(), 1..300)) {
        let mut world = World::new();
        for op in ops {
            world.apply(op);
            world.check();
        }
        world.settle();
        world.check_settled();
    }

    /// Without faults, every interleaving ends with complete KV on the decode node and no block held.
    #[test]
    fn without_faults_every_attempt_succeeds(picks in proptest::collection::vec(any::<u16>(), 400)) {
        let mut world = World::new();
        for _ in 0..3 {
            world.apply(Op::Begin);
        }
        for pick in picks {
            world.apply(Op::Step(pick));
            world.check();
        }
        while world.apply(Op::Step(0)) {
            world.check();
        }
        prop_assert_eq!(world.succeeded(), 3);
        world.settle();
        world.check_settled();
    }
}
