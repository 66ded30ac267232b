//! Measures the throughput of a handoff over loopback. For comparison, it also measures a memory copy and a bare TCP copy.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use overfill_kv::{BlockId, BlockPool, KvDtype, KvEndpoint, KvSchema, KvStore, RequestId, RopeSpec, Ticket};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::tcp::payload::{CHUNK_BYTES, read_full, write_full};
use crate::tcp::{Link, PlainListener};
use crate::{HandoffError, IncomingHandoff, KvReceiver, KvSender, MemoryStore, Reservation, SendPlan, TransferConfig};

/// Rounds per measurement. Each round runs all three measurements; the best round counts.
const ROUNDS: u8 = 20;

/// Throughput of the three measurements, each the best of all rounds. All copy between the same two memory regions.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoopbackReport {
    /// KV bytes copied per round.
    pub bytes: u64,
    /// Memory copy by one thread, in bytes per second.
    pub memcpy_bytes_per_second: f64,
    /// Copy between two tasks over a TCP connection, without frames or checksums, in bytes per second.
    pub tcp_bytes_per_second: f64,
    /// Complete handoff with ticket, frames, checksums, commit and confirmation, in bytes per second.
    pub handoff_bytes_per_second: f64,
}

impl LoopbackReport {
    /// Throughput of the handoff divided by the throughput of the bare TCP copy.
    pub fn handoff_to_tcp(&self) -> f64 {
        self.handoff_bytes_per_second / self.tcp_bytes_per_second
    }
}

/// Schema of Llama-3.2-3B: 28 layers, 64 KiB per block of a layer.
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

/// Runs the benchmark with about `bytes` of KV (at least one block per layer). Takes a few seconds per GB.
///
/// The runtime should have at least two threads and run nothing else.
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
    // A panic of the listener's task would not change the results.
    let _ = serving.await;
    Ok(report)
}

fn local(error: io::Error) -> HandoffError {
    HandoffError::Connection { endpoint: "loopback".into(), message: error.to_string() }
}

fn all_blocks(store: &MemoryStore) -> Vec<BlockId> {
    (0..store.num_blocks() as u32).map(BlockId).collect()
}

/// Writes to every page. Pages that were never written share one zero page, which would be read from cache.
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

/// Copies the memory of every layer through a TCP connection, `chunk` bytes at a time, without frames or checksums.
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
        // The reader sends one byte when it has read everything.
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
        endpoint: KvEndpoint::new(endpoint.to_owned()),
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
    // The receiver has succeeded, so the sender's outcome adds nothing.
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
