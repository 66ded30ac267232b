//! Target for the frames of the KV protocol: `transport/src/tcp/frame.rs`.

use overfill_transport::tcp::frame::{
    ANSWER_BYTES, COMMIT_BYTES, HEADER_BYTES, HELLO_BYTES, Header, SUM_BYTES, checksum, decode_answer, decode_commit,
    decode_header, decode_hello, encode_answer, encode_commit, encode_header, encode_hello,
};

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
