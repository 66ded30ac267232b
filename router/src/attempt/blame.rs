//! Which node is at fault when an attempt fails.
//!
//! [`verdict`] is the table, and pure: who spoke, in which phase, with which gRPC status. [`sentence`] tells the
//! circuit breakers, and gives the error that ends the attempt.

use std::sync::Arc;

use overfill_kv::Role;
use tonic::{Code, Status};

use super::{AttemptError, Phase};
use crate::node::Node;

/// What was wrong with a node.
#[derive(Debug)]
pub(super) enum Fault {
    /// The call or the stream ended with this status.
    Status(Status),
    /// The node broke the protocol, or was silent for too long.
    Unexpected(String),
    /// The node can't be used any more.
    Left,
}

impl Fault {
    pub fn unexpected(what: impl Into<String>) -> Self {
        Self::Unexpected(what.into())
    }
}

impl From<Status> for Fault {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

/// What a status means for the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// The node has no room, or is about to end. Nothing has failed.
    NoRoom,
    /// A draining node gave the request back.
    Moved,
    /// The request is at fault: no other node would take it.
    Refused,
    /// The request's own time is over.
    Deadline,
    /// The node that spoke has failed.
    SpeakerFailed,
    /// The node that spoke has probably failed.
    SpeakerSuspected,
    /// A handoff failed, and it takes two nodes: either may have failed.
    BothSuspected,
}

/// The verdict on a status with which `speaker` ended its call or its stream in `phase`. `broken`: the connection
/// failed, rather than the node refused.
fn verdict(speaker: Role, phase: Phase, code: Code, broken: bool) -> Verdict {
    match (speaker, phase, code) {
        (_, _, Code::ResourceExhausted) => Verdict::NoRoom,
        (_, _, Code::Aborted) => Verdict::Moved,
        (_, _, Code::InvalidArgument | Code::OutOfRange | Code::Unimplemented) => Verdict::Refused,
        (_, _, Code::DeadlineExceeded) if !broken => Verdict::Deadline,
        // A connection breaks at the node on its other end, whatever the phase.
        (_, _, _) if broken => Verdict::SpeakerFailed,
        // The node has begun nothing, so nothing has failed.
        (_, Phase::OpeningDecode | Phase::OpeningPrefill, Code::Unavailable) => Verdict::NoRoom,
        (Role::Decode, Phase::Reserving | Phase::Decoding, Code::Unavailable) => Verdict::SpeakerFailed,
        (Role::Prefill, Phase::Scoring, Code::Unavailable) => Verdict::SpeakerFailed,
        // The prefill node says `unavailable` when its handoff fails.
        (Role::Prefill, Phase::Prefilling | Phase::HandingOver | Phase::Decoding, Code::Unavailable) => {
            Verdict::BothSuspected
        }
        // Until its KV is complete, a decode node fails as easily through the prefill node.
        (Role::Decode, Phase::Prefilling | Phase::HandingOver, _) => Verdict::BothSuspected,
        (Role::Decode, Phase::OpeningDecode | Phase::Reserving | Phase::Decoding, _) => Verdict::SpeakerSuspected,
        (Role::Prefill, Phase::OpeningPrefill | Phase::Scoring, _) => Verdict::SpeakerSuspected,
        (Role::Prefill, Phase::Prefilling | Phase::HandingOver | Phase::Decoding, _) => Verdict::SpeakerSuspected,
        // Nobody listens to this node in this phase.
        (Role::Decode, Phase::OpeningPrefill | Phase::Scoring | Phase::Over, _)
        | (Role::Prefill, Phase::OpeningDecode | Phase::Reserving | Phase::Over, _) => Verdict::SpeakerSuspected,
    }
}

/// The two nodes of an attempt.
#[derive(Clone)]
pub(super) struct Pair {
    pub prefill: Arc<Node>,
    pub decode: Arc<Node>,
}

impl Pair {
    pub fn of(&self, role: Role) -> &Arc<Node> {
        match role {
            Role::Prefill => &self.prefill,
            Role::Decode => &self.decode,
        }
    }
}

/// Tells the circuit breakers of `pair` what `speaker` did in `phase`, and gives the error that ends the attempt.
pub(super) fn sentence(pair: &Pair, speaker: Role, phase: Phase, fault: Fault) -> AttemptError {
    let node = pair.of(speaker);
    let name = format!("{} ({})", node.info.node_id, node.url);
    let status = match fault {
        Fault::Status(status) => status,
        Fault::Unexpected(what) => {
            node.failed();
            return AttemptError::Failed { nodes: vec![node.key], message: format!("{name}: {what}") };
        }
        Fault::Left => {
            return AttemptError::Failed { nodes: vec![node.key], message: format!("{name} can't be used any more") };
        }
    };
    let message = format!("{name}: {:?}: {}", status.code(), status.message());
    match verdict(speaker, phase, status.code(), is_broken(&status)) {
        Verdict::NoRoom => AttemptError::NoRoom { node: node.key, message },
        Verdict::Moved => AttemptError::Moved { node: node.key, message },
        Verdict::Refused => AttemptError::Refused(status.message().to_owned()),
        Verdict::Deadline => AttemptError::Deadline,
        Verdict::SpeakerFailed => {
            node.failed();
            AttemptError::Failed { nodes: vec![node.key], message }
        }
        Verdict::SpeakerSuspected => {
            node.suspected();
            AttemptError::Failed { nodes: vec![node.key], message }
        }
        Verdict::BothSuspected => {
            let both = [&pair.decode, &pair.prefill];
            both.iter().for_each(|node| node.suspected());
            AttemptError::Failed { nodes: both.map(|node| node.key).to_vec(), message }
        }
    }
}

