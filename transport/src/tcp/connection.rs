//! Serves one connection on the receiver: hello, frames, commit. The attempt's state machine must admit each frame
//! before any of its bytes are written.

use std::net::SocketAddr;
use std::time::Duration;

use overfill_kv::handoff::{Hello, Piece, ReceiverAction, ReceiverEvent, RefuseReason, TRACE_TARGET};
use tokio::time::timeout;

use super::frame::{self, Answer, COMMIT_BYTES, HEADER_BYTES, HELLO_BYTES, Header, SUM_BYTES};
use super::link::{Link, Opening};
use super::newcomers::Newcomer;
use super::payload::{Incoming, MoveError, read_full, write_full};
use crate::reservations::{Entry, Shared};

/// How long incoming bytes are read and discarded after a refusal. Closing at once would reset the connection, and the
/// sender would not receive the reason.
const LINGER: Duration = Duration::from_millis(500);

/// Timeout for writing the confirmation.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

pub(crate) async fn serve(shared: &Shared, opening: Opening, peer: SocketAddr, newcomer: &Newcomer) {
    let opened = async {
        let stream = opening.await?;
        let mut bytes = [0; HELLO_BYTES];
        read_full(&stream, &mut bytes).await?;
        Ok::<_, std::io::Error>((stream, frame::decode_hello(&bytes)))
    };
    let (stream, hello) = match timeout(shared.config.hello_timeout, opened).await {
        Ok(Ok((stream, Some(hello)))) => (stream, hello),
        Ok(Ok((_, None))) => {
            tracing::debug!(%peer, "closing a kv connection: the first message is not a hello of this protocol version");
            return;
        }
        Ok(Err(error)) => {
            tracing::debug!(%peer, %error, "a kv connection ended before its hello");
            return;
        }
        Err(_) => {
            tracing::debug!(%peer, "closing a kv connection: no hello within the hello timeout");
            return;
        }
    };
    let stream = &stream;
    let refused = match shared.find(&hello.ticket) {
        // Checked before the attempt gets the hello: a connection that was evicted must not write.
        Some(_) if !newcomer.stay() => None,
        Some(entry) => handoff(shared, &entry, stream, hello).await,
        None => Some(RefuseReason::Ticket),
    };
    if let Some(reason) = refused {
        tracing::debug!(%peer, ticket = ?hello.ticket, %reason, "refusing a kv connection");
        refuse(stream, reason).await;
    }
}

async fn refuse(stream: &Link, reason: RefuseReason) {
    let answer = frame::encode_answer(Answer::Refuse(reason));
    let linger = async {
        write_full(stream, &answer).await?;
        stream.end_writing().await?;
        let mut scratch = [0; 4096];
        loop {
            read_full(stream, &mut scratch).await?;
        }
    };
    let _: Result<Result<(), std::io::Error>, _> = timeout(LINGER, linger).await;
}

/// Reports `WriterStopped` when dropped, however the writing task ends (KV-1, KV-3). Created before anything is
/// written.
struct Writer<'a>(&'a Entry);

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        self.0.on_event(ReceiverEvent::WriterStopped);
    }
}

/// Runs the connection of one attempt. Returns the reason to refuse it, if any.
async fn handoff(shared: &Shared, entry: &Entry, stream: &Link, hello: Hello) -> Option<RefuseReason> {
    for action in entry.on_event(ReceiverEvent::Hello(hello)) {
        match action {
            ReceiverAction::Refuse(reason) => return Some(reason),
            ReceiverAction::Accept => {
                let writer = Writer(entry);
                let confirm = tokio::select! {
                    biased;
                    () = entry.stop.cancelled() => false,
                    confirm = frames(shared, entry, stream) => confirm,
                };
                drop(writer);
                if !confirm {
                    return entry.tell();
                }
                let answer = frame::encode_answer(Answer::Confirm);
                if !matches!(timeout(ANSWER_TIMEOUT, write_full(stream, &answer)).await, Ok(Ok(()))) {
                    tracing::debug!(request = %entry.request_id, "could not deliver the confirmation to the sender");
                }
                return None;
            }
            _ => {}
        }
    }
    None
}

