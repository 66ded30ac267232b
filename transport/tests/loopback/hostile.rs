//! Tests with broken senders, slow senders and clients that are not senders.

use std::time::Duration;

use overfill_kv::handoff::{Commit, Failure, HandoffState, Piece, RefuseReason};
use overfill_transport::TransferConfig;
use overfill_transport::tcp::frame::{self, ANSWER_BYTES, Answer, Header};
use rand::{Rng, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::rig::{Rig, failed, until};

/// A sender that writes raw bytes.
pub struct Raw(pub TcpStream);

impl Raw {
    pub async fn connect(rig: &Rig) -> Self {
        Self(TcpStream::connect(&rig.endpoint).await.unwrap())
    }

    async fn accepted(rig: &Rig, ticket: [u8; 16]) -> Self {
        let mut raw = Self::connect(rig).await;
        raw.send(&frame::encode_hello(&rig.hello(ticket))).await;
        assert_eq!(raw.answer().await, Some(Answer::Accept));
        raw
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.unwrap();
    }

    /// Waits until the other side has closed the connection.
    pub async fn closed(&mut self) {
        let mut rest = Vec::new();
        // A reset closes it as well.
        let _ = tokio::time::timeout(Duration::from_secs(20), self.0.read_to_end(&mut rest)).await.unwrap();
    }

    /// Reads the next answer. `None` if the connection was closed instead.
    pub async fn answer(&mut self) -> Option<Answer> {
        let mut bytes = [0; ANSWER_BYTES];
        let read = tokio::time::timeout(Duration::from_secs(20), self.0.read_exact(&mut bytes)).await.unwrap();
        read.ok().map(|_| frame::decode_answer(&bytes).unwrap())
    }
}

fn layer_frame(rig: &Rig, piece: Piece) -> Vec<u8> {
    let payload = vec![7; piece.blocks as usize * rig.schema.block_bytes()];
    let mut bytes = frame::encode_header(&Header::Layer(piece, payload.len() as u32)).to_vec();
    let sum = payload.chunks(rig.schema.block_bytes()).fold(frame::next_sum(0, &bytes), frame::next_sum);
    bytes.extend(payload);
    bytes.extend(sum.to_le_bytes());
    bytes
}

const PIECE: Piece = Piece { layer: 0, first_block: 0, blocks: 2 };

/// Sends these bytes after an accepted hello, and checks that the receiver refuses with `reason`.
async fn rejects(send: impl Fn(&Rig) -> Vec<u8>, reason: RefuseReason) {
    let rig = Rig::new(TransferConfig::default()).await;
    let mut incoming = rig.reserve([1; 16], 0);
    let mut raw = Raw::accepted(&rig, [1; 16]).await;
    raw.send(&send(&rig)).await;
    assert_eq!(raw.answer().await, Some(Answer::Refuse(reason)));
    assert_eq!(incoming.ready().await, failed(Failure::Rejected(reason)));
    drop(incoming);
    until("all blocks are free", || rig.is_idle()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_payload() {
    let damage = |at: usize| {
        move |rig: &Rig| {
            let mut bytes = layer_frame(rig, PIECE);
            let n = bytes.len();
            bytes[at % n] ^= 4;
            bytes
        }
    };
    rejects(damage(1000), RefuseReason::Checksum).await;
    rejects(damage(usize::MAX), RefuseReason::Checksum).await;
    // A damaged commit.
    let commit = |_: &Rig| {
        let mut bytes = frame::encode_commit(&Commit { first_token: 1, frames: 0, bytes: 0 }, 0);
        bytes[30] ^= 1;
        bytes.to_vec()
    };
    rejects(commit, RefuseReason::Protocol).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lengths_that_lie() {
    let header = |piece, length| move |_: &Rig| frame::encode_header(&Header::Layer(piece, length)).to_vec();
    rejects(header(PIECE, u32::MAX), RefuseReason::Protocol).await;
    rejects(header(PIECE, 0), RefuseReason::Protocol).await;
    let huge = Piece { blocks: u32::MAX, ..PIECE };
    rejects(header(huge, u32::MAX), RefuseReason::Protocol).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_twice_outside_or_missing() {
    rejects(|rig| [layer_frame(rig, PIECE), layer_frame(rig, PIECE)].concat(), RefuseReason::Protocol).await;
    rejects(|rig| layer_frame(rig, Piece { layer: 2, ..PIECE }), RefuseReason::Protocol).await;
    rejects(|rig| layer_frame(rig, Piece { first_block: 4, ..PIECE }), RefuseReason::Protocol).await;
    let early = |rig: &Rig| {
        let mut bytes = layer_frame(rig, PIECE);
        let commit = Commit { first_token: 1, frames: 1, bytes: 2 * rig.block_bytes() };
        bytes.extend(frame::encode_commit(&commit, 0));
        bytes
    };
    rejects(early, RefuseReason::Incomplete).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frame_that_is_none() {
    rejects(|_| vec![0xff; 64], RefuseReason::Protocol).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_ends_in_the_middle() {
    let rig = Rig::new(TransferConfig::default()).await;
    for cut in [0, 10, 5000] {
        let ticket = [cut as u8; 16];
        let mut incoming = rig.reserve(ticket, 0);
        let mut raw = Raw::accepted(&rig, ticket).await;
        raw.send(&layer_frame(&rig, PIECE)[..cut]).await;
        drop(raw);
        assert_eq!(incoming.ready().await, failed(Failure::Lost));
        drop(incoming);
        until("all blocks are free", || rig.is_idle()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_sender_with_the_same_ticket() {
    let rig = Rig::new(TransferConfig::default()).await;
    let incoming = rig.reserve([1; 16], 0);
    let mut first = Raw::accepted(&rig, [1; 16]).await;
    let mut second = Raw::connect(&rig).await;
    second.send(&frame::encode_hello(&rig.hello([1; 16]))).await;
    assert_eq!(second.answer().await, Some(Answer::Refuse(RefuseReason::Ticket)));
    first.send(&layer_frame(&rig, PIECE)).await;
    until("the first one goes on", || incoming.state() == HandoffState::Transferring).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sender_that_falls_silent() {
    let config = TransferConfig { idle_timeout: Duration::from_millis(100), ..TransferConfig::default() };
    let rig = Rig::new(config).await;
    let mut incoming = rig.reserve([1; 16], 0);
    let mut raw = Raw::accepted(&rig, [1; 16]).await;
    raw.send(&layer_frame(&rig, PIECE)[..3000]).await;
    assert_eq!(raw.answer().await, Some(Answer::Refuse(RefuseReason::Deadline)));
    assert_eq!(incoming.ready().await, failed(Failure::Idle));
    drop(incoming);
    until("all blocks are free", || rig.is_idle()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sender_that_only_waits_for_its_model() {
    let config = TransferConfig { idle_timeout: Duration::from_millis(400), ..TransferConfig::default() };
    let rig = Rig::new(config.clone()).await;
    let mut incoming = rig.reserve([1; 16], 0);
    let (sender, sending) = rig.send([1; 16], 0);
    until("it is there", || incoming.state() == HandoffState::Prefilling).await;
    // Longer than the idle timeout of both sides. Pings keep the handoff alive.
    tokio::time::sleep(config.idle_timeout * 3).await;
    rig.announce_all(&sender);
    sender.commit(4);
    assert_eq!(incoming.ready().await.unwrap().first_token, 4);
    sending.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_bring_nothing_down() {
    let config = TransferConfig { hello_timeout: Duration::from_millis(50), ..TransferConfig::default() };
    let rig = Rig::new(config).await;
    let mut random = rand::rngs::StdRng::seed_from_u64(1);
    for _ in 0..50 {
        let mut raw = Raw::connect(&rig).await;
        let bytes: Vec<u8> = (0..random.random_range(0..300)).map(|_| random.random()).collect();
        // The receiver may close the connection during the write.
        let _ = raw.0.write_all(&bytes).await;
        assert_eq!(raw.answer().await, None);
    }
    let mut incoming = rig.reserve([1; 16], 0);
    let (sender, sending) = rig.send([1; 16], 0);
    rig.announce_all(&sender);
    sender.commit(4);
    assert_eq!(incoming.ready().await.unwrap().first_token, 4);
    sending.await.unwrap().unwrap();
    rig.check_arrived(0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_many_connections() {
    let rig = Rig::new(TransferConfig { max_connections: 1, ..TransferConfig::default() }).await;
    let _incoming = rig.reserve([1; 16], 0);
    let _first = Raw::accepted(&rig, [1; 16]).await;
    let mut second = Raw::connect(&rig).await;
    assert_eq!(second.answer().await, Some(Answer::Refuse(RefuseReason::Busy)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_shows_no_ticket_gives_way() {
    let rig = Rig::new(TransferConfig { max_connections: 3, ..TransferConfig::default() }).await;
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(Raw::connect(&rig).await);
    }
    let mut incoming = rig.reserve([1; 16], 0);
    let (sender, sending) = rig.send([1; 16], 0);
    rig.announce_all(&sender);
    // Until then, the sender is a newcomer as well.
    until("the sender has shown its ticket", || incoming.state() != HandoffState::Reserved).await;
    // Connections that arrive during a handoff do not disturb it either.
    for _ in 0..20 {
        silent.push(Raw::connect(&rig).await);
    }
    sender.commit(4);
    assert_eq!(incoming.ready().await.unwrap().first_token, 4);
    sending.await.unwrap().unwrap();
    rig.check_arrived(0);
    // The first connection was closed without an answer.
    assert_eq!(silent[0].answer().await, None);
}
