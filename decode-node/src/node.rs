//! The node: bound, then run.

use std::{future::pending, io, net::SocketAddr, sync::Arc, time::Duration};

use overfill_cluster::{
    Admin, AdminServer, Drain, LoadState, MetricsError, NodeMetrics, ReadyLine, Shutdown, Started, admin,
    discovery::{self, Registration},
    grpc::{self, BindError, NODE_CONNECTIONS},
    http,
    net::Listener,
};
use overfill_kv::{BLOCK_TOKENS, BlockPool, KvSchema, Role};
use overfill_model::{Model, ModelError};
use overfill_proto::{FILE_DESCRIPTOR_SET, MAX_MESSAGE_BYTES, v1, v1::decode_server::DecodeServer};
use overfill_transport::{KvReceiver, TransferConfig};
use tokio::{
    net::TcpListener,
    sync::oneshot,
    task::{JoinError, JoinHandle},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::service::Routes;
use tracing::error;

use crate::{
    args::Config,
    engine::{self, Limits},
    kv_plane::KvListener,
    request::RequestLimits,
    service::DecodeService,
};

/// How long a client may take to read the end of its stream once the node has nothing else to do.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Why a node could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// An address is taken or not this machine's.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The model can't be served.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A fault of the program.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The system refused a thread or a socket.
    #[error("system: {0}")]
    Io(#[from] io::Error),
    /// gRPC reflection could not be set up: a fault of the program.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// Loading the model panicked.
    #[error("loading the model: {0}")]
    Loading(#[from] JoinError),
    /// The KV plane's task panicked.
    #[error("receiving KV: {0}")]
    Receiving(#[source] JoinError),
    /// The task that keeps the node registered panicked.
    #[error("registering: {0}")]
    Registering(#[source] JoinError),
    /// The engine's thread ended while the node was serving.
    #[error("the engine ended unexpectedly")]
    EngineEnded,
}

/// A decode node whose listeners are bound and whose model is loaded.
pub struct DecodeNode {
    config: Config,
    grpc: TcpListener,
    admin: Admin,
    admin_server: AdminServer,
    grpc_address: SocketAddr,
    admin_address: SocketAddr,
    kv_address: SocketAddr,
    receiver: KvReceiver,
    receiving: JoinHandle<()>,
    /// Ends the KV plane: later than the shutdown's beginning, so that open handoffs come to their end.
    receiver_stop: DropGuard,
    model: Model,
    pool: BlockPool,
    load: Arc<LoadState>,
}

impl DecodeNode {
    /// Binds the listeners, then loads the model.
    pub async fn bind(config: Config) -> Result<Self, NodeError> {
        let grpc = grpc::bind("listen", config.listen).await?;
        let admin_listener = grpc::bind("admin", config.admin).await?;
        let admin_address = admin_listener.local_addr()?;
        // Before the model is loaded, which may take minutes.
        let admin = Admin::default();
        let admin_server = AdminServer::start(admin_listener, admin.clone());
        let kv = grpc::bind("kv-listen", config.kv_listen).await?;
        let kv_address = kv.local_addr()?;
        let Config { model: folder, load: options, kv_blocks, .. } = config.clone();
        let load = move || -> Result<_, NodeError> { Ok(Model::load(&folder, &options, kv_blocks)?) };
        let model = tokio::task::spawn_blocking(load).await??;
        let pool = BlockPool::new(kv_blocks);
        let metrics = NodeMetrics::new(config.served_model_name.as_deref().unwrap_or(model.name()))?;
        let stop = CancellationToken::new();
        let transfer = TransferConfig::default();
        let (receiver, receiving) = KvReceiver::start(
            KvListener::new(kv, config.tls.clone()),
            model.kv_schema(),
            model.kv(),
            transfer,
            stop.clone(),
        );
        let counted = receiver.clone();
        let receiving_load = Box::new(move || (counted.open_handoffs(), counted.stranded_bytes()));
        Ok(Self {
            grpc_address: grpc.local_addr()?,
            admin_address,
            kv_address,
            receiver,
            receiving,
            receiver_stop: stop.drop_guard(),
            load: LoadState::new(pool.clone(), metrics, Some(receiving_load), config.step_timeout),
            config,
            grpc,
            admin,
            admin_server,
            model,
            pool,
        })
    }

    /// Where it serves.
    pub fn ready_line(&self) -> ReadyLine {
        ReadyLine {
            role: "decode".into(),
            grpc: self.grpc_address,
            http: None,
            kv: Some(self.kv_address),
            admin: Some(self.admin_address),
        }
    }

    /// What it is doing; stays valid while it runs.
    pub fn load(&self) -> Arc<LoadState> {
        self.load.clone()
    }

    /// Its blocks; stays valid while it runs.
    pub fn pool(&self) -> BlockPool {
        self.pool.clone()
    }

    fn info(&self, schema: &KvSchema, max_context_tokens: usize) -> v1::NodeInfo {
        let node_id = self.config.node_id.clone().unwrap_or_else(|| format!("decode-{}", self.grpc_address));
        v1::NodeInfo {
            node_id,
            incarnation: format!("{:016x}", rand::random::<u64>()),
            role: v1::Role::Decode.into(),
            model: self.config.served_model_name.clone().unwrap_or_else(|| self.model.name().to_owned()),
            kv_schema: Some(schema.into()),
            max_context_tokens: max_context_tokens as u32,
            total_blocks: self.config.kv_blocks as u32,
            max_running_requests: self.config.max_running as u32,
            kv_endpoint: self.config.advertise_kv.clone().unwrap_or_else(|| self.kv_address.to_string()),
            version: env!("CARGO_PKG_VERSION").into(),
            weights: self.config.load.weights.to_string(),
            eos_token_ids: self.model.eos_token_ids().to_vec(),
        }
    }

    fn registration(&self, info: &v1::NodeInfo, schema: &KvSchema) -> Registration {
        Registration {
            role: Role::Decode,
            node_id: info.node_id.clone(),
            incarnation: info.incarnation.clone(),
            grpc: self.config.advertise_grpc.clone().unwrap_or_else(|| self.grpc_address.to_string()),
            kv: Some(info.kv_endpoint.clone()),
            model: info.model.clone(),
            full_model: schema.full_model.clone(),
            kv_schema_digest: schema.digest_hex(),
            total_blocks: info.total_blocks,
            max_running_requests: info.max_running_requests,
            max_context_tokens: info.max_context_tokens,
            version: info.version.clone(),
        }
    }

    /// Serves until the shutdown begins and what runs then has ended.
    pub async fn run(self, shutdown: Shutdown) -> Result<(), NodeError> {
        let schema = self.model.kv_schema();
        let max_context_tokens = self.model.max_context_tokens().min(self.config.kv_blocks * BLOCK_TOKENS);
        let info = self.info(&schema, max_context_tokens);
        let registration = self.registration(&info, &schema);
        let limits = Limits { max_running: self.config.max_running, max_waiting: self.config.max_waiting };
        let load = self.load;
        let (engine, mut engine_end) = engine::start(self.model.into_engine(), self.pool, load.clone(), limits)?;
        let service = DecodeService {
            engine,
            limits: RequestLimits {
                schema,
                max_context_tokens,
                default_deadline: self.config.default_deadline,
                incarnation: info.incarnation.clone(),
            },
            info,
            receiver: self.receiver,
            load: load.clone(),
            shutdown: shutdown.clone(),
            drain: Drain::new(&shutdown, self.config.drain_timeout),
        };
        let service = DecodeServer::new(service)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);

        let (state, asked, refreshed) = (load.clone(), load.clone(), load.clone());
        self.admin.start(Started {
            registry: load.metrics().registry.clone(),
            ready: Box::new(move || asked.health()),
            refresh: Box::new(move || refreshed.refresh_metrics()),
        });

        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_serving::<DecodeServer<DecodeService>>().await;
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()?;
        let stop = {
            let shutdown = shutdown.clone();
            async move {
                let mut watch = load.watch();
                let mut stalled = false;
                while !shutdown.has_begun() {
                    tokio::select! {
                        () = shutdown.cancelled() => {}
                        () = load.changed(&mut watch) => {}
                    }
                    let now = watch.borrow_and_update().stalled;
                    match (std::mem::replace(&mut stalled, now), now) {
                        (false, true) => {
                            error!("the engine does not get on with its work");
                            health.set_not_serving::<DecodeServer<DecodeService>>().await;
                        }
                        (true, false) => health.set_serving::<DecodeServer<DecodeService>>().await,
                        _ => {}
                    }
                }
                load.drain();
                health.set_not_serving::<DecodeServer<DecodeService>>().await;
                health.set_service_status("", tonic_health::ServingStatus::NotServing).await;
            }
        };
        // The listener takes connections already, so whoever finds the node is served.
        let registered = self
            .config
            .etcd
            .map(|etcd| shutdown.spawn("registration", discovery::register(etcd, registration, shutdown.token())));
        let routes = Routes::new(service).add_service(health_service).add_service(reflection).into_axum_router();
        let listener = Listener::new(self.grpc, self.config.tls);
        let server = http::serve(listener, routes, grpc::limits(NODE_CONNECTIONS), stop);
        tokio::select! {
            () = server => {}
            () = abandoned(&shutdown, &state) => return Ok(()),
            () = ended(&mut engine_end) => return Err(NodeError::EngineEnded),
        }
        // The service is gone, and with it the last way into the engine.
        ended(&mut engine_end).await;
        if let Some(registered) = registered {
            registered.await.map_err(NodeError::Registering)?;
        }
        self.admin_server.end().await?;
        drop(self.receiver_stop);
        self.receiving.await.map_err(NodeError::Receiving)
    }
}

/// Connections that the node's servers may have in all.
pub(crate) fn connections() -> usize {
    grpc::limits(NODE_CONNECTIONS).files()
        + http::Limits::http(admin::CONNECTIONS).files()
        + TransferConfig::default().max_connections
}

/// Resolves when a shutdown has nothing left to wait for but clients who do not read their last words.
async fn abandoned(shutdown: &Shutdown, load: &LoadState) {
    shutdown.cancelled().await;
    load.drained().await;
    tokio::time::sleep(LAST_WORDS).await;
}

/// Resolves when the engine's thread has ended.
async fn ended(end: &mut oneshot::Receiver<()>) {
    match end.await {
        Err(_) => {}
        Ok(()) => pending().await,
    }
}
