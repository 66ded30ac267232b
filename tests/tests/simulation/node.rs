//! Nodes of the simulated cluster: real services and transport around a simulated engine.

use std::{error::Error, sync::Arc, time::Duration};

use overfill_cluster::{
    Shutdown,
    discovery::{Members, Registration},
};
use overfill_decode_node::{
    engine as decode_engine,
    service::{DecodeService, ExtendedRequests},
};
use overfill_kv::{BLOCK_TOKENS, BlockPool, KvEndpoint, Role};
use overfill_node::{
    Identity, LoadState, NodeCore, NodeMetrics, RoleService, Served, load::Receiving, new_incarnation,
};
use overfill_prefill_node::{
    engine as prefill_engine, extension::OpenLimits, handoff::HandoffContext, service::PrefillService,
};
use overfill_transport::{KvReceiver, TransferConfig, Transports, tcp};
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use turmoil::net::TcpListener;

use crate::{
    MAX_ASKED,
    content::{FILES, FULL, LAYERS, LayerWindows, PRUNED, schema},
    decode::{self, Decoder},
    guard::{Guard, Witness},
    net::{GRPC_PORT, GrpcListener, KV_PORT, KvListener, Tap, listen},
    pace::Pace,
    prefill::{self, LateLayers, Prefiller},
};

/// Longest idle time of an open prefill. Short, so that some end.
const OPEN_IDLE: Duration = Duration::from_millis(300);

/// Default deadline of requests.
const DEADLINE: Duration = Duration::from_secs(60);

/// Capacity and speed of a node.
#[derive(Clone, Debug)]
pub struct Size {
    /// Number of KV blocks.
    pub blocks: usize,
    /// Maximum number of requests that hold blocks.
    pub max_running: usize,
    /// Maximum number of waiting requests.
    pub max_waiting: usize,
    /// Maximum number of prompt tokens per step.
    pub max_batch_tokens: usize,
    /// Time per token, or per layer of a chunk.
    pub step: Duration,
    /// Layers of the full model that decode nodes use.
    pub layers: Vec<u32>,
    /// Sliding windows of the full model's layers.
    pub windows: LayerWindows,
}

/// Resources shared by all nodes of a simulation.
#[derive(Clone)]
pub struct Surroundings {
    /// Receives reports of violations.
    pub witness: Witness,
    /// Records KV connections.
    pub tap: Tap,
    /// Settings of the KV transport.
    pub transfer: TransferConfig,
    /// Whether KV may be damaged in transit.
    pub damage: bool,
    /// Registry of the nodes.
    pub members: Arc<watch::Sender<Members>>,
}

/// A node's host, which starts the node repeatedly.
#[derive(Clone)]
pub struct SimulatedHost {
    /// Name of host and node.
    pub name: String,
    /// Role of the node.
    pub role: Role,
    /// Capacity and speed of the node.
    pub size: Size,
    /// Current speed of the engine.
    pub pace: Pace,
    /// Resources shared with other nodes.
    pub around: Surroundings,
    /// The running node, if any.
    pub process: Arc<Mutex<Option<Process>>>,
}

/// Handle of a running node.
pub struct Process {
    /// KV blocks of the node.
    pub pool: BlockPool,
    /// Load of the node.
    pub load: Arc<LoadState>,
    /// Registration of the node.
    pub registration: Registration,
    /// Asks the node to drain within this time.
    pub drain: mpsc::Sender<Duration>,
}

impl SimulatedHost {
    /// Creates a host whose node does not run yet.
    pub fn new(name: String, role: Role, size: Size, around: &Surroundings) -> Self {
        let pace = Pace::new(size.step);
        Self { name, role, size, pace, around: around.clone(), process: Arc::default() }
    }

    /// Runs the node. The host calls it at each start.
    pub async fn run(self) -> turmoil::Result {
        match self.role {
            Role::Prefill => self.prefill().await,
            Role::Decode => self.decode().await,
        }
    }

    /// Key of the node in etcd.
    pub fn key(&self) -> String {
        format!("{}/{}", self.role, self.name)
    }

    /// Creates the core of the node's service: its description and state.
    fn core(
        &self,
        pool: &BlockPool,
        receiver: Option<&KvReceiver>,
    ) -> Result<NodeCore, overfill_cluster::MetricsError> {
        let (model, schema) = match self.role {
            Role::Prefill => (FULL, schema(&(0..LAYERS).collect::<Vec<_>>(), &self.size.windows)),
            Role::Decode => (PRUNED, schema(&self.size.layers, &self.size.windows)),
        };
        let counted = receiver
            .cloned()
            .map(|receiver| -> Receiving { Box::new(move || (receiver.open_handoffs(), receiver.stranded_bytes())) });
        let load = LoadState::new(pool.clone(), NodeMetrics::new(model, "pool")?, counted, Duration::MAX);
        let identity = Identity {
            role: self.role,
            node_id: self.name.clone(),
            incarnation: new_incarnation(),
            pool: "pool".into(),
            cluster: String::new(),
            model: model.into(),
            variants: Vec::new(),
            schema,
            max_context_tokens: self.size.blocks * BLOCK_TOKENS,
            total_blocks: self.size.blocks,
            max_running: self.size.max_running,
            kv_endpoint: receiver.map(|_| KvEndpoint::new(format!("{}:{KV_PORT}", self.name))),
            kv_transports: "tcp".into(),
            weights: "f32".into(),
            eos_token_ids: vec![overfill_simulated::EOS],
        };
        let core = NodeCore::new(identity, load, &Shutdown::new(), Duration::from_secs(2));
        let registration = core.identity.registration(format!("{}:{GRPC_PORT}", self.name));
        let (asked, mut asks) = mpsc::channel(MAX_ASKED);
        let begins = core.drain.clone();
        tokio::spawn(async move {
            while let Some(time) = asks.recv().await {
                begins.begin(Some(time));
            }
        });
        let load = core.load.clone();
        let process = Process { pool: pool.clone(), load, registration: registration.clone(), drain: asked };
        *self.process.lock() = Some(process);
        self.around.members.send_modify(|members| drop(members.insert(self.key(), registration)));
        let (shutdown, members, key) = (core.shutdown.clone(), self.around.members.clone(), self.key());
        tokio::spawn(async move {
            shutdown.cancelled().await;
            members.send_modify(|members| drop(members.remove(&key)));
        });
        Ok(core)
    }

