//! Wire format of version 1, and what later versions have in common with it. [`hello`](super::hello) and
//! [`format`](super::format) define version 2. All numbers are little-endian. The length of a message is known before memory is allocated for it.
//!
//! ```text
//! sender   -> receiver   hello    "OFKV" version:u16 0:u16 ticket:[16] digest:[32] held_blocks:u32 prompt_tokens:u32 sum:u64
//! receiver -> sender     answer   kind:u8 reason:u8 0:u16 sum:u64          accept | refuse | confirm | accepted | taken | posted
//! sender   -> receiver   frame    kind:u8 0:[3] length:u32 a:u32 b:u32 c:u32   payload:[length]   sum:u64
//!     layer   a = layer, b = first block, c = number of blocks; payload = their bytes, in order
//!     ping    no payload
//!     commit  a = first token; payload = frames:u64 bytes:u64 exposed_micros:u64
//! ```
//!
//! Version 2 answers a hello with `accepted`, after which a grant follows. A refusal because of the version has the
//! receiver's oldest and newest version instead of the zeros. `taken` says that a slot of the receiver's staging memory is
//! free again; `posted` says that the receive for the next announced piece is posted, and gives its number
//! within the communicator (24 bits after the kind).
//! Frames have a longer header:
//!
//! ```text
//! sender   -> receiver   frame    kind:u8 0:[3] length:u32 a:u32 b:u32 c:u32 first_head:u16 heads:u16 number:u32   ...
//!     written a to c as in a layer frame; no payload, the checksum is the one that a layer frame would have. For RDMA, the write
//!             with immediate that ends the piece has the same number. For NCCL, the piece is sent once its receive is posted,
//!             and number counts the pieces of the attempt
//! ```
//!
//! The checksum is XXH3 (64 bits) over all bytes before it. For a layer frame it is computed in steps: over the header,
//! then over each block, seeded with the sum so far ([`next_sum`]); in version 2 over the checksum of each block. It detects damage, not forgery. CRC-32 would cost a
//! third of the throughput on machines without wide carry-less multiplication. The checksum comes last, so that a
//! sender reads the payload only once.

use overfill_kv::handoff::{Commit, Hello, Piece, RefuseReason};
use overfill_kv::{ProtocolVersions, Ticket};
use twox_hash::XxHash3_64;

const VERSION: u16 = 1;
/// Size of a hello in bytes.
pub const HELLO_BYTES: usize = 72;
/// Size of an answer in bytes.
pub const ANSWER_BYTES: usize = 12;
/// Size of a frame header in bytes.
pub const HEADER_BYTES: usize = 20;
/// Size of a checksum in bytes.
pub const SUM_BYTES: usize = 8;
/// Size of a commit's payload in bytes.
pub const COMMIT_BYTES: usize = 24;

pub(super) const MAGIC: &[u8; 4] = b"OFKV";
const KIND_LAYER: u8 = 1;
const KIND_PING: u8 = 2;
const KIND_COMMIT: u8 = 3;
const KIND_WRITTEN: u8 = 4;
const ANSWER_ACCEPT: u8 = 1;
const ANSWER_REFUSE: u8 = 2;
const ANSWER_CONFIRM: u8 = 3;
pub(super) const ACCEPTED: u8 = 4;
const ANSWER_TAKEN: u8 = 5;
const ANSWER_POSTED: u8 = 6;

/// Decoded frame header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// Blocks of a layer, and the payload length in bytes that the header states.
    Layer(Piece, u32),
    /// Blocks of a layer that were written one-sided or will be sent over NCCL, and the number of the piece. From version 2
    /// on.
    Written(Piece, u32),
    /// Keeps the connection from timing out.
    Ping,
    /// End of the handoff. The payload has [`COMMIT_BYTES`] bytes.
    Commit {
        /// First output token, chosen by the full model.
        first_token: u32,
    },
}

/// Message from the receiver to the sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The ticket is accepted.
    Accept,
    /// The connection is refused, or the attempt has ended.
    Refuse(RefuseReason),
    /// All KV has arrived and is verified.
    Confirm,
    /// The ticket is accepted, and a grant follows. From version 2 on.
    Accepted,
    /// The sides have no common version; these are the receiver's.
    RefuseVersion(ProtocolVersions),
    /// A slot of the receiver's staging memory is free again.
    Taken,
    /// The receive for the next announced piece is posted, with this number of 24 bits.
    Posted(u32),
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |n, b| n << 8 | u32::from(*b))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
}

/// Checksum of `bytes`, as sent on the wire.
pub fn checksum(bytes: &[u8]) -> [u8; SUM_BYTES] {
    XxHash3_64::oneshot(bytes).to_le_bytes()
}

/// Continues the checksum of a layer frame over `part`: first the header with `sum` 0, then each block.
pub fn next_sum(sum: u64, part: &[u8]) -> u64 {
    XxHash3_64::oneshot_with_seed(sum, part)
}

