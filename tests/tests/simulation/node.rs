//! Nodes of the simulated cluster: the real services and the real transport around a simulated engine.

use std::{sync::Arc, time::Duration};

use overfill_cluster::{
    Drain, LoadState, NodeMetrics, Shutdown,
    discovery::{Members, Registration},
    grpc::{self, NODE_CONNECTIONS},
    http,
};
use overfill_decode_node::{engine as decode_engine, request as decode_request, service::DecodeService};
use overfill_kv::{BLOCK_TOKENS, BlockPool, KvSchema, Role};
use overfill_prefill_node::{
    engine as prefill_engine, job::HandoffContext, request as prefill_request, service::PrefillService,
};
use overfill_proto::v1::{self, decode_server::DecodeServer, prefill_server::PrefillServer};
use overfill_transport::{Dialer, KvReceiver, TransferConfig};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use turmoil::net::TcpListener;

use crate::{
    MAX_ASKED,
    content::{FILES, FULL, LAYERS, PRUNED, schema},
    decode::{self, Decoder},
    guard::{Guard, Witness},
    net::{GRPC_PORT, GrpcListener, KV_PORT, KvListener, Tap, listen},
    pace::Pace,
    prefill,
};

/// How long a node waits for clients that do not read their last words, as the real ones do.
const LAST_WORDS: Duration = Duration::from_secs(5);

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
pub struct Place {
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

/// The parts that both roles have.
struct Parts {
    info: v1::NodeInfo,
    schema: KvSchema,
    pool: BlockPool,
    guard: Arc<Guard>,
    load: Arc<LoadState>,
    shutdown: Shutdown,
    drain: Drain,
}

impl Place {
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

    fn parts(
        &self,
        receiving: impl FnOnce(&BlockPool, &Arc<Guard>) -> Option<KvReceiver>,
    ) -> Result<Parts, overfill_cluster::MetricsError> {
        let Size { blocks, max_running, .. } = self.size;
        let all: Vec<u32> = (0..LAYERS).collect();
        let (role, model, layers) = match self.role {
            Role::Prefill => (v1::Role::Prefill, FULL, &all),
            Role::Decode => (v1::Role::Decode, PRUNED, &self.size.layers),
        };
        let schema = schema(layers);
        let pool = BlockPool::new(blocks);
        let guard = Guard::new(&self.name, layers, &pool, self.around.damage, &self.around.witness);
        let receiver = receiving(&pool, &guard);
        let kv_endpoint = receiver.as_ref().map(|_| format!("{}:{KV_PORT}", self.name));
        let counted = receiver.map(|receiver| -> overfill_cluster::load::Receiving {
            Box::new(move || (receiver.open_handoffs(), receiver.stranded_bytes()))
        });
        let load = LoadState::new(pool.clone(), NodeMetrics::new(model)?, counted, Duration::MAX);
        let info = v1::NodeInfo {
            node_id: self.name.clone(),
            incarnation: format!("{:016x}", rand::random::<u64>()),
            role: role.into(),
            model: model.into(),
            kv_schema: Some((&schema).into()),
            max_context_tokens: (blocks * BLOCK_TOKENS) as u32,
            total_blocks: blocks as u32,
            max_running_requests: max_running as u32,
            kv_endpoint: kv_endpoint.clone().unwrap_or_default(),
            version: "0".into(),
            weights: "f32".into(),
            eos_token_ids: vec![overfill_simulated::EOS],
        };
        let registration = Registration {
            role: self.role,
            node_id: self.name.clone(),
            incarnation: info.incarnation.clone(),
            grpc: format!("{}:{GRPC_PORT}", self.name),
            kv: kv_endpoint,
            model: model.into(),
            full_model: schema.full_model.clone(),
            kv_schema_digest: schema.digest_hex(),
            total_blocks: info.total_blocks,
            max_running_requests: info.max_running_requests,
            max_context_tokens: info.max_context_tokens,
            version: info.version.clone(),
        };
        let shutdown = Shutdown::new();
        let drain = Drain::new(&shutdown, Duration::from_secs(2));
        let (asked, mut asks) = mpsc::channel(MAX_ASKED);
        let begins = drain.clone();
        tokio::spawn(async move {
            while let Some(time) = asks.recv().await {
                begins.begin(Some(time));
            }
        });
        let process =
            Process { pool: pool.clone(), load: load.clone(), registration: registration.clone(), drain: asked };
        *self.process.lock() = Some(process);
        self.around.members.send_modify(|members| drop(members.insert(self.key(), registration)));
        Ok(Parts { info, schema, pool, guard, load, shutdown, drain })
    }

