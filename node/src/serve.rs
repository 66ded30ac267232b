//! The part of a running node that does not depend on its role.

use std::{future::pending, sync::Arc, time::Duration};

use overfill_cluster::{
    Shutdown,
    grpc::{self, NODE_CONNECTIONS},
    http::{self, OpenConnections},
    net::Connection,
};
use overfill_net::Listen;
use overfill_proto::{FILE_DESCRIPTOR_SET, v1::node_server::NodeServer};
use overfill_text::TextFiles;
use tokio::sync::oneshot;
use tonic::{server::NamedService, service::Routes};
use tonic_health::{ServingStatus, server::HealthReporter};
use tracing::error;

use crate::{Constraints, Drain, Identity, LoadState, NodeError, NodeService, RequestLimits};

/// Time that clients have to read the end of their streams after a shutdown has finished all other work.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// State that the parts of a running node share. Clones share it.
#[derive(Clone)]
pub struct NodeCore {
    /// Identity of the node.
    pub identity: Arc<Identity>,
    /// Load of the node.
    pub load: Arc<LoadState>,
    /// Shutdown of the node.
    pub shutdown: Shutdown,
    /// Time limit for running requests during the shutdown.
    pub drain: Drain,
}

/// The gRPC service of a role, with its name for health checks.
pub struct RoleService {
    name: &'static str,
    routes: Routes,
}

impl RoleService {
    /// Creates it for the service type `S` with its `routes`.
    pub fn new<S: NamedService>(routes: Routes) -> Self {
        Self { name: S::NAME, routes }
    }
}

/// How serving ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// All streams and the engine have ended.
    Drained,
    /// All work is done, but some clients have not read the end of their streams.
    Abandoned,
}

impl NodeCore {
    /// Creates the shared state. `drain_timeout` is the time that running requests may take after `shutdown` begins.
    pub fn new(identity: Identity, load: Arc<LoadState>, shutdown: &Shutdown, drain_timeout: Duration) -> Self {
        let drain = Drain::new(shutdown, drain_timeout);
        Self { identity: Arc::new(identity), load, shutdown: shutdown.clone(), drain }
    }

    /// Limits for requests to this node. `default_deadline` is the time limit of a request that sets no deadline.
    pub fn request_limits(&self, default_deadline: Duration) -> RequestLimits {
        RequestLimits { identity: self.identity.clone(), default_deadline }
    }

    /// Makes the constraints of requests to this node, whose model has these files.
    pub fn constraints(&self, files: Arc<TextFiles>) -> Constraints {
        let Identity { schema, eos_token_ids, .. } = &*self.identity;
        Constraints::new(files, schema.vocab_size as usize, eos_token_ids)
    }

    /// Serves the role's service, [`NodeService`], health checks and reflection until the shutdown begins and the
    /// running requests have ended. `engine_end` is the receiver that [`crate::spawn_engine`] returned.
    ///
    /// # Errors
    /// The engine ends while the node is serving.
    pub async fn serve(
        &self,
        listener: impl Listen<Connection = Box<dyn Connection>>,
        service: RoleService,
        engine_end: &mut oneshot::Receiver<()>,
    ) -> Result<Served, NodeError> {
        let (health, health_service) = tonic_health::server::health_reporter();
        let names = [service.name, <NodeServer<NodeService> as NamedService>::NAME];
        report_health(&health, &names, ServingStatus::Serving).await;
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()?;
        let routes = service
            .routes
            .add_service(NodeServer::new(NodeService(self.clone())))
            .add_service(health_service)
            .add_service(reflection)
            .into_axum_router();
        let stop = self.clone().watch_health(health, names);
        let server = http::serve(listener, routes, grpc::limits(NODE_CONNECTIONS), OpenConnections::default(), stop);
        tokio::select! {
            () = server => {}
            () = self.abandoned() => return Ok(Served::Abandoned),
            () = ended(engine_end) => return Err(NodeError::EngineEnded),
        }
        // The services are dropped and with them the last engine handles, so the engine ends.
        ended(engine_end).await;
        Ok(Served::Drained)
    }

    /// Updates the status of health checks when the engine stalls and when it recovers. When the shutdown begins, marks
    /// the node as draining and resolves.
    async fn watch_health(self, health: HealthReporter, names: [&'static str; 2]) {
        let mut watch = self.load.watch();
        let mut stalled = false;
        while !self.shutdown.has_begun() {
            tokio::select! {
                () = self.shutdown.cancelled() => {}
                () = self.load.changed(&mut watch) => {}
            }
            let now = watch.borrow_and_update().stalled;
            match (std::mem::replace(&mut stalled, now), now) {
                (false, true) => {
                    error!("the engine is stalled: its step exceeds the step timeout");
                    report_health(&health, &names, ServingStatus::NotServing).await;
                }
                (true, false) => report_health(&health, &names, ServingStatus::Serving).await,
                _ => {}
            }
        }
        self.load.drain();
        report_health(&health, &names, ServingStatus::NotServing).await;
        health.set_service_status("", ServingStatus::NotServing).await;
    }

    /// Resolves [`LAST_WORDS`] after a shutdown has finished all work: what still holds it up is clients that do not
    /// read.
    async fn abandoned(&self) {
        self.shutdown.cancelled().await;
        self.load.drained().await;
        tokio::time::sleep(LAST_WORDS).await;
    }
}

async fn report_health(health: &HealthReporter, names: &[&str], status: ServingStatus) {
    for name in names {
        health.set_service_status(name, status).await;
    }
}

/// Resolves when the engine thread has dropped its sender, that is, when it has ended.
async fn ended(end: &mut oneshot::Receiver<()>) {
    match end.await {
        Err(_) => {}
        Ok(()) => pending().await,
    }
}
