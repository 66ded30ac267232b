//! Decides which node is at fault when an attempt fails.
//!
//! [`verdict`] is a pure function of the node that reported the failure, the phase and the gRPC status. [`sentence`] updates
//! the circuit breakers accordingly and returns the error that ends the attempt.

use std::sync::Arc;

use overfill_kv::Role;
use tonic::{Code, Status};

use super::{AttemptError, Phase};
use crate::node::Node;

/// A node's failure, as the router observed it.
#[derive(Debug)]
pub(super) enum Fault {
    /// The call or the stream ended with this status.
    Status(Status),
    /// The node violated the protocol, or sent nothing for too long.
    Unexpected(String),
    /// The node has left.
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
    /// The node has no room, or is shutting down. Nothing has failed.
    NoRoom,
    /// A draining node returned the request.
    Moved,
    /// The request is invalid: no node would accept it.
    Refused,
    /// The request's deadline has passed.
    Deadline,
    /// The reporting node has failed.
    SpeakerFailed,
    /// The reporting node has probably failed.
    SpeakerSuspected,
    /// A handoff failed, and either of its two nodes may be the cause.
    BothSuspected,
}

/// The verdict on a status with which the node of role `speaker` ended its call or its stream in `phase`. `broken`: the
/// connection failed. Otherwise the node sent the status.
fn verdict(speaker: Role, phase: Phase, code: Code, broken: bool) -> Verdict {
    match (speaker, phase, code) {
        (_, _, Code::ResourceExhausted) => Verdict::NoRoom,
        (_, _, Code::Aborted) => Verdict::Moved,
        (_, _, Code::InvalidArgument | Code::OutOfRange | Code::Unimplemented) => Verdict::Refused,
        (_, _, Code::DeadlineExceeded) if !broken => Verdict::Deadline,
        // A broken connection is the fault of the node at its other end, in every phase.
        (_, _, _) if broken => Verdict::SpeakerFailed,
        // The node has not begun any work, so nothing has failed.
        (_, Phase::OpeningDecode | Phase::OpeningPrefill, Code::Unavailable) => Verdict::NoRoom,
        (Role::Decode, Phase::Reserving | Phase::Decoding, Code::Unavailable) => Verdict::SpeakerFailed,
        (Role::Prefill, Phase::Scoring, Code::Unavailable) => Verdict::SpeakerFailed,
        // The prefill node returns `Unavailable` when its handoff fails. Once the decode node has its KV, only the
        // confirmation was lost.
        (Role::Prefill, Phase::Prefilling | Phase::HandingOver, Code::Unavailable) => Verdict::BothSuspected,
        // Until its KV is complete, an error of the decode node may just as well be caused by the prefill node.
        (Role::Decode, Phase::Prefilling | Phase::HandingOver, _) => Verdict::BothSuspected,
        (Role::Decode, Phase::OpeningDecode | Phase::Reserving | Phase::Decoding, _) => Verdict::SpeakerSuspected,
        (Role::Prefill, Phase::OpeningPrefill | Phase::Scoring, _) => Verdict::SpeakerSuspected,
        (Role::Prefill, Phase::Prefilling | Phase::HandingOver | Phase::Decoding, _) => Verdict::SpeakerSuspected,
        // The router does not read from this node in this phase.
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

/// Records the fault of `speaker` in `phase` in the circuit breakers of `pair`. Returns the error that ends the attempt.
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
            return AttemptError::Failed { nodes: vec![node.key], message: format!("{name} has left") };
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

/// Whether the connection failed. Otherwise the node sent the status.
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

    /// Phases in which the router reads from the node.
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
            (Role::Prefill, Phase::Decoding, Verdict::SpeakerSuspected),
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
