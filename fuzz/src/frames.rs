//! Target for the frames of the KV protocol: `transport/src/tcp/frame.rs`.

use overfill_transport::tcp::format::{Format, HEADER_2_BYTES};
use overfill_transport::tcp::frame::{
    ANSWER_BYTES, COMMIT_BYTES, HEADER_BYTES, HELLO_BYTES, Header, SUM_BYTES, checksum, decode_answer, decode_commit,
    decode_header, decode_hello, encode_answer, encode_commit, encode_header, encode_hello,
};
use overfill_transport::tcp::hello;

/// Returns the first `N` bytes, padded with zeros.
fn first<const N: usize>(data: &[u8]) -> [u8; N] {
    let mut out = [0; N];
    let count = data.len().min(N);
    out[..count].copy_from_slice(&data[..count]);
    out
}

/// Returns the first `N` bytes with a valid checksum. Without it, nearly every input would be rejected at once.
fn sealed<const N: usize>(data: &[u8]) -> [u8; N] {
    let mut out = first::<N>(data);
    let sum = checksum(&out[..N - SUM_BYTES]);
    out[N - SUM_BYTES..].copy_from_slice(&sum);
    out
}

/// Decodes hello, answer, header and commit. Each decoded message must be encoded to the same bytes, so every message
/// has exactly one encoding.
pub fn frames(data: &[u8]) {
    for hello in [first::<HELLO_BYTES>(data), sealed(data)] {
        if let Some(decoded) = decode_hello(&hello) {
            assert_eq!(encode_hello(&decoded), hello);
        }
    }
    for answer in [first::<ANSWER_BYTES>(data), sealed(data)] {
        if let Some(decoded) = decode_answer(&answer) {
            assert_eq!(encode_answer(decoded), answer);
        }
    }
    second_version(data);
    let header = first::<HEADER_BYTES>(data);
    let Some(decoded) = decode_header(&header) else { return };
    assert_eq!(encode_header(&decoded), header);
    if let Header::Commit { first_token } = decoded {
        const WHOLE: usize = HEADER_BYTES + COMMIT_BYTES + SUM_BYTES;
        let whole = sealed::<WHOLE>(data);
        let payload = first::<COMMIT_BYTES>(&whole[HEADER_BYTES..]);
        let (commit, exposed) = decode_commit(first_token, &payload);
        assert_eq!(encode_commit(&commit, exposed), whole);
    }
}

/// The same for the messages of version 2, whose length is part of them.
fn second_version(data: &[u8]) {
    // Copies of it count as memory that the target needs.
    let data = &data[..data.len().min(256)];
    let with_sum = |bytes: &[u8]| [bytes, &checksum(bytes)].concat();
    for bytes in [data.to_vec(), with_sum(data)] {
        if let Some((start, rest)) = bytes.split_first_chunk()
            && let Some(offer) = hello::decode(start, rest)
            && offer.versions.newest > 1
        {
            // A later version may have more fields, and unused bits are ignored: what is known must survive.
            let again = hello::encode(&offer);
            let (start, rest) = again.split_first_chunk().expect("longer than its start");
            assert_eq!(hello::decode(start, rest), Some(offer));
        }
        if let Some(grant) = hello::decode_grant(&bytes) {
            let again = hello::encode_accepted(&grant);
            assert_eq!(hello::decode_grant(&again[ANSWER_BYTES + 4..]), Some(grant));
        }
    }
    let format = Format::new(2, 8);
    let header = first::<HEADER_2_BYTES>(data);
    if let Some(decoded) = format.decode(&header) {
        assert_eq!(format.encode(&decoded), header);
    }
}
