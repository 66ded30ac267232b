//! A decode node: binding, loading the model, serving.

use std::{net::SocketAddr, sync::Arc};

use overfill_cluster::{ReadyLine, Shutdown, grpc};
use overfill_kv::{BlockPool, KvEndpoint, Role};
use overfill_model::Model;
use overfill_node::{Host, KvListener, LoadState, NodeCore, NodeError, RoleService, Served, load::Receiving};
use overfill_proto::{MAX_MESSAGE_BYTES, v1::decode_server::DecodeServer};
use overfill_transport::{KvReceiver, TransferConfig};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::service::Routes;

use crate::{
    args::Config,
    compute::{Compute, ModelCompute},
    engine::{self, EngineLimits},
    service::{DecodeService, ExtendedRequests},
};

/// A decode node whose listeners are bound and whose model is loaded.
pub struct DecodeNode {
    host: Host,
    limits: EngineLimits,
    kv_address: SocketAddr,
    advertise_kv: Option<String>,
    receiver: KvReceiver,
    receiving: JoinHandle<()>,
    /// Stops the KV receiver when dropped. It outlives the beginning of the shutdown, so that open handoffs can finish.
    receiver_stop: DropGuard,
    load: Arc<LoadState>,
}

impl DecodeNode {
    /// Binds the listeners, then loads the model.
    pub async fn bind(config: Config) -> Result<Self, NodeError> {
        let Config { node, kv_listen, advertise_kv, max_running } = config;
        let max_waiting = node.max_waiting;
        let kv = grpc::bind("kv-listen", kv_listen).await?;
        let kv_address = kv.local_addr()?;
        let host = Host::bind(Role::Decode, node).await?;
        let stop = CancellationToken::new();
        let listener = KvListener::new(kv, host.config.tls.clone());
        let schema = host.kv_schema();
        let limits = EngineLimits { max_running, max_waiting, windows: schema.windows() };
        let transfer = TransferConfig { transports: host.transports.clone(), ..TransferConfig::default() };
        let (receiver, receiving) = KvReceiver::start(listener, schema, host.model.kv(), transfer, stop.clone());
        let counted = receiver.clone();
        let counted: Receiving = Box::new(move || (counted.open_handoffs(), counted.stranded_bytes()));
        Ok(Self {
            load: host.load(Some(counted))?,
            host,
            limits,
            kv_address,
            advertise_kv,
            receiver,
            receiving,
            receiver_stop: stop.drop_guard(),
        })
    }

    /// Ready line with the listen addresses.
    pub fn ready_line(&self) -> ReadyLine {
        self.host.ready_line(Some(self.kv_address))
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
        self.run_with(shutdown, |compute| compute).await
    }

    /// As [`Self::run`], with a computation around the model's. For measurements.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub async fn run_with<C: Compute + Send + 'static>(
        self,
        shutdown: Shutdown,
        wrap: impl FnOnce(ModelCompute) -> C,
    ) -> Result<(), NodeError> {
        let Self { host, limits, kv_address, advertise_kv, receiver, receiving, receiver_stop, load } = self;
        let schema = host.kv_schema();
        let address = host.config.dialled(advertise_kv.as_deref(), kv_address);
        let kv_endpoint = KvEndpoint { address, versions: schema.protocol() };
        let identity = host.identity(schema, limits.max_running, Some(kv_endpoint));
        let core = NodeCore::new(identity, load.clone(), &shutdown, host.config.drain_timeout);
        let request_limits = core.request_limits(host.config.default_deadline);
        let (pool, constraints) = (host.pool.clone(), core.constraints(host.files.clone()));
        let (front, model, variants) = host.into_parts();
        let store = model.kv();
        let compute = ModelCompute::new(std::iter::once(model).chain(variants).map(Model::into_engine).collect());
        let (engine, engine_end) = engine::start(wrap(compute), store, pool, load, limits)?;
        let service = DecodeService {
            engine,
            limits: request_limits,
            constraints,
            receiver,
            core: core.clone(),
            extended: ExtendedRequests::default(),
        };
        if front.serve(&core, service.into_role_service(), engine_end).await? == Served::Drained {
            drop(receiver_stop);
            receiving.await.map_err(NodeError::Receiving)?;
        }
        Ok(())
    }
}

impl DecodeService {
    /// Wraps the service in a gRPC server with the message size limits of a node.
    pub fn into_role_service(self) -> RoleService {
        let server = DecodeServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        RoleService::new::<DecodeServer<Self>>(Routes::new(server))
    }
}
