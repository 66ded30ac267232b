//! The process around a node: listeners, admin port, model, registration.

use std::{io, net::SocketAddr, sync::Arc};

use overfill_cluster::{
    Admin, AdminServer, MetricsError, ReadyLine, Started, admin, discovery,
    grpc::{self, BindError, NODE_CONNECTIONS},
    http,
    metrics::CertificateExpiry,
    net::Listener,
};
use overfill_kv::{BLOCK_TOKENS, BlockPool, KvEndpoint, KvSchema, Role};
use overfill_model::{Model, ModelError};
use overfill_text::TextFiles;
use overfill_transport::{TransportError, Transports};
use tokio::{net::TcpListener, sync::oneshot, task::JoinError};

use crate::{
    Identity, LoadState, NodeConfig, NodeCore, NodeMetrics, RoleService, Served, Variant, load::Receiving,
    new_incarnation, transport::TransportMetrics,
};

/// Why a node failed to start or to keep running.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// Binding a listen address failed.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The KV transport that was asked for can't be used.
    #[error("kv transport: {0}")]
    Transport(#[from] TransportError),
    /// Loading the model failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Registering the metrics failed: a bug in this program.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The operating system refused a thread or a socket.
    #[error("system: {0}")]
    Io(#[from] io::Error),
    /// Setting up gRPC reflection failed: a bug in this program.
    #[error("setting up gRPC reflection: {0}")]
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

/// A node with bound listeners and a loaded model.
pub struct Host {
    /// Settings of the node.
    pub config: NodeConfig,
    /// The loaded model.
    pub model: Model,
    /// Further models over the same KV, in the order of their names in [`NodeConfig::variants`].
    pub variants: Vec<Model>,
    /// Tokenizer, chat template and other text files of the model.
    pub files: Arc<TextFiles>,
    /// Pool of the blocks of the KV cache.
    pub pool: BlockPool,
    /// Transports of KV.
    pub transports: Arc<Transports>,
    role: Role,
    grpc: TcpListener,
    grpc_address: SocketAddr,
    admin: Admin,
    admin_server: AdminServer,
    admin_address: SocketAddr,
}

impl Host {
    /// Binds the listeners, then loads the model.
    pub async fn bind(role: Role, config: NodeConfig) -> Result<Self, NodeError> {
        let grpc = grpc::bind("listen", config.listen).await?;
        let admin_listener = grpc::bind("admin", config.admin).await?;
        let admin_address = admin_listener.local_addr()?;
        // The admin port is served before the model is loaded, which may take minutes.
        let admin = Admin::default();
        let admin_server = AdminServer::start(admin_listener, admin.clone());
        let NodeConfig { model: folder, variants, load: options, kv_blocks, .. } = config.clone();
        let transport = config.transport.clone();
        let load = move || {
            let model = Model::load(&folder, &options, kv_blocks)?;
            let sibling = |variant: &Variant| model.load_sibling(&variant.model, &options);
            let variants = variants.iter().map(sibling).collect::<Result<Vec<_>, _>>()?;
            let files = Arc::new(overfill_model::text_files(&folder)?);
            let transports = transport.open(model.kv())?;
            Ok::<_, NodeError>((model, variants, files, transports))
        };
        let (model, variants, files, transports) = tokio::task::spawn_blocking(load).await??;
        let grpc_address = grpc.local_addr()?;
        let pool = BlockPool::new(kv_blocks);
        Ok(Self {
            config,
            model,
            variants,
            files,
            pool,
            transports,
            role,
            grpc,
            grpc_address,
            admin,
            admin_server,
            admin_address,
        })
    }

    /// Ready line with the listen addresses. `kv` is the KV listen address of a decode node.
    pub fn ready_line(&self, kv: Option<SocketAddr>) -> ReadyLine {
        ReadyLine {
            role: self.role.to_string(),
            grpc: self.grpc_address,
            http: None,
            kv,
            admin: Some(self.admin_address),
        }
    }

    /// Creates the load counters and the metrics of the node. `receiving` counts incoming handoffs on decode nodes.
    pub fn load(&self, receiving: Option<Receiving>) -> Result<Arc<LoadState>, NodeError> {
        let metrics = NodeMetrics::new(&self.served_model_name(), &self.pool_name())?;
        Ok(LoadState::new(self.pool.clone(), metrics, receiving, self.config.step_timeout))
    }

    fn served_model_name(&self) -> String {
        self.config.served_model_name.clone().unwrap_or_else(|| self.model.name().to_owned())
    }

    fn pool_name(&self) -> String {
        self.config.pool.clone().unwrap_or_else(|| self.role.to_string())
    }

    /// Creates the node's identity. `schema`, `max_running` and `kv_endpoint` depend on the role. The incarnation is
    /// drawn at random, so call this once per process.
    pub fn identity(&self, schema: KvSchema, max_running: usize, kv_endpoint: Option<KvEndpoint>) -> Identity {
        let default_id = || format!("{}-{}", self.role, self.grpc_address);
        let room = match self.role {
            Role::Prefill => self.config.kv_blocks * BLOCK_TOKENS,
            Role::Decode => schema.windows().max_context_tokens(self.config.kv_blocks),
        };
        let models = || std::iter::once(&self.model).chain(&self.variants);
        let context = models().map(Model::max_context_tokens).min().unwrap_or(room).min(room);
        let mut eos_token_ids: Vec<u32> = Vec::new();
        for id in models().flat_map(Model::eos_token_ids) {
            if !eos_token_ids.contains(id) {
                eos_token_ids.push(*id);
            }
        }
        Identity {
            role: self.role,
            node_id: self.config.node_id.clone().unwrap_or_else(default_id),
            incarnation: new_incarnation(),
            pool: self.pool_name(),
            cluster: self.config.cluster.clone(),
            model: self.served_model_name(),
            variants: self.config.variants.iter().map(|variant| variant.name.clone()).collect(),
            schema,
            max_context_tokens: context,
            total_blocks: self.config.kv_blocks,
            max_running,
            kv_endpoint,
            kv_transports: self.transports.usable().to_string(),
            weights: self.config.load.weights.to_string(),
            eos_token_ids,
        }
    }

    /// The schema of the KV that all models of the node attend to. It names the full model if one of them does.
    pub fn kv_schema(&self) -> KvSchema {
        let mut schemas = std::iter::once(&self.model).chain(&self.variants).map(Model::kv_schema);
        let full_model = schemas.find_map(|schema| schema.full_model);
        KvSchema { full_model, ..self.model.kv_schema() }
    }

    /// Splits the host into its servers, the model, and the variants, which the engine takes.
    pub fn into_parts(self) -> (Front, Model, Vec<Model>) {
        let Self {
            config,
            model,
            variants,
            files: _,
            pool: _,
            transports,
            role: _,
            grpc,
            grpc_address,
            admin,
            admin_server,
            admin_address: _,
        } = self;
        (Front { config, transports, grpc, grpc_address, admin, admin_server }, model, variants)
    }
}

/// The servers of a node: the gRPC listener and the admin port.
pub struct Front {
    config: NodeConfig,
    transports: Arc<Transports>,
    grpc: TcpListener,
    grpc_address: SocketAddr,
    admin: Admin,
    admin_server: AdminServer,
}

impl Front {
    /// Registers the node in etcd and serves until the shutdown begins and the running requests have ended.
    ///
    /// # Errors
    /// The engine ends while the node is serving, or a task of the node panics.
    pub async fn serve(
        self,
        core: &NodeCore,
        service: RoleService,
        mut engine_end: oneshot::Receiver<()>,
    ) -> Result<Served, NodeError> {
        let (asked, refreshed) = (core.load.clone(), core.load.clone());
        let metrics = core.load.metrics();
        let used = self.config.tls.iter().cloned().collect();
        let expiry = CertificateExpiry::new(&metrics.registry, used, self.config.etcd.as_ref())?;
        let transports = TransportMetrics::new(&metrics.registry, self.transports)?;
        self.admin.start(Started {
            registry: metrics.registry.clone(),
            ready: Box::new(move || asked.health()),
            refresh: Box::new(move || {
                refreshed.refresh_metrics();
                expiry.refresh();
                transports.refresh();
            }),
        });
        // The listener is bound, so routers that find the registration can connect.
        let grpc = self.config.dialled(self.config.advertise_grpc.as_deref(), self.grpc_address);
        let registration = core.identity.registration(grpc);
        let shutdown = &core.shutdown;
        let registered = self.config.etcd.map(|etcd| {
            let last_success = metrics.discovery_success.with_label_values(&["etcd"]);
            let register = discovery::register(etcd, registration, shutdown.token(), last_success);
            shutdown.spawn("registration", register)
        });
        let listener = Listener::new(self.grpc, self.config.tls);
        let served = core.serve(listener, service, &mut engine_end).await?;
        if served == Served::Drained {
            if let Some(registered) = registered {
                registered.await.map_err(NodeError::Registering)?;
            }
            self.admin_server.end().await?;
        }
        Ok(served)
    }
}

/// Maximum number of file descriptors for the connections of a node's gRPC and admin servers.
pub fn connections() -> usize {
    grpc::limits(NODE_CONNECTIONS).files() + http::ConnectionLimits::http(admin::CONNECTIONS).files()
}
