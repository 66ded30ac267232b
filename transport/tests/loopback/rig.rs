//! Test setup: a KV sender and a KV receiver in one process.

use std::sync::Arc;
use std::time::Duration;

use overfill_kv::handoff::{Failure, Hello};
use overfill_kv::{
    BlockId, BlockLease, BlockPool, KvDtype, KvEndpoint, KvMemory, KvSchema, KvStore, RequestId, RopeSpec, StoreError,
    Ticket, TransferStats,
};
use overfill_net::Listen;
use overfill_transport::{
    HandoffError, IncomingHandoff, KvReceiver, KvSender, MemoryStore, Reservation, SendPlan, TransferConfig,
    tcp::{Dialer, Link, Opening, PlainListener},
};
use parking_lot::{Condvar, Mutex};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Five blocks, the last one partly filled.
const PROMPT_TOKENS: u32 = 70;
const BLOCKS: usize = 5;
const SOURCE_LAYERS: usize = 3;

pub struct Rig {
    pub schema: KvSchema,
    pub config: TransferConfig,
    pub source: Arc<dyn KvStore>,
    pub source_pool: BlockPool,
    pub target: Arc<dyn KvStore>,
    pub target_pool: BlockPool,
    pub receiver: KvReceiver,
    pub endpoint: String,
    pub shutdown: CancellationToken,
    pub serving: JoinHandle<()>,
}

fn schema() -> KvSchema {
    KvSchema {
        // Two of the source's three layers.
        layers: vec![0, 2],
        kv_heads: 2,
        head_dim: 64,
        rope: RopeSpec { theta: 1e4, scaling: "none".into() },
        layer_attention: Vec::new(),
        dtype: KvDtype::F32,
        block_tokens: 16,
        vocab_size: 320,
        tokenizer_sha256: "aa".into(),
        full_model: None,
    }
}

/// Listener whose links use the buffered path, although they run over TCP.
struct Streams(TcpListener);

impl Listen for Streams {
    type Connection = Link;

    async fn accept(&mut self) -> std::io::Result<(Opening, std::net::SocketAddr)> {
        let (stream, peer) = self.0.accept().await?;
        Ok((Box::pin(std::future::ready(Ok(Link::stream(stream)))), peer))
    }
}

async fn serve(
    schema: &KvSchema,
    target: &Arc<dyn KvStore>,
    config: &TransferConfig,
) -> (KvReceiver, JoinHandle<()>, String, CancellationToken) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = listener.local_addr().unwrap().to_string();
    let shutdown = CancellationToken::new();
    let (receiver, serving) =
        KvReceiver::start(PlainListener(listener), schema.clone(), target.clone(), config.clone(), shutdown.clone());
    (receiver, serving, endpoint, shutdown)
}

impl Rig {
    pub async fn new(config: TransferConfig) -> Self {
        Self::with_room(config, 2).await
    }

    /// A rig whose pools hold `requests` prompts.
    pub async fn with_room(config: TransferConfig, requests: usize) -> Self {
        Self::with_schema(config, requests, schema()).await
    }

    /// A rig whose two layers have windows of these lengths in tokens.
    pub async fn with_windows(config: TransferConfig, windows: [Option<usize>; 2]) -> Self {
        let layer_attention = windows.map(|window| schema().rope.of_layer(window)).to_vec();
        Self::with_schema(config, 2, KvSchema { layer_attention, ..schema() }).await
    }

    async fn with_schema(config: TransferConfig, requests: usize, schema: KvSchema) -> Self {
        let room = requests * BLOCKS;
        let source: Arc<dyn KvStore> = Arc::new(MemoryStore::new(SOURCE_LAYERS, room, schema.block_bytes()));
        let target: Arc<dyn KvStore> = Arc::new(MemoryStore::new(schema.layers.len(), room, schema.block_bytes()));
        for layer in 0..SOURCE_LAYERS {
            for block in 0..room {
                source.write(layer, &[BlockId(block as u32)], &mut |_, bytes| fill(bytes, layer, block)).unwrap();
            }
        }
        let (receiver, serving, endpoint, shutdown) = serve(&schema, &target, &config).await;
        let (source_pool, target_pool) = (BlockPool::new(room), BlockPool::new(room));
        Self { schema, config, source, source_pool, target, target_pool, receiver, endpoint, shutdown, serving }
    }