/// Did the connection fail, rather than the node refuse?
fn is_broken(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PHASES: [Phase; 8] = [
        Phase::OpeningDecode,
        Phase::Reserving,
        Phase::OpeningPrefill,
        Phase::Scoring,
        Phase::Prefilling,
        Phase::HandingOver,
        Phase::Decoding,
        Phase::Over,
    ];

    /// Phases in which the node is listened to.
    fn phases(speaker: Role) -> &'static [Phase] {
        match speaker {
            Role::Prefill => {
                &[Phase::OpeningPrefill, Phase::Scoring, Phase::Prefilling, Phase::HandingOver, Phase::Decoding]
            }
            Role::Decode => {
                &[Phase::OpeningDecode, Phase::Reserving, Phase::Prefilling, Phase::HandingOver, Phase::Decoding]
            }
        }
    }

    #[test]
    fn some_codes_mean_the_same_everywhere() {
        for speaker in Role::ALL {
            for phase in PHASES {
                for broken in [false, true] {
                    let of = |code| verdict(speaker, phase, code, broken);
                    assert_eq!(of(Code::ResourceExhausted), Verdict::NoRoom);
                    assert_eq!(of(Code::Aborted), Verdict::Moved);
                    for code in [Code::InvalidArgument, Code::OutOfRange, Code::Unimplemented] {
                        assert_eq!(of(code), Verdict::Refused);
                    }
                }
                assert_eq!(verdict(speaker, phase, Code::DeadlineExceeded, false), Verdict::Deadline);
            }
        }
    }

    #[test]
    fn a_broken_connection_is_its_nodes_fault() {
        for speaker in Role::ALL {
            for phase in PHASES {
                for code in [Code::Unavailable, Code::Unknown, Code::Cancelled, Code::Internal, Code::DeadlineExceeded]
                {
                    assert_eq!(
                        verdict(speaker, phase, code, true),
                        Verdict::SpeakerFailed,
                        "{speaker} {phase:?} {code}"
                    );
                }
            }
        }
    }

    #[test]
    fn unavailable_depends_on_speaker_and_phase() {
        let table = [
            (Role::Decode, Phase::OpeningDecode, Verdict::NoRoom),
            (Role::Decode, Phase::Reserving, Verdict::SpeakerFailed),
            (Role::Decode, Phase::Prefilling, Verdict::BothSuspected),
            (Role::Decode, Phase::HandingOver, Verdict::BothSuspected),
            (Role::Decode, Phase::Decoding, Verdict::SpeakerFailed),
            (Role::Prefill, Phase::OpeningPrefill, Verdict::NoRoom),
            (Role::Prefill, Phase::Scoring, Verdict::SpeakerFailed),
            (Role::Prefill, Phase::Prefilling, Verdict::BothSuspected),
            (Role::Prefill, Phase::HandingOver, Verdict::BothSuspected),
            (Role::Prefill, Phase::Decoding, Verdict::BothSuspected),
        ];
        for (speaker, phase, expected) in table {
            assert_eq!(verdict(speaker, phase, Code::Unavailable, false), expected, "{speaker} {phase:?}");
        }
        assert_eq!(table.len(), Role::ALL.iter().map(|role| phases(*role).len()).sum::<usize>());
    }

    #[test]
    fn other_codes_only_raise_a_suspicion() {
        for code in [Code::Internal, Code::Unknown, Code::FailedPrecondition, Code::Cancelled, Code::DataLoss] {
            for speaker in Role::ALL {
                for phase in PHASES {
                    let shared = speaker == Role::Decode && matches!(phase, Phase::Prefilling | Phase::HandingOver);
                    let expected = if shared { Verdict::BothSuspected } else { Verdict::SpeakerSuspected };
                    assert_eq!(verdict(speaker, phase, code, false), expected, "{speaker} {phase:?} {code}");
                }
            }
        }
    }

    #[test]
    fn a_connection_that_breaks_has_a_source() {
        assert!(!is_broken(&Status::unavailable("refused")));
        assert!(is_broken(&Status::from_error(Box::new(std::io::Error::other("reset")))));
    }
}