pub(super) fn seal<const N: usize>(mut bytes: [u8; N]) -> [u8; N] {
    let sum = checksum(&bytes[..N - SUM_BYTES]);
    bytes[N - SUM_BYTES..].copy_from_slice(&sum);
    bytes
}

/// Whether the checksum at the end of `bytes` is right.
pub(crate) fn is_sealed(bytes: &[u8]) -> bool {
    let (body, sum) = bytes.split_at(bytes.len() - SUM_BYTES);
    checksum(body) == *sum
}

/// Encodes a hello.
pub fn encode_hello(hello: &Hello) -> [u8; HELLO_BYTES] {
    let mut out = [0; HELLO_BYTES];
    out[..4].copy_from_slice(MAGIC);
    out[4..6].copy_from_slice(&VERSION.to_le_bytes());
    out[8..24].copy_from_slice(&hello.ticket.0);
    out[24..56].copy_from_slice(&hello.schema_digest);
    out[56..60].copy_from_slice(&hello.held_blocks.to_le_bytes());
    out[60..64].copy_from_slice(&hello.prompt_tokens.to_le_bytes());
    seal(out)
}

/// Decodes a hello. `None` if the bytes are not a hello of this version or its checksum is wrong.
pub fn decode_hello(bytes: &[u8; HELLO_BYTES]) -> Option<Hello> {
    let known = bytes[..4] == *MAGIC && bytes[4..6] == VERSION.to_le_bytes() && bytes[6..8] == [0; 2];
    if !known || !is_sealed(bytes) {
        return None;
    }
    let mut schema_digest = [0; 32];
    schema_digest.copy_from_slice(&bytes[24..56]);
    Some(Hello {
        ticket: Ticket::from_bytes(&bytes[8..24])?,
        schema_digest,
        held_blocks: u32_at(bytes, 56),
        prompt_tokens: u32_at(bytes, 60),
    })
}

/// Encodes an answer.
pub fn encode_answer(answer: Answer) -> [u8; ANSWER_BYTES] {
    let [kind, reason, a, b] = match answer {
        Answer::Accept => [ANSWER_ACCEPT, 0, 0, 0],
        Answer::Refuse(reason) => [ANSWER_REFUSE, reason as u8, 0, 0],
        Answer::Confirm => [ANSWER_CONFIRM, 0, 0, 0],
        Answer::Accepted => [ACCEPTED, 0, 0, 0],
        Answer::RefuseVersion(ProtocolVersions { oldest, newest }) => {
            [ANSWER_REFUSE, RefuseReason::Version as u8, oldest as u8, newest as u8]
        }
        Answer::Taken => [ANSWER_TAKEN, 0, 0, 0],
        Answer::Posted(number) => {
            let [a, b, c, _] = number.to_le_bytes();
            [ANSWER_POSTED, a, b, c]
        }
    };
    seal([kind, reason, a, b, 0, 0, 0, 0, 0, 0, 0, 0])
}

/// Decodes an answer. `None` if the bytes are not an answer or its checksum is wrong.
pub fn decode_answer(bytes: &[u8; ANSWER_BYTES]) -> Option<Answer> {
    if !is_sealed(bytes) {
        return None;
    }
    match bytes[..4] {
        [ANSWER_ACCEPT, 0, 0, 0] => Some(Answer::Accept),
        [ANSWER_REFUSE, reason, 0, 0] => RefuseReason::from_code(reason).map(Answer::Refuse),
        [ANSWER_CONFIRM, 0, 0, 0] => Some(Answer::Confirm),
        [ACCEPTED, 0, 0, 0] => Some(Answer::Accepted),
        [ANSWER_REFUSE, reason, oldest, newest] if reason == RefuseReason::Version as u8 && oldest > 0 => {
            Some(Answer::RefuseVersion(ProtocolVersions { oldest: u32::from(oldest), newest: u32::from(newest) }))
        }
        [ANSWER_TAKEN, 0, 0, 0] => Some(Answer::Taken),
        [ANSWER_POSTED, a, b, c] => Some(Answer::Posted(u32::from_le_bytes([a, b, c, 0]))),
        _ => None,
    }
}

/// Encodes a frame header.
pub fn encode_header(header: &Header) -> [u8; HEADER_BYTES] {
    let (kind, length, a, b, c) = match *header {
        Header::Layer(piece, length) => (KIND_LAYER, length, piece.layer, piece.first_block, piece.blocks),
        Header::Written(piece, _) => (KIND_WRITTEN, 0, piece.layer, piece.first_block, piece.blocks),
        Header::Ping => (KIND_PING, 0, 0, 0, 0),
        Header::Commit { first_token } => (KIND_COMMIT, COMMIT_BYTES as u32, first_token, 0, 0),
    };
    let mut out = [0; HEADER_BYTES];
    out[0] = kind;
    for (slot, value) in out[4..].chunks_exact_mut(4).zip([length, a, b, c]) {
        slot.copy_from_slice(&value.to_le_bytes());
    }
    out
}

