//! Measures handoffs between two stores of one process, over any transport. In the same rounds it measures what a transport
//! can do without a handoff: a plain copy of as many bytes over TCP, plain RDMA writes, or plain sends over NCCL.

mod copies;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use overfill_kv::{
    BLOCK_TOKENS, BlockId, BlockPool, KvDtype, KvEndpoint, KvSchema, KvStore, KvTransport, NoRoom, RequestId, RopeSpec,
    StoreError, Ticket,
};
use rustix::time::{ClockId, clock_gettime};
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};
use tokio_util::sync::CancellationToken;

use crate::nccl::{self, NcclError};
use crate::rdma::{self, RdmaError};
use crate::tcp::PlainListener;
use crate::{
    HandoffError, KvReceiver, KvSender, MemoryStore, Reservation, SendPlan, TransferConfig, TransportChoice,
    TransportError, TransportOptions, Transports,
};
use copies::Buffers;

/// A handoff may take this long.
const DEADLINE: Duration = Duration::from_secs(120);

/// The simulated prefill takes this many times as long as a handoff that waits for nothing.
const PREFILL_FACTOR: u32 = 2;

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The transport can't be used.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A handoff failed.
    #[error(transparent)]
    Handoff(#[from] HandoffError),
    /// The plain RDMA writes failed.
    #[error(transparent)]
    Rdma(#[from] RdmaError),
    /// The plain sends over NCCL failed.
    #[error(transparent)]
    Nccl(#[from] NcclError),
    /// The KV could not be filled.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The plain TCP copy failed.
    #[error("loopback: {0}")]
    Io(#[from] io::Error),
    /// The blocks of a store could not be leased.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
}

/// Size of the KV that is handed over, in the shape of Llama-3.2-3B: 28 layers, 64 KiB per block of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Blocks of each layer.
    pub blocks: usize,
}

impl Shape {
    /// The shape with about `bytes` of KV, at least one block per layer.
    pub fn of(bytes: usize) -> Self {
        let one = Self { blocks: 1 };
        Self { blocks: (bytes / one.bytes()).max(1) }
    }

    /// Number of layers.
    pub fn layers(self) -> usize {
        schema().layers.len()
    }

    /// Bytes of a block of one layer.
    pub fn block_bytes(self) -> usize {
        schema().block_bytes()
    }

    /// Bytes of all blocks of all layers.
    pub fn bytes(self) -> usize {
        self.layers() * self.blocks * self.block_bytes()
    }

    /// A store of this shape in host memory.
    pub fn host_store(self) -> Arc<dyn KvStore> {
        Arc::new(MemoryStore::new(self.layers(), self.blocks, self.block_bytes()))
    }
}

fn schema() -> KvSchema {
    KvSchema {
        layers: (0..28).collect(),
        kv_heads: 8,
        head_dim: 128,
        rope: RopeSpec { theta: 500_000.0, scaling: "none".into() },
        layer_attention: Vec::new(),
        dtype: KvDtype::Bf16,
        block_tokens: BLOCK_TOKENS as u32,
        vocab_size: 128_256,
        tokenizer_sha256: String::new(),
        full_model: None,
    }
}

/// Speed and cost of moving the bytes once.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Bytes per second.
    pub bytes_per_second: f64,
    /// Processor time of both sides together, in seconds per 10^9 bytes.
    pub cpu_seconds_per_gigabyte: f64,
}

/// What was measured. All figures are medians over the rounds.
#[derive(Clone, Debug, PartialEq)]
pub struct HandoffReport {
    /// The transport that the sides have chosen.
    pub transport: KvTransport,
    /// Why this one, as a node logs it.
    pub reason: String,
    /// KV bytes per handoff.
    pub bytes: usize,
    /// Memory copy by one thread.
    pub memcpy: Cost,
    /// Copy of as many bytes over the same kind of connection, without tickets, frames, checksums and commit. `None`:
    /// there is no such measurement for the transport, or it can't access the KV where it lies.
    pub bare: Option<Cost>,
    /// Complete handoff of KV that is there from the beginning.
    pub handoff: Cost,
    /// Throughput of the handoff, divided by the throughput of the bare copy in the same round.
    pub handoff_to_bare: Option<f64>,
    /// Duration of a prefill that announces its layers one after the other while they are sent.
    pub prefill_seconds: f64,
    /// Time from the end of that prefill until the decode node may start.
    pub exposed_seconds: f64,
}

/// What to measure.
#[derive(Clone, Debug)]
pub struct HandoffOptions {
    /// The transports that both sides may use.
    pub choice: TransportChoice,
    /// How they may be used.
    pub transports: TransportOptions,
    /// Number of rounds.
    pub rounds: usize,
}

impl Default for HandoffOptions {
    fn default() -> Self {
        Self { choice: TransportChoice::Only(KvTransport::Tcp), transports: TransportOptions::default(), rounds: 10 }
    }
}

/// A runtime with one thread for each side, as if they were two processes. Threads of a common one would take tasks from each
/// other.
struct Runtimes {
    sender: Runtime,
    receiver: Runtime,
}

impl Runtimes {
    fn new() -> io::Result<Self> {
        let one = || Builder::new_multi_thread().worker_threads(1).enable_all().build();
        Ok(Self { sender: one()?, receiver: one()? })
    }

    fn end(self) {
        self.sender.shutdown_background();
        self.receiver.shutdown_background();
    }
}

/// Hands over all blocks of `source` to `target`. Both must have the `shape`. Takes a few seconds per GB.
///
/// # Errors
/// The transport that was asked for by name can't be used, or a handoff fails.
pub async fn handoffs(
    shape: Shape,
    source: Arc<dyn KvStore>,
    target: Arc<dyn KvStore>,
    options: &HandoffOptions,
) -> Result<HandoffReport, BenchError> {
    fill(&*source)?;
    let runtimes = Runtimes::new()?;
    let measured = measure(shape, source, target, options, &runtimes).await;
    runtimes.end();
    measured
}

async fn measure(
    shape: Shape,
    source: Arc<dyn KvStore>,
    target: Arc<dyn KvStore>,
    options: &HandoffOptions,
    runtimes: &Runtimes,
) -> Result<HandoffReport, BenchError> {
    let sides = Sides::open(shape, source, target, options, runtimes).await?;
    // Not counted: it warms up memory, and shows which transport is used.
    sides.handoff(Duration::ZERO).await?;
    let transport = sides.used();
    let mut buffers = Buffers::new(shape.bytes());
    let (mut memcpy, mut bare, mut handoff) = (Times::default(), Times::default(), Times::default());
    let (mut ratios, mut exposed, mut prefill) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..options.rounds.max(1) {
        memcpy.time(async { Ok(buffers.memcpy()) }).await?;
        let plain = match transport {
            KvTransport::Tcp => Some(bare.time(buffers.tcp(runtimes)).await?),
            KvTransport::Rdma if sides.has_plain_rdma() => Some(bare.time(sides.plain_rdma()).await?),
            KvTransport::Rdma => None,
            KvTransport::Nccl => Some(bare.time(sides.plain_nccl()).await?),
        };
        let whole = handoff.time(sides.handoff(Duration::ZERO)).await?;
        ratios.extend(plain.map(|plain| plain.as_secs_f64() / whole.as_secs_f64()));
        prefill.push((whole * PREFILL_FACTOR).as_secs_f64());
        exposed.push(sides.handoff(whole * PREFILL_FACTOR).await?.as_secs_f64());
    }
    let cost = |times: Times| times.cost(shape.bytes());
    let report = HandoffReport {
        transport,
        reason: sides.reason.clone(),
        bytes: shape.bytes(),
        memcpy: cost(memcpy),
        bare: (!ratios.is_empty()).then(|| cost(bare)),
        handoff: cost(handoff),
        handoff_to_bare: (!ratios.is_empty()).then(|| median(ratios)),
        prefill_seconds: median(prefill),
        exposed_seconds: median(exposed),
    };
    sides.end().await;
    Ok(report)
}

/// Writes to every page. Pages that were never written share one zero page, which would be read from cache.
fn fill(store: &dyn KvStore) -> Result<(), StoreError> {
    let blocks = all_blocks(store);
    for layer in 0..store.num_layers() {
        store.write(layer, &blocks, &mut |i, bytes| {
            bytes.iter_mut().enumerate().for_each(|(at, byte)| *byte = (layer * 31 + i * 7 + at) as u8);
        })?;
    }
    Ok(())
}

fn all_blocks(store: &dyn KvStore) -> Vec<BlockId> {
    (0..store.num_blocks() as u32).map(BlockId).collect()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Processor time that this process has used.
fn cpu() -> Duration {
    let used = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(used.tv_sec.unsigned_abs(), used.tv_nsec.unsigned_abs() as u32)
}

/// Durations of one measurement, and the processor time that it took.
#[derive(Default)]
struct Times {
    wall: Vec<f64>,
    cpu: Vec<f64>,
}

impl Times {
    /// Runs `work`, which returns its duration.
    async fn time(&mut self, work: impl Future<Output = Result<Duration, BenchError>>) -> Result<Duration, BenchError> {
        let before = cpu();
        let took = work.await?;
        self.cpu.push((cpu() - before).as_secs_f64());
        self.wall.push(took.as_secs_f64());
        Ok(took)
    }

    fn cost(self, bytes: usize) -> Cost {
        let bytes = bytes as f64;
        Cost { bytes_per_second: bytes / median(self.wall), cpu_seconds_per_gigabyte: median(self.cpu) / (bytes / 1e9) }
    }
}

/// A sender's and a receiver's side.
struct Sides<'a> {
    runtimes: &'a Runtimes,
    shape: Shape,
    source: Arc<dyn KvStore>,
    sender: TransferConfig,
    receiver: KvReceiver,
    /// The receiver's transports.
    transports: Arc<Transports>,
    reason: String,
    endpoint: String,
    /// Gives each handoff a ticket of its own (KV-4).
    attempts: AtomicU64,
    shutdown: CancellationToken,
    serving: tokio::task::JoinHandle<()>,
}

impl<'a> Sides<'a> {
    async fn open(
        shape: Shape,
        source: Arc<dyn KvStore>,
        target: Arc<dyn KvStore>,
        options: &HandoffOptions,
        runtimes: &'a Runtimes,
    ) -> Result<Self, BenchError> {
        let open = |store: &Arc<dyn KvStore>| Transports::open(options.choice, &options.transports, store.clone());
        let config = |transports| TransferConfig { transports, ..TransferConfig::default() };
        let (sender, transports) = (config(open(&source)?), open(&target)?);
        let shutdown = CancellationToken::new();
        let (config, ended) = (config(transports.clone()), shutdown.clone());
        let listening = runtimes.receiver.spawn(async move {
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            let endpoint = listener.local_addr()?.to_string();
            Ok::<_, io::Error>((KvReceiver::start(PlainListener(listener), schema(), target, config, ended), endpoint))
        });
        let ((receiver, serving), endpoint) = listening.await.map_err(io::Error::other)??;
        let reason = transports.reason().to_owned();
        Ok(Self {
            runtimes,
            shape,
            source,
            sender,
            receiver,
            transports,
            reason,
            endpoint,
            attempts: AtomicU64::new(1),
            shutdown,
            serving,
        })
    }

    /// The transport of the handoffs so far.
    fn used(&self) -> KvTransport {
        KvTransport::ALL.into_iter().find(|t| self.transports.handoffs(*t) > 0).unwrap_or(KvTransport::Tcp)
    }

    fn has_plain_rdma(&self) -> bool {
        let direct = |transports: &Transports| transports.rdma().is_some_and(|pool| pool.is_direct());
        direct(&self.sender.transports) && direct(&self.transports)
    }

    async fn plain_rdma(&self) -> Result<Duration, BenchError> {
        match (self.sender.transports.rdma(), self.transports.rdma()) {
            (Some(from), Some(to)) => Ok(rdma::plain_writes(from, to, self.sender.max_frame_bytes).await?),
            _ => Err(RdmaError::Mismatch("the transport").into()),
        }
    }

    async fn plain_nccl(&self) -> Result<Duration, BenchError> {
        match (self.sender.transports.nccl(), self.transports.nccl()) {
            (Some(from), Some(to)) => {
                let lease = BlockPool::new(1).allocate(1)?;
                Ok(nccl::plain_sends(from, to, &*self.source, Arc::new(lease)).await?)
            }
            _ => Err(NcclError::Mismatch("the transport").into()),
        }
    }

    /// One handoff, whose layers are announced at equal distances during `prefill`. Returns the time from the end of the
    /// prefill until the receiver is ready.
    async fn handoff(&self, prefill: Duration) -> Result<Duration, BenchError> {
        let blocks = self.shape.blocks;
        let lease = || BlockPool::new(blocks).allocate(blocks).map(Arc::new);
        let ticket = Ticket(u128::from(self.attempts.fetch_add(1, Ordering::Relaxed)).to_le_bytes());
        let request_id = RequestId("bench".into());
        let prompt_tokens = (blocks * BLOCK_TOKENS) as u32;
        let deadline = tokio::time::Instant::now() + DEADLINE;
        let mut incoming = self.receiver.reserve(Reservation {
            ticket,
            request_id: request_id.clone(),
            lease: lease()?,
            held_blocks: 0,
            prompt_tokens,
            deadline,
        });
        let plan = SendPlan {
            endpoint: KvEndpoint::new(self.endpoint.clone()),
            ticket,
            request_id,
            schema: schema(),
            blocks: all_blocks(&*self.source),
            lease: lease()?,
            held_blocks: 0,
            prompt_tokens,
            max_pieces: self.shape.layers(),
            deadline,
        };
        let begin = tokio::time::Instant::now();
        let (sender, sending) = {
            let _entered = self.runtimes.sender.enter();
            KvSender::start(plan, self.source.clone(), self.sender.clone())
        };
        for layer in 0..self.shape.layers() {
            let done = prefill * (layer as u32 + 1) / self.shape.layers() as u32;
            if !done.is_zero() {
                tokio::time::sleep_until(begin + done).await;
            }
            sender.layers().ready(layer, 0..blocks as u32);
        }
        let computed = if prefill.is_zero() { begin.into_std() } else { Instant::now() };
        sender.commit(1);
        let arrived = incoming.ready().await;
        let took = computed.elapsed();
        // If both fail, the sender's error says more.
        sending.await.map_err(io::Error::other)??;
        arrived?;
        incoming.finished();
        Ok(took)
    }

    async fn end(self) {
        self.shutdown.cancel();
        // A panic of the listener's task would not change the results.
        let _ = self.serving.await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn try_out(choice: &str) -> Result<HandoffReport, BenchError> {
        let shape = Shape::of(8 << 20);
        let options = HandoffOptions { choice: choice.parse()?, rounds: 2, ..HandoffOptions::default() };
        handoffs(shape, shape.host_store(), shape.host_store(), &options).await
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn each_way_moves_everything() {
        let report = try_out("tcp").await.unwrap();
        assert!(report.bytes > 4 << 20 && report.transport == KvTransport::Tcp);
        let bare = report.bare.unwrap();
        for cost in [report.memcpy, bare, report.handoff] {
            assert!(cost.bytes_per_second > 0.0 && cost.cpu_seconds_per_gigabyte > 0.0, "{report:?}");
        }
        assert!(report.handoff_to_bare.unwrap() > 0.0 && report.exposed_seconds > 0.0, "{report:?}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_transport_that_is_missing_is_an_error_and_auto_does_without() {
        // Whether this system has RDMA or not.
        assert!(try_out("auto").await.unwrap().handoff.bytes_per_second > 0.0);
        let shape = Shape::of(1);
        let device = Some("no-such-device".parse().unwrap());
        let transports = TransportOptions { rdma_device: device, ..TransportOptions::default() };
        let options = HandoffOptions { choice: TransportChoice::Only(KvTransport::Rdma), transports, rounds: 1 };
        let refused = handoffs(shape, shape.host_store(), shape.host_store(), &options).await;
        assert!(matches!(refused, Err(BenchError::Transport(_))), "{refused:?}");
    }
}
