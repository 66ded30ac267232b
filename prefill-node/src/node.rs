//! A prefill node: binding, loading the model, serving.

use std::sync::Arc;

use overfill_cluster::{ReadyLine, Shutdown};
use overfill_kv::{BlockPool, Role};
use overfill_node::{Host, LoadState, NodeCore, NodeError, RoleService, kv_dialer};
use overfill_proto::{MAX_MESSAGE_BYTES, v1::prefill_server::PrefillServer};
use overfill_transport::TransferConfig;
use tonic::service::Routes;

use crate::{
    args::Config,
    engine::{self, EngineLimits},
    extension::OpenLimits,
    service::PrefillService,
};

/// A prefill node whose listeners are bound and whose model is loaded.
pub struct PrefillNode {
    host: Host,
    limits: EngineLimits,
    load: Arc<LoadState>,
}

impl PrefillNode {
    /// Binds the listeners, then loads the model.
    pub async fn bind(config: Config) -> Result<Self, NodeError> {
        let Config { node, max_batch_tokens, step_target, max_running, open_kv_share, open_idle } = config;
        let max_waiting = node.max_waiting;
        let host = Host::bind(Role::Prefill, node).await?;
        let open = OpenLimits { max_blocks: (host.pool.total() as f64 * open_kv_share) as usize, max_idle: open_idle };
        let limits = EngineLimits { max_batch_tokens, step_target, max_running, max_waiting, open };
        Ok(Self { load: host.load(None)?, host, limits })
    }

    /// Ready line with the listen addresses.
    pub fn ready_line(&self) -> ReadyLine {
        self.host.ready_line(None)
    }

    /// Load of the node. The handle stays valid while the node runs.
    pub fn load(&self) -> Arc<LoadState> {
        self.load.clone()
    }

    /// Block pool of the node. The handle stays valid while the node runs.
    pub fn pool(&self) -> BlockPool {
        self.host.pool.clone()
    }

    /// Starts the engine and serves until the shutdown begins and the running requests have ended.
    ///
    /// # Errors
    /// The operating system refused a thread, or the engine or another task ended unexpectedly.
    pub async fn run(self, shutdown: Shutdown) -> Result<(), NodeError> {
        let Self { host, limits, load } = self;
        let identity = host.identity(host.model.producer_schema(), limits.max_running, None);
        let core = NodeCore::new(identity, load.clone(), &shutdown, host.config.drain_timeout);
        let request_limits = core.request_limits(host.config.default_deadline);
        let transfer = TransferConfig {
            dialer: kv_dialer(host.config.tls.clone()),
            transports: host.transports.clone(),
            ..TransferConfig::default()
        };
        let (pool, files) = (host.pool.clone(), host.files.clone());
        let constraints = core.constraints(files.clone());
        let (front, model, _) = host.into_parts();
        let producer = model.fingerprint().into();
        let (engine, engine_end) = engine::start(model.into_engine(), producer, pool, load, limits, transfer)?;
        let service = PrefillService { engine, limits: request_limits, constraints, files, core: core.clone() };
        front.serve(&core, service.into_role_service(), engine_end).await?;
        Ok(())
    }
}

impl PrefillService {
    /// Wraps the service in a gRPC server with the message size limits of a node.
    pub fn into_role_service(self) -> RoleService {
        let server = PrefillServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        RoleService::new::<PrefillServer<Self>>(Routes::new(server))
    }
}