    /// The same rig over buffered links instead of plain sockets.
    pub async fn with_streams(mut self) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        self.endpoint = listener.local_addr().unwrap().to_string();
        self.shutdown = CancellationToken::new();
        self.config.dialer = Dialer::new(|endpoint| {
            Box::pin(async move { Ok(Link::stream(tokio::net::TcpStream::connect(endpoint).await?)) })
        });
        let (schema, target, shutdown) = (self.schema.clone(), self.target.clone(), self.shutdown.clone());
        (self.receiver, self.serving) =
            KvReceiver::start(Streams(listener), schema, target, self.config.clone(), shutdown);
        self
    }

    /// The same rig with the target store wrapped by `wrap`.
    pub async fn with_target(mut self, wrap: impl FnOnce(Arc<dyn KvStore>) -> Arc<dyn KvStore>) -> Self {
        self.target = wrap(self.target);
        (self.receiver, self.serving, self.endpoint, self.shutdown) =
            serve(&self.schema, &self.target, &self.config).await;
        self
    }

    pub fn block_bytes(&self) -> u64 {
        self.schema.block_bytes() as u64
    }

    pub fn reserve(&self, ticket: [u8; 16], held_blocks: u32) -> IncomingHandoff {
        let lease = self.target_pool.allocate(BLOCKS - held_blocks as usize).unwrap();
        self.reserve_with(ticket, held_blocks, lease, Duration::from_secs(20))
    }

    pub fn reserve_any(&self, ticket: [u8; 16]) -> (IncomingHandoff, Vec<BlockId>) {
        let lease = self.target_pool.allocate(BLOCKS).unwrap();
        let blocks = lease.blocks().to_vec();
        (self.reserve_with(ticket, 0, lease, Duration::from_secs(20)), blocks)
    }

    pub fn reserve_with(
        &self,
        ticket: [u8; 16],
        held_blocks: u32,
        lease: BlockLease,
        within: Duration,
    ) -> IncomingHandoff {
        self.receiver.reserve(Reservation {
            ticket: Ticket(ticket),
            request_id: RequestId("r".into()),
            lease: Arc::new(lease),
            held_blocks,
            prompt_tokens: PROMPT_TOKENS,
            deadline: Instant::now() + within,
        })
    }

    pub fn plan(&self, ticket: [u8; 16], held_blocks: u32) -> SendPlan {
        let lease = self.source_pool.allocate(BLOCKS).unwrap();
        SendPlan {
            endpoint: KvEndpoint { address: self.endpoint.clone(), versions: self.schema.protocol() },
            ticket: Ticket(ticket),
            request_id: RequestId("r".into()),
            schema: self.schema.clone(),
            blocks: (0..BLOCKS as u32).map(BlockId).collect(),
            lease: Arc::new(lease),
            held_blocks,
            prompt_tokens: PROMPT_TOKENS,
            max_pieces: 2 * SOURCE_LAYERS,
            deadline: Instant::now() + Duration::from_secs(20),
        }
    }

    pub fn send(
        &self,
        ticket: [u8; 16],
        held_blocks: u32,
    ) -> (KvSender, JoinHandle<Result<TransferStats, HandoffError>>) {
        KvSender::start(self.plan(ticket, held_blocks), self.source.clone(), self.config.clone())
    }

    pub fn announce_all(&self, sender: &KvSender) {
        for layer in 0..SOURCE_LAYERS {
            sender.layers().ready(layer, 0..BLOCKS as u32);
        }
    }

    pub fn hello(&self, ticket: [u8; 16]) -> Hello {
        Hello {
            ticket: Ticket(ticket),
            schema_digest: self.schema.digest(),
            held_blocks: 0,
            prompt_tokens: PROMPT_TOKENS,
        }
    }

    /// Checks that the first request's blocks have the source's content from `first_block` on.
    pub fn check_arrived(&self, first_block: u32) {
        let ids: Vec<BlockId> = (0..(BLOCKS as u32 - first_block)).map(BlockId).collect();
        self.check_blocks(&ids, first_block);
    }

    /// Blocks that are not due must not have been written.
    pub fn check_blocks(&self, ids: &[BlockId], first_block: u32) {
        let due = self.schema.due_blocks(first_block, PROMPT_TOKENS);
        for (wire, (layer, due)) in self.schema.layers.iter().zip(due).enumerate() {
            let check = &mut |i: usize, bytes: &[u8]| {
                let mut expected = vec![0; bytes.len()];
                if due.contains(&(first_block + i as u32)) {
                    fill(&mut expected, *layer as usize, first_block as usize + i);
                }
                assert!(bytes == expected, "layer {layer}, block {i} differs");
            };
            self.target.read(wire, ids, check).unwrap();
        }
    }

    pub fn is_idle(&self) -> bool {
        self.source_pool.in_use() == 0 && self.target_pool.in_use() == 0 && self.receiver.open_handoffs() == 0
    }
}