/// Sends the accept answer, then reads frames until the state machine ends the connection. True if it confirms.
async fn frames(shared: &Shared, entry: &Entry, stream: &Link) -> bool {
    let result = async {
        write_full(stream, &frame::encode_answer(Answer::Accept)).await?;
        let mut incoming = Incoming::new(stream);
        loop {
            let mut header = [0; HEADER_BYTES];
            read_full(stream, &mut header).await?;
            let actions = match frame::decode_header(&header) {
                Some(Header::Layer(piece, length)) => {
                    let block_bytes = shared.schema.block_bytes();
                    let expected = u64::from(piece.blocks) * block_bytes as u64;
                    // Checked before memory is allocated or written.
                    let fits =
                        u64::from(length) == expected && length as usize <= shared.config.frame_limit(block_bytes);
                    if !fits {
                        entry.on_event(ReceiverEvent::Garbage)
                    } else if entry.on_event(ReceiverEvent::Layer(piece)).contains(&ReceiverAction::Write(piece)) {
                        let blocks = entry.blocks_of(piece.first_block, piece.blocks);
                        let layer = piece.layer as usize;
                        let checksum_ok = incoming.frame(&header, &*shared.store, layer, blocks).await?;
                        let Piece { layer, first_block, blocks } = piece;
                        let span = &entry.span;
                        tracing::debug!(target: TRACE_TARGET, parent: span, layer, first_block, blocks, checksum_ok, "layer received");
                        entry.on_event(ReceiverEvent::Landed { checksum_ok })
                    } else {
                        Vec::new()
                    }
                }
                Some(Header::Ping) => match read_sealed::<{ HEADER_BYTES + SUM_BYTES }>(stream, &header).await? {
                    Some(_) => entry.on_event(ReceiverEvent::Ping),
                    None => entry.on_event(ReceiverEvent::Garbage),
                },
                Some(Header::Commit { first_token }) => {
                    const N: usize = HEADER_BYTES + COMMIT_BYTES + SUM_BYTES;
                    let payload = read_sealed::<N>(stream, &header)
                        .await?
                        .and_then(|bytes| bytes[HEADER_BYTES..HEADER_BYTES + COMMIT_BYTES].try_into().ok());
                    match payload {
                        Some(payload) => {
                            let (commit, exposed) = frame::decode_commit(first_token, &payload);
                            entry.on_commit(commit, Duration::from_micros(exposed))
                        }
                        None => entry.on_event(ReceiverEvent::Garbage),
                    }
                }
                None => entry.on_event(ReceiverEvent::Garbage),
            };
            if actions.contains(&ReceiverAction::Confirm) {
                return Ok(true);
            }
            if entry.stop.is_cancelled() {
                return Ok(false);
            }
            // If frames arrive faster than they are read, no await above is ever pending. Let other tasks run.
            tokio::task::yield_now().await;
        }
    }
    .await;
    match result {
        Ok(confirm) => confirm,
        Err(MoveError::Io(error)) => {
            tracing::debug!(request = %entry.request_id, %error, "kv connection ended");
            entry.on_event(ReceiverEvent::Lost);
            false
        }
        Err(MoveError::Store(error)) => {
            tracing::error!(request = %entry.request_id, %error, "failed to write received kv");
            entry.on_event(ReceiverEvent::StoreFailed);
            false
        }
    }
}

/// Reads the rest of a short frame and returns the whole frame. `None` if its checksum is wrong.
async fn read_sealed<const N: usize>(stream: &Link, header: &[u8]) -> std::io::Result<Option<[u8; N]>> {
    let mut bytes = [0; N];
    bytes[..HEADER_BYTES].copy_from_slice(header);
    read_full(stream, &mut bytes[HEADER_BYTES..]).await?;
    Ok(frame::is_sealed(&bytes).then_some(bytes))
}
