//! The router's process: listeners, servers and shutdown.

use std::{io, net::SocketAddr, process::ExitCode, sync::Arc, time::Duration};

use overfill_cluster::{
    Admin, Health, MetricsError, ReadyLine, Shutdown, Started, discovery, files, grpc,
    http::{self, ConnectionLimits},
    metrics::CertificateExpiry,
    net::Listener,
    process,
};
use overfill_proto::{FILE_DESCRIPTOR_SET, MAX_MESSAGE_BYTES, v1};
use tokio::{
    net::TcpListener,
    time::{interval, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tracing::{info, warn};

use crate::{
    Args, Config,
    generate::Core,
    grpc::RouterService,
    http::trim_slashes,
    metrics::Metrics,
    nodes::Nodes,
    openai,
    page::{self, PageRights},
    refresh::{Open, Refresher},
};

/// Maximum time for the tasks that follow nodes to end at shutdown.
const MEMBERSHIP_END: Duration = Duration::from_secs(5);
/// Time that clients have to read the end of their streams after a shutdown has finished all requests.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// Interval at which a shutdown looks whether requests still run.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// An error that keeps the router from starting or running.
#[derive(Debug, thiserror::Error)]
pub enum RouterError {
    /// An address can't be bound.
    #[error("listening on {address}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The I/O error.
        source: io::Error,
    },
    /// Metrics could not be registered, which is a bug.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The reflection service could not be built, which is a bug.
    #[error("building the reflection service: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// A system call on a socket failed.
    #[error("system: {0}")]
    Io(#[from] io::Error),
}

/// A router with its listeners bound.
pub struct Router {
    config: Config,
    http: TcpListener,
    grpc: TcpListener,
    http_address: SocketAddr,
    grpc_address: SocketAddr,
}

impl Router {
    /// Binds both listeners.
    pub async fn bind(config: Config) -> Result<Self, RouterError> {
        let bind =
            async |address| TcpListener::bind(address).await.map_err(|source| RouterError::Bind { address, source });
        let (http, grpc) = (bind(config.http).await?, bind(config.grpc).await?);
        let (http_address, grpc_address) = (http.local_addr()?, grpc.local_addr()?);
        Ok(Self { config, http, grpc, http_address, grpc_address })
    }

    /// Bound address of HTTP.
    pub fn http_address(&self) -> SocketAddr {
        self.http_address
    }

    /// Bound address of gRPC.
    pub fn grpc_address(&self) -> SocketAddr {
        self.grpc_address
    }

    /// Serves until the shutdown has begun and the last request has ended.
    pub async fn run(self, shutdown: Shutdown) -> Result<(), RouterError> {
        let Self { config, http, grpc: grpc_listener, http_address, .. } = self;
        let metrics = Arc::new(Metrics::new()?);
        // Running requests still need the nodes after the shutdown has begun. The tasks that follow nodes therefore have
        // their own shutdown, which begins when the servers have ended.
        let membership = Shutdown::new();
        let nodes = Nodes::follow(&config, &membership);
        if let Some(etcd) = config.etcd.clone() {
            let last_success = metrics.discovery_success.with_label_values(&["etcd"]);
            nodes.follow_members(discovery::follow(etcd, &membership, last_success), &membership);
        }
        if let Some(dns) = config.dns.clone() {
            let last_success = metrics.discovery_success.with_label_values(&["dns"]);
            nodes.follow_addresses(discovery::dns::follow(dns, &membership, last_success), &membership);
        }
        let core = Core::new(nodes, metrics.clone(), &config);

        membership.spawn("capacity", follow_capacity(core.clone(), membership.token()));
        let (reporter, health) = tonic_health::server::health_reporter();
        reporter.set_serving::<v1::router_server::RouterServer<RouterService>>().await;
        let token = shutdown.token();
        membership.spawn("health", async move {
            token.cancelled().await;
            reporter.set_not_serving::<v1::router_server::RouterServer<RouterService>>().await;
            reporter.set_service_status("", ServingStatus::NotServing).await;
        });
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()?;
        let service = v1::router_server::RouterServer::new(RouterService::new(core.clone()))
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let routes = Routes::new(service).add_service(health).add_service(reflection).into_axum_router();
        let listener = Listener::new(grpc_listener, config.serve_tls.clone());
        let age = config.max_connection_age;
        let grpc_limits = ConnectionLimits { age, ..grpc::limits(config.max_connections) };
        let open = Open::default();
        let stop = shutdown.token().cancelled_owned();
        let grpc_server = http::serve(listener, routes, grpc_limits, open.grpc.clone(), stop);

        membership.spawn("history", follow_queue(core.clone(), membership.token()));
        let used = config.tls.iter().chain(&config.serve_tls).cloned().collect();
        let expiry = CertificateExpiry::new(&metrics.registry, used, config.etcd.as_ref())?;
        let refresher = Refresher { core: core.clone(), itl_limit: config.itl_limit, open: open.clone(), expiry };
        let mut app = openai::routes(core.clone(), config.max_body_bytes, &config.allowed_origins)
            .merge(admin(refresher, &shutdown).routes());
        if config.page {
            let rights = PageRights { drain_without_key: http_address.ip().is_loopback() };
            app = app.merge(page::routes(core.clone(), rights));
        }
        let http_limits = ConnectionLimits { age, ..ConnectionLimits::http(config.max_connections) };
        let (listener, stop) = (Listener::new(http, config.serve_tls), shutdown.token().cancelled_owned());
        let http_server = http::serve(listener, trim_slashes(app), http_limits, open.http, stop);
        let servers = async { tokio::join!(grpc_server, http_server) };
        tokio::select! {
            _ = servers => {}
            () = over(&core, &shutdown, config.drain_timeout) => {}
        }
        shutdown.begin();
        membership.begin();
        if !core.watch.close(MEMBERSHIP_END).await {
            warn!(seconds = MEMBERSHIP_END.as_secs(), "tasks that wait for scores have not ended");
        }
        if !membership.wait(MEMBERSHIP_END).await {
            warn!(seconds = MEMBERSHIP_END.as_secs(), "tasks that follow nodes have not ended");
        }
        info!("router has ended");
        Ok(())
    }
}

/// Resolves when the shutdown need not wait any longer: no sequence runs or waits, and clients had time to read the end of
/// their streams; or `drain_timeout` has passed. What still holds the servers up then is streams that only clients end,
/// such as health checks.
async fn over(core: &Core, shutdown: &Shutdown, drain_timeout: Duration) {
    shutdown.cancelled().await;
    let drained = async {
        let mut look = interval(LOOK_INTERVAL);
        while core.admission.running() + core.admission.waiting() + core.catalog.waiting() > 0 {
            look.tick().await;
        }
        sleep(LAST_WORDS).await;
    };
    if timeout(drain_timeout, drained).await.is_err() {
        warn!(seconds = drain_timeout.as_secs(), "requests still run at the end of the drain timeout");
    }
}

/// Keeps the capacity of each model in admission control equal to what its nodes can compute at once.
pub async fn follow_capacity(core: Core, stop: CancellationToken) {
    let mut changes = core.nodes.changes();
    let follow = async {
        loop {
            let view = core.nodes.view();
            for name in view.models.keys() {
                core.admission.set_capacity(name, view.capacity(name));
            }
            if changes.changed().await.is_err() {
                return;
            }
        }
    };
    stop.run_until_cancelled(follow).await;
}

/// Records every second how many sequences wait, for the page.
async fn follow_queue(core: Core, stop: CancellationToken) {
    let mut turn = interval(Duration::from_secs(1));
    let follow = async {
        loop {
            turn.tick().await;
            core.metrics.history.waiting(core.admission.waiting() + core.catalog.waiting());
        }
    };
    stop.run_until_cancelled(follow).await;
}

/// The admin routes (health and metrics), based on the router's state.
fn admin(refresher: Refresher, shutdown: &Shutdown) -> Admin {
    let (shutdown, catalog) = (shutdown.clone(), refresher.core.catalog.clone());
    let ready = move || {
        if shutdown.has_begun() {
            return Health::NotServing("shutting down".into());
        }
        catalog.missing().map_or(Health::Serving, Health::Waiting)
    };
    let registry = refresher.core.metrics.registry.clone();
    let admin = Admin::default();
    admin.start(Started { registry, ready: Box::new(ready), refresh: Box::new(move || refresher.refresh()) });
    admin
}

/// Runs the router as a program and returns its exit code.
pub async fn main(args: Args) -> ExitCode {
    let process = args.process.clone();
    process::run("overfill-router", &process, args.validate(), async |config, shutdown| {
        let max = config.max_connections;
        files::raise(ConnectionLimits::http(max).files() + grpc::limits(max).files());
        let router = Router::bind(config).await?;
        let (http, grpc) = (router.http_address(), router.grpc_address());
        info!(%http, %grpc, "router is ready");
        ReadyLine { role: "router".into(), grpc, http: Some(http), kv: None, admin: Some(http) }.print();
        router.run(shutdown).await
    })
    .await
}
