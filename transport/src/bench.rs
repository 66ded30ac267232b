//! Measures the handoff against what the machine can do: a copy in memory, and a bare TCP copy over loopback.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use overfill_kv::{BlockId, BlockPool, KvDtype, KvEndpoint, KvSchema, KvStore, RequestId, RopeSpec, Ticket};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::tcp::payload::{CHUNK_BYTES, read_full, write_full};
use crate::tcp::{Link, PlainListener};
use crate::{HandoffError, IncomingHandoff, KvReceiver, KvSender, MemoryStore, Reservation, SendPlan, TransferConfig};

/// Each way is measured this often, in turns; the best counts.
const ROUNDS: u8 = 20;

/// Bytes per second, each the best of several rounds in one run, between the same two regions of memory.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoopbackReport {
    /// KV bytes moved per round.
    pub bytes: u64,
    /// One thread copying memory.
    pub memcpy_bytes_per_second: f64,
    /// Two tasks and a TCP connection, nothing else: no frames, no checksums.
    pub tcp_bytes_per_second: f64,
    /// A whole handoff: ticket, frames, checksums, commit, confirmation.
    pub handoff_bytes_per_second: f64,
}

impl LoopbackReport {
    /// What is left of the bare TCP copy.
    pub fn handoff_to_tcp(&self) -> f64 {
        self.handoff_bytes_per_second / self.tcp_bytes_per_second
    }
}

/// The geometry of a Llama-3.2-3B: 28 layers, blocks of 64 KiB per layer.
fn schema() -> KvSchema {
    KvSchema {
        layers: (0..28).collect(),
        kv_heads: 8,
        head_dim: 128,
        rope: RopeSpec { theta: 500_000.0, scaling: "none".into() },
        dtype: KvDtype::Bf16,
        block_tokens: overfill_kv::BLOCK_TOKENS as u32,
        vocab_size: 128_256,
        tokenizer_sha256: String::new(),
        full_model: None,
    }
}

/// Measures with about `bytes` of KV (at least one block of each layer). Takes a few seconds per GB.
///
/// Wants a runtime of two or more threads, and nothing else to run on them.
pub async fn loopback(bytes: usize) -> Result<LoopbackReport, HandoffError> {
    let schema = schema();
    let config = TransferConfig::default();
    let layers = schema.layers.len();
    let blocks = (bytes / layers / schema.block_bytes()).max(1);
    let store = || Arc::new(MemoryStore::new(layers, blocks, schema.block_bytes()));
    let (source, target) = (store(), store());
    fill(&source);

    let mut report =
        LoopbackReport { bytes: (layers * blocks * schema.block_bytes()) as u64, ..LoopbackReport::default() };
    let shutdown = CancellationToken::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.map_err(local)?;
    let endpoint = listener.local_addr().map_err(local)?.to_string();
    let (receiver, serving) =
        KvReceiver::start(PlainListener(listener), schema.clone(), target.clone(), config.clone(), shutdown.clone());
    for round in 0..ROUNDS {
        let rate = |took: Duration| report.bytes as f64 / took.as_secs_f64();
        let memcpy = rate(memcpy(&source, &target));
        let tcp = rate(bare_tcp(source.clone(), target.clone(), CHUNK_BYTES).await.map_err(local)?);
        let handoff = rate(handoff(&receiver, &endpoint, &schema, &source, &config, round).await?);
        report.memcpy_bytes_per_second = report.memcpy_bytes_per_second.max(memcpy);
        report.tcp_bytes_per_second = report.tcp_bytes_per_second.max(tcp);
        report.handoff_bytes_per_second = report.handoff_bytes_per_second.max(handoff);
    }
    shutdown.cancel();
    // The listener has nothing left to wait for; were it to panic, the figures would still be right.
    let _ = serving.await;
    Ok(report)
}

fn local(error: io::Error) -> HandoffError {
    HandoffError::Connection { endpoint: "loopback".into(), message: error.to_string() }
}

fn all_blocks(store: &MemoryStore) -> Vec<BlockId> {
    (0..store.num_blocks() as u32).map(BlockId).collect()
}

