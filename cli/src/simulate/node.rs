//! A simulated node: the shipped services, scheduler and KV transport around a model that only takes time.

use std::{sync::Arc, time::Duration};

use anyhow::Result;
use overfill_cluster::{Shutdown, discovery::Registration};
use overfill_decode_node::{
    engine as decode_engine,
    service::{DecodeService, ExtendedRequests},
};
use overfill_kv::{
    BLOCK_TOKENS, BlockId, BlockPool, KvDtype, KvEndpoint, KvMemory, KvSchema, KvStore, Role, RopeSpec, StoreError,
};
use overfill_node::{Identity, LoadState, NodeCore, NodeMetrics, RoleService, load::Receiving, new_incarnation};
use overfill_prefill_node::{
    engine as prefill_engine, extension::OpenLimits, handoff::HandoffContext, service::PrefillService,
};
use overfill_simulated::Options;
use overfill_text::TextFiles;
use overfill_transport::{KvReceiver, TransferConfig};
use tokio::{
    sync::oneshot,
    task::{AbortHandle, JoinHandle},
};
use tokio_util::sync::CancellationToken;

use super::{
    network::{GrpcPort, KvPort, Network, Port, Uplink},
    steps::{Decoder, LAYERS, Prefiller, Steps},
};
use crate::plan::cluster::EngineLimits;

/// Name under which clients ask for the model.
pub const MODEL: &str = "model";
/// Name and fingerprint of the full model.
const FULL: &str = "full";
/// KV of one token in one layer, in bytes: keys and values of one head with two numbers of four bytes.
const ROW_BYTES: usize = 16;
/// KV bytes that travel for one token.
pub const TOKEN_BYTES: usize = ROW_BYTES * LAYERS as usize;
const GRPC_PORT: u16 = 7000;
const KV_PORT: u16 = 7001;

/// What all nodes of a role have in common.
#[derive(Clone)]
pub struct NodeSetup {
    /// Role of the nodes.
    pub role: Role,
    /// How long steps take.
    pub steps: Steps,
    /// Capacity of the KV cache in blocks.
    pub kv_blocks: usize,
    /// Limits of the engines.
    pub limits: EngineLimits,
    /// Maximum number of requests that wait on a node.
    pub max_waiting: usize,
    /// Speed of the KV of a node, in bytes of the simulated transfer per second of the clock.
    pub kv_bytes_per_second: f64,
    /// Longest silence in a handoff.
    pub idle_timeout: Duration,
    /// Time limit of requests without a deadline, and of a drain.
    pub deadline: Duration,
    /// The connections.
    pub network: Network,
    /// Tokenizer and template.
    pub files: Arc<TextFiles>,
}

/// A running node.
pub struct Node {
    /// The node as discovery lists it.
    pub registration: Registration,
    /// Its load.
    pub load: Arc<LoadState>,
    shutdown: Shutdown,
    off: CancellationToken,
    served: JoinHandle<()>,
    engine: AbortHandle,
}

impl Node {
    /// Asks the node to drain.
    pub fn drain(&self) {
        self.shutdown.begin();
    }

    /// Whether a node that was asked to drain has ended.
    pub fn has_ended(&self) -> bool {
        self.served.is_finished()
    }

    /// The node is gone from one moment to the next. Its peers see that connections are reset.
    pub fn kill(&self) {
        self.engine.abort();
        self.served.abort();
        self.off.cancel();
    }
}

impl NodeSetup {
    /// Starts a node.
    ///
    /// # Errors
    /// Metrics can't be created.
    pub fn start(&self, name: &str) -> Result<Node> {
        match self.role {
            Role::Prefill => self.prefill(name),
            Role::Decode => self.decode(name),
        }
    }

    fn core(&self, name: &str, pool: &BlockPool, receiver: Option<&KvReceiver>) -> Result<NodeCore> {
        let (model, max_running) = match self.role {
            Role::Prefill => (FULL, self.limits.prefill_running),
            Role::Decode => (MODEL, self.limits.decode_running),
        };
        let pool_name = self.role.as_str();
        let receiving = receiver
            .cloned()
            .map(|receiver| -> Receiving { Box::new(move || (receiver.open_handoffs(), receiver.stranded_bytes())) });
        let load = LoadState::new(pool.clone(), NodeMetrics::new(model, pool_name)?, receiving, Duration::MAX);
        let identity = Identity {
            role: self.role,
            node_id: name.into(),
            incarnation: new_incarnation(),
            pool: pool_name.into(),
            cluster: String::new(),
            model: model.into(),
            variants: Vec::new(),
            schema: schema(),
            max_context_tokens: self.kv_blocks * BLOCK_TOKENS,
            total_blocks: self.kv_blocks,
            max_running,
            kv_endpoint: receiver.map(|_| KvEndpoint::new(format!("{name}:{KV_PORT}"))),
            kv_transports: "tcp".into(),
            weights: String::new(),
            eos_token_ids: vec![overfill_simulated::EOS],
        };
        Ok(NodeCore::new(identity, load, &Shutdown::new(), self.deadline))
    }

    fn transfer(&self, off: &CancellationToken) -> TransferConfig {
        let uplink = Uplink::new(self.kv_bytes_per_second);
        TransferConfig {
            idle_timeout: self.idle_timeout,
            hello_timeout: self.idle_timeout,
            dialer: self.network.kv_dialer(&uplink, off),
            ..TransferConfig::default()
        }
    }