/// Decodes what the headers of all versions have in common; the number of a written piece is 0. `None` if the bytes are
/// not a header. The caller must check the payload length of a layer.
pub fn decode_header(bytes: &[u8; HEADER_BYTES]) -> Option<Header> {
    let [length, a, b, c] = [4, 8, 12, 16].map(|at| u32_at(bytes, at));
    match bytes[..4] {
        [KIND_LAYER, 0, 0, 0] => Some(Header::Layer(Piece { layer: a, first_block: b, blocks: c }, length)),
        [KIND_WRITTEN, 0, 0, 0] if length == 0 => {
            Some(Header::Written(Piece { layer: a, first_block: b, blocks: c }, 0))
        }
        [KIND_PING, 0, 0, 0] if [length, a, b, c] == [0; 4] => Some(Header::Ping),
        [KIND_COMMIT, 0, 0, 0] if length as usize == COMMIT_BYTES && [b, c] == [0; 2] => {
            Some(Header::Commit { first_token: a })
        }
        _ => None,
    }
}

/// Encodes a ping frame.
pub fn encode_ping() -> [u8; HEADER_BYTES + SUM_BYTES] {
    let mut out = [0; HEADER_BYTES + SUM_BYTES];
    out[..HEADER_BYTES].copy_from_slice(&encode_header(&Header::Ping));
    seal(out)
}

/// Encodes a commit frame. `exposed_micros` is the time in microseconds since the sender's owner committed.
pub fn encode_commit(commit: &Commit, exposed_micros: u64) -> [u8; HEADER_BYTES + COMMIT_BYTES + SUM_BYTES] {
    let mut out = [0; HEADER_BYTES + COMMIT_BYTES + SUM_BYTES];
    out[..HEADER_BYTES].copy_from_slice(&encode_header(&Header::Commit { first_token: commit.first_token }));
    let numbers = [commit.frames, commit.bytes, exposed_micros];
    for (slot, value) in out[HEADER_BYTES..].chunks_exact_mut(8).zip(numbers) {
        slot.copy_from_slice(&value.to_le_bytes());
    }
    seal(out)
}

/// Decodes a commit from its header's token and its payload. Also returns `exposed_micros`.
pub fn decode_commit(first_token: u32, payload: &[u8; COMMIT_BYTES]) -> (Commit, u64) {
    let [frames, bytes, exposed_micros] = [0, 8, 16].map(|at| u64_at(payload, at));
    (Commit { first_token, frames, bytes }, exposed_micros)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Hello {
        Hello { ticket: Ticket([3; 16]), schema_digest: [9; 32], held_blocks: 5, prompt_tokens: 1234 }
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        assert_eq!(decode_hello(&encode_hello(&hello())), Some(hello()));
        let versions = ProtocolVersions { oldest: 2, newest: 3 };
        for answer in [
            Answer::Accept,
            Answer::Refuse(RefuseReason::Checksum),
            Answer::Refuse(RefuseReason::Version),
            Answer::Confirm,
            Answer::Accepted,
            Answer::RefuseVersion(versions),
            Answer::Taken,
            Answer::Posted(0x00ab_cdef),
        ] {
            assert_eq!(decode_answer(&encode_answer(answer)), Some(answer));
        }
        let piece = Piece { layer: 27, first_block: 0x0102_0304, blocks: 8 };
        for header in [Header::Layer(piece, 524_288), Header::Ping, Header::Commit { first_token: 7 }] {
            assert_eq!(decode_header(&encode_header(&header)), Some(header));
        }
        let commit = Commit { first_token: 7, frames: 1 << 40, bytes: 99 };
        let bytes = encode_commit(&commit, 12);
        let payload = bytes[HEADER_BYTES..HEADER_BYTES + COMMIT_BYTES].try_into().unwrap();
        assert_eq!(decode_commit(7, payload), (commit, 12));
    }

    #[test]
    fn every_flipped_bit_of_a_hello_or_answer_is_seen() {
        let (hello, answer) = (encode_hello(&hello()), encode_answer(Answer::Confirm));
        for bit in 0..HELLO_BYTES * 8 {
            let mut bad = hello;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode_hello(&bad), None, "bit {bit}");
        }
        for bit in 0..ANSWER_BYTES * 8 {
            let mut bad = answer;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode_answer(&bad), None, "bit {bit}");
        }
    }

    #[test]
    fn unknown_frames_are_none() {
        let mut bytes = encode_header(&Header::Ping);
        bytes[0] = 9;
        assert_eq!(decode_header(&bytes), None);
        let mut long_ping = encode_header(&Header::Ping);
        long_ping[4] = 1;
        assert_eq!(decode_header(&long_ping), None);
        // Unused fields must be 0, so that a later version can give them a meaning.
        for (header, at) in [(Header::Ping, 8), (Header::Ping, 19), (Header::Commit { first_token: 7 }, 12)] {
            let mut used = encode_header(&header);
            used[at] = 1;
            assert_eq!(decode_header(&used), None);
        }
        assert_eq!(decode_answer(&seal([ANSWER_ACCEPT, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0])), None);
    }
}