/// Pages that were never written share one page of zeros, and would be read from cache.
fn fill(store: &MemoryStore) {
    let mut layers = store.take();
    for (l, layer) in layers.iter_mut().enumerate() {
        layer.iter_mut().enumerate().for_each(|(i, b)| *b = (l * 31 + i) as u8);
    }
    store.put(layers);
}

fn memcpy(source: &MemoryStore, target: &MemoryStore) -> Duration {
    let (from, mut to) = (source.take(), target.take());
    let start = Instant::now();
    for (from, to) in from.iter().zip(&mut to) {
        to.copy_from_slice(from);
    }
    let took = start.elapsed();
    source.put(from);
    target.put(to);
    took
}

/// Every layer's memory through a connection, `chunk` bytes at a time, without stores, frames or checksums.
async fn bare_tcp(source: Arc<MemoryStore>, target: Arc<MemoryStore>, chunk: usize) -> io::Result<Duration> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let out = Link::tcp(TcpStream::connect(listener.local_addr()?).await?)?;
    let incoming = Link::tcp(listener.accept().await?.0)?;
    let from = source.take();
    let mut to = target.take();
    let start = Instant::now();
    let writing = tokio::spawn(async move {
        for layer in &from {
            for part in layer.chunks(chunk) {
                write_direct(&out, part).await?;
            }
        }
        // The last byte has arrived when the other side says so.
        read_full(&out, &mut [0]).await?;
        Ok::<_, io::Error>(from)
    });
    let reading = tokio::spawn(async move {
        for layer in &mut to {
            for part in layer.chunks_mut(chunk) {
                read_full(&incoming, part).await?;
            }
        }
        write_full(&incoming, &[1]).await?;
        Ok::<_, io::Error>(to)
    });
    let from = writing.await.map_err(io::Error::other)??;
    let took = start.elapsed();
    let to = reading.await.map_err(io::Error::other)??;
    source.put(from);
    target.put(to);
    Ok(took)
}

async fn write_direct(stream: &Link, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match stream.try_write_vectored(&[io::IoSlice::new(bytes)]) {
            Ok(n) => bytes = &bytes[n..],
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => stream.writable().await?,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

async fn handoff(
    receiver: &KvReceiver,
    endpoint: &str,
    schema: &KvSchema,
    source: &Arc<MemoryStore>,
    config: &TransferConfig,
    round: u8,
) -> Result<Duration, HandoffError> {
    let blocks = source.num_blocks();
    let lease = || BlockPool::new(blocks).allocate(blocks).map(Arc::new);
    let no_room = |e: overfill_kv::NoRoom| HandoffError::Plan {
        field: "blocks",
        limit: "in the pool".into(),
        value: e.to_string(),
    };
    let (ticket, request_id) = (Ticket([round; 16]), RequestId(format!("bench-{round}")));
    let prompt_tokens = (blocks * overfill_kv::BLOCK_TOKENS) as u32;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(120);
    let mut incoming: IncomingHandoff = receiver.reserve(Reservation {
        ticket,
        request_id: request_id.clone(),
        lease: lease().map_err(no_room)?,
        held_blocks: 0,
        prompt_tokens,
        deadline,
    });
    let plan = SendPlan {
        endpoint: KvEndpoint::Tcp(endpoint.to_owned()),
        ticket,
        request_id,
        schema: schema.clone(),
        blocks: all_blocks(source),
        lease: lease().map_err(no_room)?,
        held_blocks: 0,
        prompt_tokens,
        max_pieces: source.num_layers(),
        deadline,
    };
    let start = Instant::now();
    let (sender, sending) = KvSender::start(plan, source.clone(), config.clone());
    for layer in 0..source.num_layers() {
        sender.layers().ready(layer, 0..blocks as u32);
    }
    sender.commit(1);
    incoming.ready().await?;
    let took = start.elapsed();
    // The sender's own outcome is the receiver's, a moment later.
    let _ = sending.await;
    incoming.finished();
    Ok(took)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn all_three_ways_move_everything() {
        let report = loopback(8 << 20).await.unwrap();
        assert!(report.bytes > 4 << 20);
        assert!(report.memcpy_bytes_per_second > 0.0 && report.handoff_to_tcp() > 0.0);
    }
}