    fn prefill(&self, name: &str) -> Result<Node> {
        let off = CancellationToken::new();
        let listener = self.network.listen(format!("{name}:{GRPC_PORT}"), &off);
        let pool = BlockPool::new(self.kv_blocks);
        let core = self.core(name, &pool, None)?;
        let limits = prefill_engine::EngineLimits {
            max_batch_tokens: self.limits.max_batch_tokens,
            step_target: self.steps.clock.real(self.limits.step_target.as_secs_f64()),
            max_running: self.limits.prefill_running,
            max_waiting: self.max_waiting,
            open: OpenLimits { max_blocks: self.kv_blocks / 2, max_idle: self.deadline },
        };
        let context = HandoffContext {
            runtime: tokio::runtime::Handle::current(),
            store: Arc::new(NoKv { blocks: self.kv_blocks }),
            pool,
            config: self.transfer(&off),
            load: core.load.clone(),
        };
        let model = Prefiller::new(self.steps.clone());
        let (handle, engine) = prefill_engine::Engine::new(model.clone(), FULL.into(), limits, context);
        let engine = tokio::spawn(model.drive(engine, core.load.clone()));
        let limits = core.request_limits(self.deadline);
        let service = PrefillService {
            engine: handle,
            limits,
            constraints: core.constraints(self.files.clone()),
            files: self.files.clone(),
            core: core.clone(),
        };
        Ok(serve(name, core, listener, service.into_role_service(), engine, off))
    }

    fn decode(&self, name: &str) -> Result<Node> {
        let off = CancellationToken::new();
        let listener = self.network.listen(format!("{name}:{GRPC_PORT}"), &off);
        let kv = KvPort(self.network.listen(format!("{name}:{KV_PORT}"), &off));
        let pool = BlockPool::new(self.kv_blocks);
        let store = Arc::new(NoKv { blocks: self.kv_blocks });
        let (receiver, _receiving) =
            KvReceiver::start(kv, schema(), store.clone(), self.transfer(&off), off.child_token());
        let core = self.core(name, &pool, Some(&receiver))?;
        let model = Decoder::new(self.steps.clone());
        let limits = decode_engine::EngineLimits {
            max_running: self.limits.decode_running,
            max_waiting: self.max_waiting,
            windows: schema().windows(),
        };
        let (handle, engine) = decode_engine::Engine::new(model.clone(), store, pool, core.load.clone(), limits);
        let engine = tokio::spawn(model.drive(engine, core.load.clone()));
        let limits = core.request_limits(self.deadline);
        let service = DecodeService {
            engine: handle,
            limits,
            constraints: core.constraints(self.files.clone()),
            receiver,
            core: core.clone(),
            extended: ExtendedRequests::default(),
        };
        Ok(serve(name, core, listener, service.into_role_service(), engine, off))
    }
}

fn serve(
    name: &str,
    core: NodeCore,
    listener: Port,
    service: RoleService,
    engine: JoinHandle<()>,
    off: CancellationToken,
) -> Node {
    let (registration, load, shutdown) =
        (core.identity.registration(format!("{name}:{GRPC_PORT}")), core.load.clone(), core.shutdown.clone());
    let (abort, end_of_node) = (engine.abort_handle(), off.clone());
    let served = tokio::spawn(async move {
        let (ended, mut end) = oneshot::channel::<()>();
        tokio::spawn(async move {
            let _ended = ended;
            // An engine that was aborted has ended as well.
            let _ = engine.await;
        });
        // The error says that the engine has ended, which happens when the node is killed.
        let _ = core.serve(GrpcPort(listener), service, &mut end).await;
        end_of_node.cancel();
    });
    Node { registration, load, shutdown, off, served, engine: abort }
}

/// Schema of the KV of all nodes.
fn schema() -> KvSchema {
    KvSchema {
        layers: (0..LAYERS).collect(),
        kv_heads: 1,
        head_dim: (ROW_BYTES / 8) as u32,
        rope: RopeSpec { theta: 1e4, scaling: "none".into() },
        layer_attention: Vec::new(),
        dtype: KvDtype::F32,
        block_tokens: BLOCK_TOKENS as u32,
        full_model: Some(FULL.into()),
        ..Options::default().schema
    }
}

/// A KV cache without memory: reads give zeros, writes are lost.
struct NoKv {
    blocks: usize,
}

impl KvStore for NoKv {
    fn num_layers(&self) -> usize {
        LAYERS as usize
    }

    fn num_blocks(&self) -> usize {
        self.blocks
    }

    fn block_bytes(&self) -> usize {
        ROW_BYTES * BLOCK_TOKENS
    }

    fn memory(&self) -> KvMemory {
        KvMemory::Device
    }

    fn read(&self, _: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &[u8])) -> Result<(), StoreError> {
        (0..blocks.len()).for_each(|i| f(i, &[0; ROW_BYTES * BLOCK_TOKENS]));
        Ok(())
    }

    fn write(&self, _: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &mut [u8])) -> Result<(), StoreError> {
        (0..blocks.len()).for_each(|i| f(i, &mut [0; ROW_BYTES * BLOCK_TOKENS]));
        Ok(())
    }
}
