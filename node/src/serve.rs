//! A running node, without what is its role's.

use std::{future::pending, sync::Arc, time::Duration};

use overfill_cluster::{
    Shutdown,
    grpc::{self, NODE_CONNECTIONS},
    http,
    net::Connection,
};
use overfill_net::Listen;
use overfill_proto::{FILE_DESCRIPTOR_SET, v1::node_server::NodeServer};
use tokio::sync::oneshot;
use tonic::{server::NamedService, service::Routes};
use tonic_health::{ServingStatus, server::HealthReporter};
use tracing::error;

use crate::{Drain, Identity, LoadState, NodeError, NodeService, RequestLimits};

/// How long a client may take to read the end of its stream once the node has nothing else to do.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// What the parts of a running node have in common. Clones are the same node.
#[derive(Clone)]
pub struct NodeCore {
    /// What the node is.
    pub identity: Arc<Identity>,
    /// What it is doing.
    pub load: Arc<LoadState>,
    /// Ends it.
    pub shutdown: Shutdown,
    /// Says when requests that still run must go.
    pub drain: Drain,
}

/// A role's gRPC service, and its name in health checks.
pub struct RoleService {
    name: &'static str,
    routes: Routes,
}

impl RoleService {
    /// The service of type `S`, with its routes.
    pub fn new<S: NamedService>(routes: Routes) -> Self {
        Self { name: S::NAME, routes }
    }
}

/// How serving ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// All streams have ended.
    Drained,
    /// Nothing is left but clients that do not read the ends of their streams.
    Abandoned,
}

impl NodeCore {
    /// A node of this identity. What still runs when `shutdown` begins has `drain_timeout`.
    pub fn new(identity: Identity, load: Arc<LoadState>, shutdown: &Shutdown, drain_timeout: Duration) -> Self {
        let drain = Drain::new(shutdown, drain_timeout);
        Self { identity: Arc::new(identity), load, shutdown: shutdown.clone(), drain }
    }

    /// What its requests are checked against. `default_deadline` is for requests without a deadline of their own.
    pub fn request_limits(&self, default_deadline: Duration) -> RequestLimits {
        RequestLimits { identity: self.identity.clone(), default_deadline }
    }

    /// Serves the role's service and the node's own until the shutdown begins and what runs then has ended.
    /// `engine_end` is what [`crate::spawn_engine`] gave.
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
        let server = http::serve(listener, routes, grpc::limits(NODE_CONNECTIONS), stop);
        tokio::select! {
            () = server => {}
            () = self.abandoned() => return Ok(Served::Abandoned),
            () = ended(engine_end) => return Err(NodeError::EngineEnded),
        }
        // The services are gone, and with them the last way into the engine.
        ended(engine_end).await;
        Ok(Served::Drained)
    }

    /// Tells health checks when the engine hangs and when it goes on. Resolves when the shutdown begins.
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
                    error!("the engine does not get on with its work");
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

    /// Resolves when a shutdown has nothing left to wait for but clients who do not read their last words.
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

/// Resolves when the engine has ended.
async fn ended(end: &mut oneshot::Receiver<()>) {
    match end.await {
        Err(_) => {}
        Ok(()) => pending().await,
    }
}
