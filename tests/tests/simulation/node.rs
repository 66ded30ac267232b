//! Nodes of the simulated cluster: the real services and the real transport around a simulated engine.

use std::{sync::Arc, time::Duration};

use overfill_cluster::{
    Shutdown,
    discovery::{Members, Registration},
};
use overfill_decode_node::{engine as decode_engine, service::DecodeService};
use overfill_kv::{BLOCK_TOKENS, BlockPool, KvEndpoint, Role};
use overfill_node::{
    Identity, LoadState, NodeCore, NodeError, NodeMetrics, RoleService, Served, load::Receiving, new_incarnation,
};
use overfill_prefill_node::{engine as prefill_engine, job::HandoffContext, service::PrefillService};
use overfill_transport::{KvReceiver, TransferConfig, tcp};
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use turmoil::net::TcpListener;

use crate::{
    MAX_ASKED,
    content::{FILES, FULL, LAYERS, PRUNED, schema},
    decode::{self, Decoder},
    guard::{Guard, Witness},
    net::{GRPC_PORT, GrpcListener, KV_PORT, KvListener, Tap, listen},
    pace::Pace,
    prefill::{self, LateLayers, Prefiller},
};

/// For requests without a deadline of their own.
const DEADLINE: Duration = Duration::from_secs(60);

/// What a node is like.
#[derive(Clone, Debug)]
pub struct Size {
    /// KV blocks.
    pub blocks: usize,
    /// Most requests that hold blocks.
    pub max_running: usize,
    /// Most that wait.
    pub max_waiting: usize,
    /// Most prompt tokens in one step.
    pub max_batch_tokens: usize,
    /// Time for a token, or for a layer of a chunk.
    pub step: Duration,
    /// The full model's layers that a decode node uses.
    pub layers: Vec<u32>,
}

/// What all nodes of a simulation share.
#[derive(Clone)]
pub struct Surroundings {
    /// Hears of violations.
    pub witness: Witness,
    /// Sees KV connections.
    pub tap: Tap,
    /// How KV is sent.
    pub transfer: TransferConfig,
    /// May KV be damaged on its way?
    pub damage: bool,
    /// Where nodes register.
    pub members: Arc<watch::Sender<Members>>,
}

/// A node, as its host starts it again and again.
#[derive(Clone)]
pub struct SimulatedHost {
    /// Name of host and node.
    pub name: String,
    /// What it does.
    pub role: Role,
    /// What it is like.
    pub size: Size,
    /// How fast it is.
    pub pace: Pace,
    /// What it shares.
    pub around: Surroundings,
    /// What runs there now, if anything does.
    pub process: Arc<Mutex<Option<Process>>>,
}

/// A running node, from outside.
pub struct Process {
    /// Its blocks.
    pub pool: BlockPool,
    /// What it is doing.
    pub load: Arc<LoadState>,
    /// What it registers.
    pub registration: Registration,
    /// Tells it to drain within this time.
    pub drain: mpsc::Sender<Duration>,
}

impl SimulatedHost {
    /// A node that runs nowhere yet.
    pub fn new(name: String, role: Role, size: Size, around: &Surroundings) -> Self {
        let pace = Pace::new(size.step);
        Self { name, role, size, pace, around: around.clone(), process: Arc::default() }
    }

    /// What the host runs.
    pub async fn run(self) -> turmoil::Result {
        match self.role {
            Role::Prefill => self.prefill().await,
            Role::Decode => self.decode().await,
        }
    }

    /// The name under which etcd has it.
    pub fn key(&self) -> String {
        format!("{}/{}", self.role, self.name)
    }

    /// What the node is, and what it is doing.
    fn core(
        &self,
        pool: &BlockPool,
        receiver: Option<&KvReceiver>,
    ) -> Result<NodeCore, overfill_cluster::MetricsError> {
        let (model, schema) = match self.role {
            Role::Prefill => (FULL, schema(&(0..LAYERS).collect::<Vec<_>>())),
            Role::Decode => (PRUNED, schema(&self.size.layers)),
        };
        let counted = receiver
            .cloned()
            .map(|receiver| -> Receiving { Box::new(move || (receiver.open_handoffs(), receiver.stranded_bytes())) });
        let load = LoadState::new(pool.clone(), NodeMetrics::new(model)?, counted, Duration::MAX);
        let identity = Identity {
            role: self.role,
            node_id: self.name.clone(),
            incarnation: new_incarnation(),
            model: model.into(),
            schema,
            max_context_tokens: self.size.blocks * BLOCK_TOKENS,
            total_blocks: self.size.blocks,
            max_running: self.size.max_running,
            kv_endpoint: receiver.map(|_| KvEndpoint::Tcp(format!("{}:{KV_PORT}", self.name))),
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
            // The simulated engine's steps take as long as its tokens say.
            step_target: Duration::MAX,
            max_running,
            max_waiting,
        };
        let context = HandoffContext {
            runtime: tokio::runtime::Handle::current(),
            store: guard.clone(),
            config: self.around.transfer.clone(),
            load: core.load.clone(),
        };
        let late = LateLayers::default();
        let prefiller = Prefiller { guard: guard.clone(), late: late.clone() };
        let (handle, engine) = prefill_engine::Engine::new(prefiller, FULL.into(), pool, limits, context);
        let engine = tokio::task::spawn_local(prefill::run(engine, guard, late, self.pace.clone()));
        let service = PrefillService {
            engine: handle,
            limits: core.request_limits(DEADLINE),
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
        let (own, config) = (schema(&self.size.layers), self.around.transfer.clone());
        let (receiver, receiving) = KvReceiver::start(kv, own, guard.clone(), config, stop.clone());
        let core = self.core(&pool, Some(&receiver))?;
        let decoder = Decoder {
            guard: guard.clone(),
            layers: self.size.layers.clone(),
            name: self.name.clone(),
            witness: self.around.witness.clone(),
        };
        let limits = decode_engine::EngineLimits { max_running, max_waiting };
        let load = core.load.clone();
        let (handle, engine) = decode_engine::Engine::new(decoder, guard.memory.clone(), pool, load, limits);
        let engine = tokio::task::spawn_local(decode::run(engine, guard, self.pace.clone()));
        let service =
            DecodeService { engine: handle, limits: core.request_limits(DEADLINE), receiver, core: core.clone() };
        if serve(&core, listener, service.into_role_service(), engine).await? == Served::Drained {
            stop.cancel();
            receiving.await?;
        }
        Ok(())
    }
}

/// Serves until the node has drained. `engine` ends with the last way into it.
async fn serve(
    core: &NodeCore,
    listener: TcpListener,
    service: RoleService,
    engine: JoinHandle<()>,
) -> Result<Served, NodeError> {
    let (ended, mut end) = oneshot::channel::<()>();
    tokio::task::spawn_local(async move {
        let _ended = ended;
        let _ = engine.await;
    });
    core.serve(GrpcListener(listener), service, &mut end).await
}

/// How a simulation's nodes transfer KV.
pub fn transfer(idle: Duration, hello: Duration, max_frame_bytes: usize, dialer: tcp::Dialer) -> TransferConfig {
    TransferConfig { idle_timeout: idle, hello_timeout: hello, max_frame_bytes, max_connections: 64, dialer }
}
