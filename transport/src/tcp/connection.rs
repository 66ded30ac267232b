//! Serves one connection on the receiver: hello, frames, commit. The attempt's state machine must admit each frame
//! before any of its bytes are written.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use overfill_kv::handoff::{Piece, ReceiverAction, ReceiverEvent, RefuseReason, TRACE_TARGET};
use overfill_kv::{BlockId, KvTransport, ProtocolVersions};
use tokio::time::timeout;

use super::format::{Format, HEADER_2_BYTES, Sums};
use super::frame::{self, Answer, COMMIT_BYTES, Header, SUM_BYTES, is_sealed, next_sum};
use super::hello::{self, Grant, Offer, Start, Way};
use super::link::{Link, Opening};
use super::newcomers::Newcomer;
use super::payload::{Incoming, MoveError, read_full, write_full};
use super::target::Target;
use crate::nccl::{Announced, Progress};
use crate::rdma;
use crate::reservations::{Entry, Shared};

/// How long incoming bytes are read and discarded after a refusal. Closing at once would reset the connection, and the
/// sender would not receive the reason.
const LINGER: Duration = Duration::from_millis(500);

/// Timeout for writing the confirmation.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

pub(crate) async fn serve(shared: &Shared, opening: Opening, peer: SocketAddr, newcomer: &Newcomer) {
    let versions = shared.schema.protocol();
    let opened = async {
        let stream = opening.await?;
        let first = read_hello(&stream, versions).await?;
        Ok::<_, std::io::Error>((stream, first))
    };
    let (stream, first) = match timeout(shared.config.hello_timeout, opened).await {
        Ok(Ok((stream, Some(first)))) => (stream, first),
        Ok(Ok((_, None))) => {
            tracing::debug!(%peer, "closing a kv connection: the first message is not a hello");
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
    let refused = match first {
        First::OtherVersions => Some(Answer::RefuseVersion(versions)),
        First::Offer(version, offer) => {
            let refused = match shared.find(&offer.hello.ticket) {
                // Checked before the attempt gets the hello: a connection that was evicted must not write.
                Some(_) if !newcomer.stay() => None,
                Some(entry) => handoff(shared, &entry, stream, version, &offer).await,
                None => Some(RefuseReason::Ticket),
            };
            if let Some(reason) = refused {
                tracing::debug!(%peer, ticket = ?offer.hello.ticket, %reason, "refusing a kv connection");
            }
            refused.map(Answer::Refuse)
        }
    };
    if let Some(answer) = refused {
        refuse(stream, answer).await;
    }
}

/// The first message of a sender.
enum First {
    /// A hello of a sender that speaks none of this node's versions.
    OtherVersions,
    /// The version to use, and the hello.
    Offer(u32, Box<Offer>),
}

/// Reads a hello of any version. `None` if it is none. `ours`: the versions that this node speaks.
async fn read_hello(stream: &Link, ours: ProtocolVersions) -> std::io::Result<Option<First>> {
    let mut start = [0; hello::START_BYTES];
    read_full(stream, &mut start).await?;
    let (version, length) = match hello::decode_start(&start) {
        None => return Ok(None),
        Some(Start::First(length)) => (ours.common(ProtocolVersions::UNSTATED), length),
        Some(Start::Later(theirs, length)) => (ours.common(theirs), length),
    };
    // Bounded by `decode_start`.
    let mut rest = vec![0; length];
    read_full(stream, &mut rest).await?;
    Ok(match version {
        Ok(version) => hello::decode(&start, &rest).map(|offer| First::Offer(version, Box::new(offer))),
        Err(error) => {
            tracing::warn!(%error, "refusing a kv connection");
            Some(First::OtherVersions)
        }
    })
}

async fn refuse(stream: &Link, answer: Answer) {
    let answer = frame::encode_answer(answer);
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

/// What can write to the blocks of an attempt. Reports `WriterStopped` when it is stopped or dropped, however the task
/// ends, and not before the sender's one-sided access has ended (KV-1, KV-3). Created before anything is written.
struct Writer<'a> {
    entry: &'a Entry,
    target: Target,
    stream: &'a Link,
    /// Whether `WriterStopped` is left to [`Writer::stop`].
    stopping: bool,
}

impl Writer<'_> {
    async fn stop(mut self) -> Vec<ReceiverAction> {
        self.stopping = true;
        std::mem::take(&mut self.target).revoke(self.stream).await;
        self.entry.on_event(ReceiverEvent::WriterStopped)
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        if !self.stopping {
            // Destroys the queue pair. Receives of NCCL keep their blocks themselves.
            self.target = Target::Framed;
            self.entry.on_event(ReceiverEvent::WriterStopped);
        }
    }
}

/// Chooses the transport of an attempt, and prepares it. The reason to refuse the sender if there is none.
async fn choose(shared: &Shared, entry: &Entry, version: u32, offer: &Offer) -> Result<(Grant, Target), RefuseReason> {
    let transports = &shared.config.transports;
    let sums = if version == 1 { Sums::Chain } else { Sums::PerBlock };
    if offer.sums & sums as u8 == 0 {
        return Err(RefuseReason::Version);
    }
    if offer.rank != (0, 1) {
        return Err(RefuseReason::Writers);
    }
    let common = offer.transports.common(transports.usable());
    if let (true, Some(peer), Some(pool)) = (common.contains(KvTransport::Rdma), &offer.rdma, transports.rdma()) {
        let piece_bytes = shared.config.frame_limit(shared.schema.block_bytes());
        let target =
            async { rdma::Target::new(pool.queue(&entry.spec.ticket).await?, peer, &entry.blocks, piece_bytes).await };
        match target.await {
            Ok(target) => return Ok((Grant { version, way: Way::Rdma(target.grant()) }, Target::Rdma(target))),
            Err(error) => tracing::warn!(request = %entry.request_id, %error, "this handoff can't use rdma"),
        }
    }
    if let (true, Some(sender), Some(agent)) = (common.contains(KvTransport::Nccl), offer.nccl, transports.nccl()) {
        match (agent.invite(sender).await, entry.lease()) {
            (Ok(id), Some(lease)) => {
                return Ok((Grant { version, way: Way::Nccl(id) }, Target::Nccl(agent.receiving(id, lease))));
            }
            // The attempt is over.
            (Ok(_), None) => return Err(RefuseReason::Ticket),
            (Err(error), _) => tracing::warn!(request = %entry.request_id, %error, "this handoff can't use nccl"),
        }
    }
    match common.contains(KvTransport::Tcp) {
        true => Ok((Grant { version, way: Way::Tcp }, Target::Framed)),
        false => Err(RefuseReason::Transport),
    }
}

/// Runs the connection of one attempt. Returns the reason to refuse it, if any.
async fn handoff(shared: &Shared, entry: &Entry, stream: &Link, version: u32, offer: &Offer) -> Option<RefuseReason> {
    let (grant, target) = match choose(shared, entry, version, offer).await {
        Ok(chosen) => chosen,
        Err(reason) => return Some(reason),
    };
    let mode = target.mode();
    for action in entry.on_event(ReceiverEvent::Hello(offer.hello, mode)) {
        match action {
            ReceiverAction::Refuse(reason) => return Some(reason),
            ReceiverAction::Accept => {
                let mut writer = Writer { entry, target, stream, stopping: false };
                let framed = tokio::select! {
                    biased;
                    () = entry.stop.cancelled() => false,
                    confirm = frames(shared, entry, stream, &grant, &mut writer.target) => confirm,
                };
                // With one-sided writes, only now the request is ready.
                let revoked = writer.stop().await.contains(&ReceiverAction::Confirm);
                if !framed && !revoked {
                    return entry.tell();
                }
                shared.config.transports.count(grant.way.transport());
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
async fn frames(shared: &Shared, entry: &Entry, stream: &Link, grant: &Grant, target: &mut Target) -> bool {
    let mut frames = Frames {
        shared,
        entry,
        stream,
        format: Format::new(grant.version, shared.schema.kv_heads),
        incoming: Incoming::new(stream, Format::new(grant.version, 0).sums()),
        target,
        header: [0; HEADER_2_BYTES],
        have: 0,
        pieces: 0,
    };
    let result = async {
        match grant.version {
            1 => write_full(stream, &frame::encode_answer(Answer::Accept)).await?,
            _ => write_full(stream, &hello::encode_accepted(grant)).await?,
        }
        loop {
            let actions = frames.next().await?;
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
        Err(error @ (MoveError::Io(_) | MoveError::Rdma(_) | MoveError::Nccl(_))) => {
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

/// Reads the frames of one attempt.
struct Frames<'a> {
    shared: &'a Shared,
    entry: &'a Entry,
    stream: &'a Link,
    format: Format,
    incoming: Incoming<'a>,
    target: &'a mut Target,
    /// The header that is being read, and how many of its bytes have come.
    header: [u8; HEADER_2_BYTES],
    have: usize,
    /// Pieces that were announced to NCCL.
    pieces: u32,
}

impl Frames<'_> {
    /// Reads the rest of a header. Cancel safe.
    async fn fill_header(stream: &Link, header: &mut [u8], have: &mut usize) -> std::io::Result<()> {
        while *have < header.len() {
            match stream.try_read(&mut header[*have..]) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => *have += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => stream.readable().await?,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Waits for the next header, or for a piece that was announced before. Passes either to the state machine. Returns the
    /// actions that are left to the connection.
    async fn next(&mut self) -> Result<Vec<ReceiverAction>, MoveError> {
        let length = self.format.header_bytes();
        let header = &mut self.header[..length];
        if let Target::Nccl(receiving) = &mut *self.target {
            let (has_room, is_read) = (receiving.has_room(), self.have == length);
            if !has_room || !is_read {
                tokio::select! {
                    biased;
                    progress = receiving.progress() => {
                        let progress = progress?;
                        return self.progressed(progress).await;
                    }
                    // Also without room, so that the end of the connection is seen.
                    filled = Self::fill_header(self.stream, header, &mut self.have), if !is_read => filled?,
                }
            }
            if !has_room {
                return Ok(Vec::new());
            }
        } else {
            Self::fill_header(self.stream, header, &mut self.have).await?;
        }
        self.have = 0;
        self.frame().await
    }

    /// Passes on what has happened to an announced piece.
    async fn progressed(&mut self, progress: Progress) -> Result<Vec<ReceiverAction>, MoveError> {
        let Announced { piece, header_sum, sum } = match progress {
            Progress::Posted(number) => {
                write_full(self.stream, &frame::encode_answer(Answer::Posted(number))).await?;
                return Ok(Vec::new());
            }
            Progress::Arrived(announced) => announced,
        };
        if !self.entry.on_event(ReceiverEvent::Layer(piece)).contains(&ReceiverAction::Write(piece)) {
            return Ok(Vec::new());
        }
        let blocks = self.entry.blocks_of(piece.first_block, piece.blocks);
        let arrived = self.format.sums().of_store(&*self.shared.store, piece.layer as usize, blocks, header_sum)?;
        Ok(self.landed(piece, arrived == sum))
    }

    /// Handles the frame whose header was read.
    async fn frame(&mut self) -> Result<Vec<ReceiverAction>, MoveError> {
        let (entry, stream, format) = (self.entry, self.stream, self.format);
        let header = self.header;
        let header = &header[..format.header_bytes()];
        match format.decode(header) {
            Some(Header::Layer(piece, length)) => {
                // Checked before memory is allocated or written.
                if self.payload_bytes(&piece) != Some(u64::from(length)) {
                    return Ok(entry.on_event(ReceiverEvent::Garbage));
                }
                if !entry.on_event(ReceiverEvent::Layer(piece)).contains(&ReceiverAction::Write(piece)) {
                    return Ok(Vec::new());
                }
                let blocks = entry.blocks_of(piece.first_block, piece.blocks);
                let checksum_ok =
                    self.incoming.frame(header, &*self.shared.store, piece.layer as usize, blocks).await?;
                Ok(self.landed(piece, checksum_ok))
            }
            Some(Header::Written(piece, number)) => {
                let mut sum = [0; SUM_BYTES];
                read_full(stream, &mut sum).await?;
                if self.payload_bytes(&piece).is_none() {
                    return Ok(entry.on_event(ReceiverEvent::Garbage));
                }
                match &mut *self.target {
                    Target::Framed => return Ok(entry.on_event(ReceiverEvent::Garbage)),
                    Target::Rdma(_) => {}
                    // The state machine sees the piece when it has arrived: several are under way.
                    Target::Nccl(receiving) => {
                        let (header_sum, sum) = (next_sum(0, header), u64::from_le_bytes(sum));
                        let Some(blocks) = entry.try_blocks_of(&piece).filter(|_| number == self.pieces) else {
                            return Ok(entry.on_event(ReceiverEvent::Garbage));
                        };
                        receiving.receive(Announced { piece, header_sum, sum }, piece.layer as usize, blocks)?;
                        self.pieces = self.pieces.wrapping_add(1);
                        return Ok(Vec::new());
                    }
                }
                if !entry.on_event(ReceiverEvent::Layer(piece)).contains(&ReceiverAction::Write(piece)) {
                    return Ok(Vec::new());
                }
                let blocks = entry.blocks_of(piece.first_block, piece.blocks);
                let checksum_ok = self.written(piece.layer as usize, blocks, number, next_sum(0, header)).await? == sum;
                if checksum_ok
                    && let Target::Rdma(target) = &mut *self.target
                    && target.is_staged()
                {
                    target.take(piece.layer as usize, blocks)?;
                    write_full(stream, &frame::encode_answer(Answer::Taken)).await?;
                }
                Ok(self.landed(piece, checksum_ok))
            }
            Some(Header::Ping) => {
                let mut sum = [0; SUM_BYTES];
                read_full(stream, &mut sum).await?;
                match is_sealed(&[header, &sum].concat()) {
                    true => Ok(entry.on_event(ReceiverEvent::Ping)),
                    false => Ok(entry.on_event(ReceiverEvent::Garbage)),
                }
            }
            Some(Header::Commit { first_token }) => {
                let mut rest = [0; COMMIT_BYTES + SUM_BYTES];
                read_full(stream, &mut rest).await?;
                while let Target::Nccl(receiving) = &mut *self.target
                    && !receiving.is_empty()
                {
                    let progress = receiving.progress().await?;
                    self.progressed(progress).await?;
                }
                match format.decode_commit(first_token, header, &rest) {
                    Some((commit, exposed)) => Ok(entry.on_commit(commit, Duration::from_micros(exposed))),
                    None => Ok(entry.on_event(ReceiverEvent::Garbage)),
                }
            }
            None => Ok(entry.on_event(ReceiverEvent::Garbage)),
        }
    }

    /// Payload of a piece in bytes. `None` if it is longer than allowed.
    fn payload_bytes(&self, piece: &Piece) -> Option<u64> {
        let block_bytes = self.shared.schema.block_bytes();
        let bytes = u64::from(piece.blocks) * block_bytes as u64;
        (bytes <= self.shared.config.frame_limit(block_bytes) as u64).then_some(bytes)
    }

    /// Waits until a piece that was written one-sided has arrived, and returns its checksum. `sum` is that of its header.
    async fn written(
        &mut self,
        layer: usize,
        blocks: &[BlockId],
        number: u32,
        sum: u64,
    ) -> Result<[u8; SUM_BYTES], MoveError> {
        let Target::Rdma(target) = &mut *self.target else {
            return Err(std::io::Error::from(std::io::ErrorKind::InvalidData).into());
        };
        target.arrived(number).await?;
        Ok(target.sum(layer, blocks, self.format.sums(), sum)?.to_le_bytes())
    }

    fn landed(&self, piece: Piece, checksum_ok: bool) -> Vec<ReceiverAction> {
        let Piece { layer, first_block, blocks } = piece;
        let span = &self.entry.span;
        tracing::debug!(target: TRACE_TARGET, parent: span, layer, first_block, blocks, checksum_ok, "layer received");
        self.entry.on_event(ReceiverEvent::Landed { checksum_ok })
    }
}
