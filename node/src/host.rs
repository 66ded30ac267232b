//! The process around a node: listeners, admin port, model, registration.

use std::{io, net::SocketAddr, sync::Arc};

use overfill_cluster::{
    Admin, AdminServer, MetricsError, ReadyLine, Started, admin, discovery,
    grpc::{self, BindError, NODE_CONNECTIONS},
    http,
    net::Listener,
};
use overfill_kv::{BLOCK_TOKENS, BlockPool, KvEndpoint, KvSchema, Role};
use overfill_model::{Model, ModelError};
use tokio::{net::TcpListener, sync::oneshot, task::JoinError};

use crate::{
    Identity, LoadState, NodeConfig, NodeCore, NodeMetrics, RoleService, Served, load::Receiving, new_incarnation,
};

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

/// A node's listeners, bound, and its model, loaded.
pub struct Host {
    /// Its settings.
    pub config: NodeConfig,
    /// Its model.
    pub model: Model,
    /// The blocks of the model's KV.
    pub pool: BlockPool,
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
        // Before the model is loaded, which may take minutes.
        let admin = Admin::default();
        let admin_server = AdminServer::start(admin_listener, admin.clone());
        let NodeConfig { model: folder, load: options, kv_blocks, .. } = config.clone();
        let model = tokio::task::spawn_blocking(move || Model::load(&folder, &options, kv_blocks)).await??;
        let grpc_address = grpc.local_addr()?;
        let pool = BlockPool::new(kv_blocks);
        Ok(Self { config, model, pool, role, grpc, grpc_address, admin, admin_server, admin_address })
    }

    /// Where it serves. `kv` is where KV is received.
    pub fn ready_line(&self, kv: Option<SocketAddr>) -> ReadyLine {
        ReadyLine {
            role: self.role.to_string(),
            grpc: self.grpc_address,
            http: None,
            kv,
            admin: Some(self.admin_address),
        }
    }

    /// Where the node's load is counted.
    pub fn load(&self, receiving: Option<Receiving>) -> Result<Arc<LoadState>, NodeError> {
        let metrics = NodeMetrics::new(&self.served_model_name())?;
        Ok(LoadState::new(self.pool.clone(), metrics, receiving, self.config.step_timeout))
    }

    fn served_model_name(&self) -> String {
        self.config.served_model_name.clone().unwrap_or_else(|| self.model.name().to_owned())
    }

    /// What this node is, with its role's `schema`, limit and KV address.
    pub fn identity(&self, schema: KvSchema, max_running: usize, kv_endpoint: Option<KvEndpoint>) -> Identity {
        let default_id = || format!("{}-{}", self.role, self.grpc_address);
        Identity {
            role: self.role,
            node_id: self.config.node_id.clone().unwrap_or_else(default_id),
            incarnation: new_incarnation(),
            model: self.served_model_name(),
            schema,
            max_context_tokens: self.model.max_context_tokens().min(self.config.kv_blocks * BLOCK_TOKENS),
            total_blocks: self.config.kv_blocks,
            max_running,
            kv_endpoint,
            weights: self.config.load.weights.to_string(),
            eos_token_ids: self.model.eos_token_ids().to_vec(),
        }
    }

    /// The parts that serve, and the model for the engine.
    pub fn into_parts(self) -> (Front, Model) {
        let Self { config, model, pool: _, role: _, grpc, grpc_address, admin, admin_server, admin_address: _ } = self;
        (Front { config, grpc, grpc_address, admin, admin_server }, model)
    }
}

/// A node's listeners.
pub struct Front {
    config: NodeConfig,
    grpc: TcpListener,
    grpc_address: SocketAddr,
    admin: Admin,
    admin_server: AdminServer,
}

impl Front {
    /// Registers the node and serves until the shutdown begins and what runs then has ended.
    pub async fn serve(
        self,
        core: &NodeCore,
        service: RoleService,
        mut engine_end: oneshot::Receiver<()>,
    ) -> Result<Served, NodeError> {
        let (asked, refreshed) = (core.load.clone(), core.load.clone());
        self.admin.start(Started {
            registry: core.load.metrics().registry.clone(),
            ready: Box::new(move || asked.health()),
            refresh: Box::new(move || refreshed.refresh_metrics()),
        });
        // The listener takes connections already, so routers that find the node are served.
        let grpc = self.config.advertise_grpc.unwrap_or_else(|| self.grpc_address.to_string());
        let registration = core.identity.registration(grpc);
        let shutdown = &core.shutdown;
        let registered = self
            .config
            .etcd
            .map(|etcd| shutdown.spawn("registration", discovery::register(etcd, registration, shutdown.token())));
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

/// Connections that a node's gRPC and admin servers may have.
pub fn connections() -> usize {
    grpc::limits(NODE_CONNECTIONS).files() + http::ConnectionLimits::http(admin::CONNECTIONS).files()
}