    fn guard(&self, layers: &[u32], pool: &BlockPool) -> Arc<Guard> {
        Guard::new(&self.name, layers, pool, self.around.damage, &self.around.witness)
    }

    async fn prefill(self) -> turmoil::Result {
        let listener = listen(GRPC_PORT).await?;
        let Size { max_running, max_waiting, max_batch_tokens, blocks, .. } = self.size;
        let pool = BlockPool::new(blocks);
        let guard = self.guard(&(0..LAYERS).collect::<Vec<_>>(), &pool);
        let core = self.core(&pool, None)?;
        let limits = prefill_engine::EngineLimits {
            max_batch_tokens,
            // Steps of the simulated engine take a fixed time per token.
            step_target: Duration::MAX,
            max_running,
            max_waiting,
            open: OpenLimits { max_blocks: blocks / 2, max_idle: OPEN_IDLE },
        };
        let context = HandoffContext {
            runtime: tokio::runtime::Handle::current(),
            store: guard.clone(),
            pool,
            config: self.around.transfer.clone(),
            load: core.load.clone(),
        };
        let late = LateLayers::default();
        let prefiller = Prefiller { guard: guard.clone(), late: late.clone() };
        let (handle, engine) = prefill_engine::Engine::new(prefiller, FULL.into(), limits, context);
        let engine = tokio::task::spawn_local(prefill::run(engine, guard, late, self.pace.clone()));
        let service = PrefillService {
            engine: handle,
            limits: core.request_limits(DEADLINE),
            constraints: core.constraints(Arc::new(FILES.clone())),
            files: Arc::new(FILES.clone()),
            core: core.clone(),
        };
        serve(&core, listener, service.into_role_service(), engine).await?;
        Ok(())
    }

    async fn decode(self) -> turmoil::Result {
        let listener = listen(GRPC_PORT).await?;
        let kv = KvListener(listen(KV_PORT).await?);
        let stop = CancellationToken::new();
        let Size { max_running, max_waiting, blocks, .. } = self.size;
        let pool = BlockPool::new(blocks);
        let guard = self.guard(&self.size.layers, &pool);
        let (own, config) = (schema(&self.size.layers, &self.size.windows), self.around.transfer.clone());
        let windows = own.windows();
        let (receiver, receiving) = KvReceiver::start(kv, own, guard.clone(), config, stop.clone());
        let core = self.core(&pool, Some(&receiver))?;
        let decoder = Decoder {
            guard: guard.clone(),
            layers: self.size.layers.clone(),
            windows: self.size.windows,
            name: self.name.clone(),
            witness: self.around.witness.clone(),
        };
        let limits = decode_engine::EngineLimits { max_running, max_waiting, windows };
        let load = core.load.clone();
        let (handle, engine) = decode_engine::Engine::new(decoder, guard.memory.clone(), pool, load, limits);
        let engine = tokio::task::spawn_local(decode::run(engine, guard, self.pace.clone()));
        let constraints = core.constraints(Arc::new(FILES.clone()));
        let limits = core.request_limits(DEADLINE);
        let service = DecodeService {
            engine: handle,
            limits,
            constraints,
            receiver,
            core: core.clone(),
            extended: ExtendedRequests::default(),
        };
        if serve(&core, listener, service.into_role_service(), engine).await? == Served::Drained {
            stop.cancel();
            receiving.await?;
        }
        Ok(())
    }
}

/// Serves until the node has drained. The engine ends when all its handles are dropped.
async fn serve(
    core: &NodeCore,
    listener: TcpListener,
    service: RoleService,
    engine: JoinHandle<()>,
) -> Result<Served, Box<dyn Error>> {
    let (ended, mut end) = oneshot::channel::<()>();
    let engine = tokio::task::spawn_local(async move {
        let _ended = ended;
        engine.await
    });
    let served = core.serve(GrpcListener(listener), service, &mut end).await?;
    if served == Served::Drained {
        // A panic of the engine fails the simulation, also while the node drains.
        engine.await??;
    }
    Ok(served)
}

/// Returns the settings of the KV transport.
pub fn transfer(idle: Duration, hello: Duration, max_frame_bytes: usize, dialer: tcp::Dialer) -> TransferConfig {
    TransferConfig {
        idle_timeout: idle,
        hello_timeout: hello,
        max_frame_bytes,
        max_connections: 64,
        dialer,
        transports: Transports::tcp(),
    }
}