    async fn prefill(self) -> turmoil::Result {
        let listener = listen(GRPC_PORT).await?;
        let Parts { info, schema, pool, guard, load, shutdown, drain } = self.parts(|_, _| None)?;
        let Size { max_running, max_waiting, max_batch_tokens, blocks, .. } = self.size;
        let limits = prefill_engine::Limits {
            max_batch_tokens,
            // The simulated engine's steps take as long as its tokens say.
            step_target: Duration::MAX,
            max_running,
            max_waiting,
        };
        let (handle, jobs) = prefill_engine::queue(load.clone(), FULL.into(), max_waiting);
        let context = HandoffContext {
            runtime: tokio::runtime::Handle::current(),
            store: guard.clone(),
            config: self.around.transfer.clone(),
            load: load.clone(),
        };
        let engine = prefill::Engine { jobs, context, pool, limits, guard, pace: self.pace.clone() };
        let engine = tokio::task::spawn_local(engine.run());
        let service = PrefillService {
            engine: handle,
            limits: prefill_request::RequestLimits {
                schema,
                max_context_tokens: blocks * BLOCK_TOKENS,
                default_deadline: Duration::from_secs(60),
                incarnation: info.incarnation.clone(),
            },
            info,
            files: Arc::new(FILES.clone()),
            load: load.clone(),
            shutdown: shutdown.clone(),
            drain,
        };
        let server = self.serve(listener, Routes::new(PrefillServer::new(service)), &load, &shutdown);
        tokio::select! {
            () = server => {}
            () = abandoned(&load, &shutdown) => return Ok(()),
        }
        engine.await?;
        Ok(())
    }

    async fn decode(self) -> turmoil::Result {
        let listener = listen(GRPC_PORT).await?;
        let kv = KvListener(listen(KV_PORT).await?);
        let stop = CancellationToken::new();
        let mut receiving = None;
        let Parts { info, schema, pool, guard, load, shutdown, drain } = self.parts(|_, guard| {
            let (own, config) = (crate::content::schema(&self.size.layers), self.around.transfer.clone());
            let (receiver, task) = KvReceiver::start(kv, own, guard.clone(), config, stop.clone());
            receiving = Some((receiver.clone(), task));
            Some(receiver)
        })?;
        let Some((receiver, receiving)) = receiving else { return Err("nobody receives KV".into()) };
        let Size { max_running, max_waiting, blocks, .. } = self.size;
        let decoder = Decoder {
            guard: guard.clone(),
            layers: self.size.layers.clone(),
            name: self.name.clone(),
            witness: self.around.witness.clone(),
        };
        let limits = decode_engine::Limits { max_running, max_waiting };
        let (handle, engine) = decode_engine::Engine::new(decoder, guard.memory.clone(), pool, load.clone(), limits);
        let end = CancellationToken::new();
        let engine = tokio::task::spawn_local(decode::run(engine, guard, self.pace.clone(), end.clone()));
        let service = DecodeService {
            engine: handle,
            limits: decode_request::RequestLimits {
                schema,
                max_context_tokens: blocks * BLOCK_TOKENS,
                default_deadline: Duration::from_secs(60),
                incarnation: info.incarnation.clone(),
            },
            info,
            receiver,
            load: load.clone(),
            shutdown: shutdown.clone(),
            drain,
        };
        let server = self.serve(listener, Routes::new(DecodeServer::new(service)), &load, &shutdown);
        tokio::select! {
            () = server => {}
            () = abandoned(&load, &shutdown) => return Ok(()),
        }
        end.cancel();
        engine.await?;
        stop.cancel();
        receiving.await?;
        Ok(())
    }

    fn serve(
        &self,
        listener: TcpListener,
        routes: Routes,
        load: &Arc<LoadState>,
        shutdown: &Shutdown,
    ) -> impl Future<Output = ()> + use<> {
        let (listener, limits) = (GrpcListener(listener), grpc::limits(NODE_CONNECTIONS));
        http::serve(listener, routes.into_axum_router(), limits, self.until_drained(load, shutdown))
    }

    /// Resolves when the node takes nothing new any more; it is no longer registered then.
    fn until_drained(&self, load: &Arc<LoadState>, shutdown: &Shutdown) -> impl Future<Output = ()> + use<> {
        let (load, shutdown, members, key) = (load.clone(), shutdown.clone(), self.around.members.clone(), self.key());
        async move {
            shutdown.cancelled().await;
            load.drain();
            members.send_modify(|members| drop(members.remove(&key)));
        }
    }
}

/// Resolves when a node that drains has nothing left to wait for but clients who do not read their last words.
async fn abandoned(load: &LoadState, shutdown: &Shutdown) {
    shutdown.cancelled().await;
    load.drained().await;
    tokio::time::sleep(LAST_WORDS).await;
}

/// How a simulation's nodes transfer KV.
pub fn transfer(idle: Duration, hello: Duration, max_frame_bytes: usize, dialer: Dialer) -> TransferConfig {
    TransferConfig { idle_timeout: idle, hello_timeout: hello, max_frame_bytes, max_connections: 64, dialer }
}
