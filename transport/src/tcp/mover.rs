//! How the bytes of pieces leave the sender.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use overfill_kv::handoff::{Hello, Piece};
use overfill_kv::{BlockId, KvStore, KvTransport, ProtocolVersions, TransportSet};

use super::answers::{AnswerReader, Reply};
use super::format::Format;
use super::frame::{self, Answer, Header, next_sum};
use super::hello::{self, Offer};
use super::link::Link;
use super::payload::{MoveError, Outgoing};
use crate::nccl::{self, SenderId};
use crate::rdma::{self, Source};
use crate::{HandoffError, SendPlan, TransferConfig};

/// How long a receiver may take to close the connection when an attempt ends whose pieces are announced.
const GRACE: Duration = Duration::from_secs(1);

/// What a sender offers besides TCP.
#[derive(Default)]
pub(super) struct Local {
    /// A queue pair of RDMA, until it is used.
    pub queue: Option<rdma::Queue>,
    /// The name of this side for NCCL.
    pub sender: Option<SenderId>,
}

impl Local {
    /// Prepares what the configuration's transports need.
    pub async fn prepare(version: u32, plan: &SendPlan, config: &TransferConfig) -> Result<Self, HandoffError> {
        let (transports, endpoint) = (&config.transports, &plan.endpoint.address);
        let usable = transports.usable();
        let failed = |problem: String| HandoffError::Transport {
            transports: usable.to_string(),
            endpoint: endpoint.clone(),
            problem,
        };
        let mut local = Self::default();
        if version == 1 {
            return Ok(local);
        }
        if let Some(pool) = transports.rdma() {
            match pool.queue(&plan.ticket).await {
                Ok(queue) => local.queue = Some(queue),
                Err(error) if usable.contains(KvTransport::Tcp) => {
                    tracing::warn!(request = %plan.request_id, %error, "this handoff does not offer rdma");
                }
                Err(error) => return Err(failed(error.to_string())),
            }
        }
        if let Some(agent) = transports.nccl() {
            let sender = agent.introduce(endpoint, &plan.ticket).await;
            local.sender = Some(sender.map_err(|error| failed(error.to_string()))?);
        }
        Ok(local)
    }

    /// Maximum number of blocks in a piece, if one-sided writes or NCCL limit it.
    pub fn max_piece_blocks(&self) -> Option<u32> {
        let rdma = self.queue.as_ref().map(|_| rdma::MAX_PIECE_BLOCKS);
        rdma.or(self.sender.map(|_| nccl::MAX_PIECE_BLOCKS))
    }

    /// The first message of a handoff. `versions`: those that this node speaks.
    pub fn hello(&self, version: u32, versions: ProtocolVersions, hello: &Hello, mut usable: TransportSet) -> Vec<u8> {
        if version == 1 {
            return frame::encode_hello(hello).to_vec();
        }
        if self.queue.is_none() {
            usable.0 &= !(KvTransport::Rdma as u8);
        }
        let address = self.queue.as_ref().map(rdma::Queue::address);
        hello::encode(&Offer { versions, ..Offer::new(*hello, usable, address, self.sender) })
    }
}

/// What moves the bytes.
#[derive(Default)]
pub(super) enum Mover {
    /// The frames.
    #[default]
    Framed,
    /// One-sided writes.
    Rdma(Box<rdma::Writer>),
    /// Sends over NCCL. Also the number of pieces announced.
    Nccl(Arc<nccl::Sending>, u32),
}

/// Blocks to send.
pub(super) struct Blocks<'a> {
    pub piece: Piece,
    /// Position of the first block among those of the attempt.
    pub first: usize,
    pub store: &'a dyn KvStore,
    /// Index of the layer in the store.
    pub layer: usize,
    pub ids: &'a [BlockId],
}

impl Mover {
    /// Sends a piece; over NCCL, announces it.
    pub async fn send(&mut self, blocks: Blocks<'_>, format: Format, out: &mut Outgoing<'_>) -> Result<(), MoveError> {
        let Blocks { piece, first, store, layer, ids } = blocks;
        let (header, sum) = match self {
            Self::Framed => {
                let length = (ids.len() * store.block_bytes()) as u32;
                return out.frame(&format.encode(&Header::Layer(piece, length)), store, layer, ids).await;
            }
            Self::Rdma(writer) => {
                let header = format.encode(&Header::Written(piece, writer.next_number()));
                let source = Source { wire_layer: piece.layer as usize, store_layer: layer, first, ids };
                let sum = writer.write(&source, format.sums(), next_sum(0, &header)).await?;
                (header, sum)
            }
            Self::Nccl(sending, pieces) => {
                let header = format.encode(&Header::Written(piece, *pieces));
                sending.room().await?;
                let sum = format.sums().of_store(store, layer, ids, next_sum(0, &header))?;
                sending.announce(layer, ids);
                *pieces = pieces.wrapping_add(1);
                (header, sum)
            }
        };
        out.push(&header);
        out.push(&sum.to_le_bytes());
        Ok(out.flush().await?)
    }

    /// Ends what reads the blocks: when this returns, nothing does (KV-2).
    pub async fn stop(self, stream: &Link, answers: &mut AnswerReader) {
        match self {
            Self::Framed => {}
            Self::Rdma(writer) => writer.close().await,
            Self::Nccl(sending, _) => {
                // The receiver may have posted receives for what was announced. They would stay for ever.
                let finish = async {
                    if sending.waits_for_receiver() {
                        stream.end_writing().await?;
                    }
                    while sending.waits_for_receiver() {
                        if let Reply::Answer(Answer::Posted(number)) = answers.next(stream).await? {
                            sending.posted(number).map_err(io::Error::other)?;
                        }
                    }
                    Ok::<_, io::Error>(())
                };
                // An error says that the receiver has closed the connection, and waits for nothing more.
                let _ = tokio::time::timeout(GRACE, finish).await;
                sending.idle().await;
            }
        }
    }
}

/// Resolves when a send over NCCL has failed.
pub(super) async fn broken(sending: Option<Arc<nccl::Sending>>) -> io::Error {
    match sending {
        Some(sending) => io::Error::other(sending.broken().await),
        None => std::future::pending().await,
    }
}