fn fill(bytes: &mut [u8], layer: usize, block: usize) {
    bytes.iter_mut().enumerate().for_each(|(i, b)| *b = (layer * 101 + block * 7 + i + i / 251) as u8);
}

pub fn failed<T>(failure: Failure) -> Result<T, HandoffError> {
    Err(HandoffError::Failed(failure))
}

/// Waits until `state` is true. The limit ends a test that would hang.
pub async fn until(what: &str, state: impl Fn() -> bool) {
    let wait = async {
        while !state() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait).await.unwrap_or_else(|_| panic!("timed out waiting: {what}"));
}

/// A store that reports device memory, so that `view` and `edit` are not available.
pub struct Staged(pub Arc<dyn KvStore>);

impl KvStore for Staged {
    fn num_layers(&self) -> usize {
        self.0.num_layers()
    }
    fn num_blocks(&self) -> usize {
        self.0.num_blocks()
    }
    fn block_bytes(&self) -> usize {
        self.0.block_bytes()
    }
    fn memory(&self) -> KvMemory {
        KvMemory::Device
    }
    fn read(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &[u8])) -> Result<(), StoreError> {
        self.0.read(layer, blocks, f)
    }
    fn write(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &mut [u8])) -> Result<(), StoreError> {
        self.0.write(layer, blocks, f)
    }
}

/// Blocks a writer in the middle of a write.
#[derive(Clone, Default)]
pub struct Gate(Arc<(Mutex<(bool, bool)>, Condvar)>);

struct Gated {
    gate: Gate,
    inner: Arc<dyn KvStore>,
}

impl Gate {
    pub fn around(&self, inner: Arc<dyn KvStore>) -> Arc<dyn KvStore> {
        Arc::new(Gated { gate: self.clone(), inner })
    }
    pub fn close(&self) {
        self.0.0.lock().0 = true;
    }
    pub fn is_held(&self) -> bool {
        self.0.0.lock().1
    }
    pub fn open(&self) {
        self.0.0.lock().0 = false;
        self.0.1.notify_all();
    }
    fn pass(&self) {
        let mut state = self.0.0.lock();
        while state.0 {
            state.1 = true;
            self.0.1.wait(&mut state);
        }
        state.1 = false;
    }
}

impl KvStore for Gated {
    fn num_layers(&self) -> usize {
        self.inner.num_layers()
    }
    fn num_blocks(&self) -> usize {
        self.inner.num_blocks()
    }
    fn block_bytes(&self) -> usize {
        self.inner.block_bytes()
    }
    fn memory(&self) -> KvMemory {
        KvMemory::Device
    }
    fn read(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &[u8])) -> Result<(), StoreError> {
        self.inner.read(layer, blocks, f)
    }
    fn write(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &mut [u8])) -> Result<(), StoreError> {
        self.gate.pass();
        self.inner.write(layer, blocks, f)
    }
}
