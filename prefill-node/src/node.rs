//! The node: bound, then run.

use std::{future::pending, io, net::SocketAddr, sync::Arc, time::Duration};

use overfill_cluster::{
    Admin, AdminServer, Drain, LoadState, MetricsError, NodeMetrics, ReadyLine, Shutdown, Started, Tls, admin,
    discovery::{self, Registration},
    grpc::{self, BindError, NODE_CONNECTIONS},
    http,
    net::{self, Listener},
};
use overfill_kv::{BLOCK_TOKENS, BlockPool, KvSchema, Role};
use overfill_model::{Model, ModelError};
use overfill_proto::{FILE_DESCRIPTOR_SET, MAX_MESSAGE_BYTES, v1, v1::prefill_server::PrefillServer};
use overfill_text::TextFiles;
use overfill_transport::{Dialer, Link, TransferConfig};
use tokio::{net::TcpListener, sync::oneshot, task::JoinError};
use tonic::service::Routes;
use tracing::error;

use crate::{
    args::Config,
    engine::{self, Limits},
    request::RequestLimits,
    service::PrefillService,
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
    /// The task that keeps the node registered panicked.
    #[error("registering: {0}")]
    Registering(#[source] JoinError),
    /// The engine's thread ended while the node was serving.
    #[error("the engine ended unexpectedly")]
    EngineEnded,
}

/// A prefill node whose listeners are bound and whose model is loaded.
pub struct PrefillNode {
    config: Config,
    grpc: TcpListener,
    admin: Admin,
    admin_server: AdminServer,
    grpc_address: SocketAddr,
    admin_address: SocketAddr,
    model: Model,
    files: TextFiles,
    pool: BlockPool,
    load: Arc<LoadState>,
}

impl PrefillNode {
    /// Binds the listeners, then loads the model.
    pub async fn bind(config: Config) -> Result<Self, NodeError> {
        let grpc = grpc::bind("listen", config.listen).await?;
        let admin_listener = grpc::bind("admin", config.admin).await?;
        let admin_address = admin_listener.local_addr()?;
        // Before the model is loaded, which may take minutes.
        let admin = Admin::default();
        let admin_server = AdminServer::start(admin_listener, admin.clone());
        let Config { model: folder, load: options, kv_blocks, .. } = config.clone();
        let load = move || -> Result<_, NodeError> {
            let files = overfill_model::text_files(&folder)?;
            let model = Model::load(&folder, &options, kv_blocks)?;
            Ok((files, model))
        };
        let (files, model) = tokio::task::spawn_blocking(load).await??;
        let pool = BlockPool::new(kv_blocks);
        let metrics = NodeMetrics::new(config.served_model_name.as_deref().unwrap_or(model.name()))?;
        Ok(Self {
            grpc_address: grpc.local_addr()?,
            admin_address,
            load: LoadState::new(pool.clone(), metrics, None, config.step_timeout),
            config,
            grpc,
            admin,
            admin_server,
            model,
            files,
            pool,
        })
    }

    /// Where it serves.
    pub fn ready_line(&self) -> ReadyLine {
        ReadyLine {
            role: "prefill".into(),
            grpc: self.grpc_address,
            http: None,
            kv: None,
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
        let node_id = self.config.node_id.clone().unwrap_or_else(|| format!("prefill-{}", self.grpc_address));
        v1::NodeInfo {
            node_id,
            incarnation: format!("{:016x}", rand::random::<u64>()),
            role: v1::Role::Prefill.into(),
            model: self.config.served_model_name.clone().unwrap_or_else(|| self.model.name().to_owned()),
            kv_schema: Some(schema.into()),
            max_context_tokens: max_context_tokens as u32,
            total_blocks: self.config.kv_blocks as u32,
            max_running_requests: self.config.max_running as u32,
            kv_endpoint: String::new(),
            version: env!("CARGO_PKG_VERSION").into(),
            weights: self.config.load.weights.to_string(),
            eos_token_ids: self.model.eos_token_ids().to_vec(),
        }
    }

    fn registration(&self, info: &v1::NodeInfo, schema: &KvSchema) -> Registration {
        Registration {
            role: Role::Prefill,
            node_id: info.node_id.clone(),
            incarnation: info.incarnation.clone(),
            grpc: self.config.advertise_grpc.clone().unwrap_or_else(|| self.grpc_address.to_string()),
            kv: None,
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
        let schema = self.model.producer_schema();
        let max_context_tokens = self.model.max_context_tokens().min(self.config.kv_blocks * BLOCK_TOKENS);
        let info = self.info(&schema, max_context_tokens);
        let registration = self.registration(&info, &schema);
        let limits = Limits {
            max_batch_tokens: self.config.max_batch_tokens,
            step_target: self.config.step_target,
            max_running: self.config.max_running,
            max_waiting: self.config.max_waiting,
        };
        let load = self.load;
        let transfer = TransferConfig { dialer: kv_dialer(self.config.tls.clone()), ..TransferConfig::default() };
        let producer = self.model.fingerprint().into();
        let (engine, mut engine_end) =
            engine::start(self.model.into_engine(), producer, self.pool, load.clone(), limits, transfer)?;
        let service = PrefillService {
            engine,
            limits: RequestLimits {
                schema,
                max_context_tokens,
                default_deadline: self.config.default_deadline,
                incarnation: info.incarnation.clone(),
            },
            info,
            files: Arc::new(self.files),
            load: load.clone(),
            shutdown: shutdown.clone(),
            drain: Drain::new(&shutdown, self.config.drain_timeout),
        };
        let service = PrefillServer::new(service)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);

        let (state, asked, refreshed) = (load.clone(), load.clone(), load.clone());
        self.admin.start(Started {
            registry: load.metrics().registry.clone(),
            ready: Box::new(move || asked.health()),
            refresh: Box::new(move || refreshed.refresh_metrics()),
        });

        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_serving::<PrefillServer<PrefillService>>().await;
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
                            health.set_not_serving::<PrefillServer<PrefillService>>().await;
                        }
                        (true, false) => health.set_serving::<PrefillServer<PrefillService>>().await,
                        _ => {}
                    }
                }
                load.drain();
                health.set_not_serving::<PrefillServer<PrefillService>>().await;
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
        Ok(())
    }
}

/// How decode nodes' KV planes are reached.
fn kv_dialer(tls: Option<Tls>) -> Dialer {
    let Some(tls) = tls else { return Dialer::default() };
    let dialer = net::Dialer::tcp(Some(tls));
    Dialer::new(move |endpoint| {
        let dialer = dialer.clone();
        Box::pin(async move { Ok(Link::stream(dialer.dial(endpoint).await?)) })
    })
}

/// Connections that the node's servers may have in all.
pub(crate) fn connections() -> usize {
    grpc::limits(NODE_CONNECTIONS).files() + http::Limits::http(admin::CONNECTIONS).files()
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
