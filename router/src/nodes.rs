//! Membership: the set of usable nodes. One task per address connects to the node and follows its state.
//!
//! Addresses come from the command line, and from etcd or DNS. Discovery determines which addresses the router tries. Whether
//! a node is *used* depends only on the connection to it: a node that is no longer listed by etcd or DNS is used for as long
//! as it can be reached.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use overfill_cluster::{
    Shutdown,
    discovery::{Members, Registration, dns::Addresses},
};
use overfill_kv::Role;
use parking_lot::{Mutex, RwLock};
use rand::Rng as _;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::{
    Config,
    join::{JoinError, Joiner, Reports},
    node::{Node, NodeState, View},
};

const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// All known nodes. Clones share their state.
#[derive(Clone)]
pub struct Nodes {
    inner: Arc<Inner>,
}

struct Inner {
    states: Mutex<BTreeMap<Key, State>>,
    view: RwLock<Arc<View>>,
    /// Incremented on every change of the view or of a node's load. Requests that wait for room then try again.
    changed: watch::Sender<u64>,
    joiner: Joiner,
    /// URL scheme of nodes that discovery finds: http or https.
    scheme: &'static str,
}

/// State of one node address.
pub struct NodeStatus {
    /// URL of the node.
    pub url: String,
    /// Role that the node must have.
    pub role: Role,
    /// The node, while it is connected.
    pub node: Option<Arc<Node>>,
    /// Name of the node's pool. Empty if the router has never learnt it.
    pub pool: String,
    /// Whether the node gets requests, or the kind of reason why not.
    pub state: NodeState,
    /// Why the node gets no requests. Empty if it gets requests.
    pub error: String,
}

impl NodeStatus {
    /// Whether the node gets requests.
    pub fn is_healthy(&self) -> bool {
        self.state == NodeState::Up
    }
}

/// URL and role of a node.
type Key = (String, Role);

struct State {
    node: Option<Arc<Node>>,
    /// Name of the pool that the node had when it was last connected.
    pool: String,
    /// Why there is no node.
    away: NodeState,
    error: String,
    /// What discovery says about the address now. `None` if the address was given on the command line.
    listing: Option<watch::Sender<Discovered>>,
}

impl State {
    /// Name of the node's pool: from the node, else from etcd, else from the node that was connected last.
    fn pool(&self) -> String {
        let registered = || self.listing.as_ref()?.borrow().registration().map(|listed| listed.pool.clone());
        self.node.as_ref().map(|node| node.info.pool.clone()).or_else(registered).unwrap_or_else(|| self.pool.clone())
    }
}

/// What discovery says about an address.
#[derive(Clone, Debug, PartialEq)]
enum Discovered {
    /// It is no longer listed.
    Gone,
    /// DNS lists it.
    Address,
    /// It is registered in etcd.
    Registered(Box<Registration>),
}

impl Discovered {
    fn registration(&self) -> Option<&Registration> {
        match self {
            Self::Registered(registration) => Some(registration),
            Self::Gone | Self::Address => None,
        }
    }
}

/// The receiver of [`State::listing`], for the task that follows the node.
type Listing = Option<watch::Receiver<Discovered>>;

impl Nodes {
    /// Starts to follow the nodes at the configured addresses, until the shutdown begins.
    pub fn follow(config: &Config, shutdown: &Shutdown) -> Self {
        let nodes = Self {
            inner: Arc::new(Inner {
                states: Mutex::default(),
                view: RwLock::default(),
                changed: watch::Sender::new(0),
                joiner: Joiner::new(config.node_timeout, config.dialer.clone(), config.cluster.clone()),
                scheme: config.node_scheme(),
            }),
        };
        let prefill = config.prefill_urls.iter().map(|url| (url, Role::Prefill));
        for (url, role) in prefill.chain(config.decode_urls.iter().map(|url| (url, Role::Decode))) {
            let mut states = nodes.inner.states.lock();
            states.entry((url.clone(), role)).or_insert_with_key(|key| nodes.start(key.clone(), None, shutdown));
        }
        nodes
    }

    /// Also follows the nodes that are registered in etcd.
    pub fn follow_members(&self, members: watch::Receiver<Members>, shutdown: &Shutdown) {
        let scheme = self.inner.scheme;
        let registered = move |registration: &Registration| {
            ((registration.url(scheme), registration.role), Discovered::Registered(Box::new(registration.clone())))
        };
        self.follow_listed(members, move |members| members.values().map(registered).collect(), shutdown);
    }

    /// Also follows the nodes at the addresses that DNS has. Not together with [`follow_members`](Self::follow_members):
    /// each takes the other's nodes for gone.
    pub fn follow_addresses(&self, addresses: watch::Receiver<Addresses>, shutdown: &Shutdown) {
        let scheme = self.inner.scheme;
        let listed = move |addresses: &Addresses| {
            let key = |(address, role): &(_, Role)| (format!("{scheme}://{address}"), *role);
            addresses.iter().map(|address| (key(address), Discovered::Address)).collect()
        };
        self.follow_listed(addresses, listed, shutdown);
    }

    /// Follows the nodes that a source of discovery lists. `listing` converts what the source says.
    fn follow_listed<T: Send + Sync + 'static>(
        &self,
        mut source: watch::Receiver<T>,
        listing: impl Fn(&T) -> BTreeMap<Key, Discovered> + Send + Sync + 'static,
        shutdown: &Shutdown,
    ) {
        let (nodes, token, tasks) = (self.clone(), shutdown.token(), shutdown.clone());
        shutdown.spawn("members", async move {
            let follow = async {
                loop {
                    let listed = listing(&source.borrow_and_update());
                    nodes.list(listed, &tasks);
                    if source.changed().await.is_err() {
                        return;
                    }
                }
            };
            token.run_until_cancelled(follow).await;
        });
    }

    fn list(&self, mut listed: BTreeMap<Key, Discovered>, shutdown: &Shutdown) {
        let mut states = self.inner.states.lock();
        for (key, state) in states.iter() {
            let now = listed.remove(key).unwrap_or(Discovered::Gone);
            if let Some(listing) = &state.listing {
                listing.send_if_modified(|last| {
                    *last != now && {
                        *last = now;
                        true
                    }
                });
            }
        }
        for (key, listed) in listed {
            let state = self.start(key.clone(), Some(listed), shutdown);
            states.insert(key, state);
        }
    }

    /// Starts the task that follows one node.
    fn start(&self, key: Key, listed: Option<Discovered>, shutdown: &Shutdown) -> State {
        let (listing, receiver) = match listed {
            Some(listed) => {
                let (sender, receiver) = watch::channel(listed);
                (Some(sender), Some(receiver))
            }
            None => (None, None),
        };
        let (nodes, token) = (self.clone(), shutdown.token());
        shutdown.spawn("node", async move {
            token.run_until_cancelled(nodes.follow_one(key, receiver)).await;
        });
        State { node: None, pool: String::new(), away: NodeState::Down, error: "not yet reached".into(), listing }
    }

    /// The nodes that are up at the moment.
    pub fn view(&self) -> Arc<View> {
        self.inner.view.read().clone()
    }

    /// Notifies when a node joins, leaves or reports its load.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changed.subscribe()
    }

    /// The state of every address, for display.
    pub fn statuses(&self) -> Vec<NodeStatus> {
        let view = self.view();
        let states = self.inner.states.lock();
        let list = states.iter().map(|((url, role), state)| {
            let (now, error) = match &state.node {
                Some(node) if node.load().draining => (NodeState::Draining, JoinError::Draining.to_string()),
                Some(node) if !node.admits() => {
                    (NodeState::Paused, "it failed requests and is paused before the next try".into())
                }
                Some(node) => match unpaired(node, &view) {
                    Some(why) => (NodeState::Incompatible, why),
                    None => (NodeState::Up, String::new()),
                },
                None => (state.away, state.error.clone()),
            };
            let (url, node, pool) = (url.clone(), state.node.clone(), state.pool());
            NodeStatus { url, role: *role, node, pool, state: now, error }
        });
        list.collect()
    }

    /// A message that says why no node of `role` takes requests. It lists the errors of up to three nodes.
    pub fn trouble(&self, role: Role) -> String {
        let list = self.statuses();
        let mine = list.iter().filter(|status| status.role == role && !status.error.is_empty());
        let detail: Vec<_> = mine.take(3).map(|n| format!("{}: {}", n.url, n.error)).collect();
        if detail.is_empty() {
            return format!("no {role} node takes requests");
        }
        format!("no {role} node takes requests ({})", detail.join("; "))
    }

    async fn follow_one(self, key: Key, mut listing: Listing) {
        let (url, role) = (key.0.as_str(), key.1);
        let mut backoff = BACKOFF_MIN;
        let mut last_error = String::new();
        loop {
            let listed = listing.as_mut().map(|listing| listing.borrow_and_update().clone());
            if listed == Some(Discovered::Gone) {
                if self.forget(&key) {
                    info!(%url, %role, "node is no longer listed");
                    return;
                }
                continue;
            }
            match self.inner.joiner.join(url, role, listed.as_ref().and_then(Discovered::registration)).await {
                Ok((node, reports)) => {
                    backoff = BACKOFF_MIN;
                    last_error.clear();
                    info!(%url, %role, model = %node.info.model, incarnation = %node.info.incarnation, "node joined");
                    self.set(&key, Ok(node.clone()));
                    if let Some(why) = unpaired(&node, &self.view()) {
                        warn!(%url, %role, error = %why, "node has no compatible node of the other role");
                    }
                    let error = self.attend(&node, reports, &mut listing).await;
                    if matches!(error, JoinError::Draining) {
                        info!(%url, "node has drained");
                    } else {
                        warn!(%url, %error, "node left");
                        node.leave();
                    }
                    self.set(&key, Err((error.state(), error.to_string())));
                }
                Err(error) => {
                    let (state, error) = (error.state(), overfill_cluster::process::one_line(&error));
                    if error != last_error {
                        warn!(%url, %error, "node cannot join");
                        last_error.clone_from(&error);
                    }
                    self.set(&key, Err((state, error)));
                }
            }
            let jitter: f64 = rand::rng().random_range(0.5..1.0);
            tokio::select! {
                () = tokio::time::sleep(backoff.mul_f64(jitter)) => backoff = (backoff * 2).min(BACKOFF_MAX),
                () = listing_changed(&mut listing) => backoff = BACKOFF_MIN,
            }
        }
    }

    /// Processes a node's load reports until the node becomes unusable. Returns the reason.
    async fn attend(&self, node: &Node, mut reports: Reports, listing: &mut Listing) -> JoinError {
        loop {
            tokio::select! {
                report = reports.next() => match report {
                    Ok(Some(load)) if load.stalled => return JoinError::Stalled,
                    Ok(Some(load)) => {
                        let drains = load.draining && !node.load().draining;
                        node.set_load(load);
                        if drains {
                            self.renew_view(&self.inner.states.lock());
                        }
                        self.inner.changed.send_modify(|n| *n += 1);
                    }
                    Ok(None) if node.load().draining => return JoinError::Draining,
                    Ok(None) => return JoinError::Ended,
                    Err(error) => return error,
                },
                () = listing_changed(listing) => {
                    let listed = listing.as_ref().map(|listing| listing.borrow().clone());
                    let registered = listed.as_ref().and_then(Discovered::registration);
                    if registered.is_some_and(|now| now.incarnation != node.info.incarnation) {
                        return JoinError::Restarted;
                    }
                }
            }
        }
    }

    fn set(&self, key: &Key, result: Result<Arc<Node>, (NodeState, String)>) {
        let mut states = self.inner.states.lock();
        let Some(state) = states.get_mut(key) else { return };
        match result {
            Ok(node) => {
                state.pool.clone_from(&node.info.pool);
                (state.node, state.error) = (Some(node), String::new());
            }
            Err((away, error)) => (state.node, state.away, state.error) = (None, away, error),
        }
        self.renew_view(&states);
    }

    /// Removes a node that is no longer listed. Returns false if it has been listed again in the meantime.
    fn forget(&self, key: &Key) -> bool {
        let mut states = self.inner.states.lock();
        let gone =
            states.get(key).and_then(|state| state.listing.as_ref()).is_some_and(|l| *l.borrow() == Discovered::Gone);
        if gone {
            states.remove(key);
            self.renew_view(&states);
        }
        gone
    }

    /// Rebuilds the view. The caller holds the lock of the states, so that concurrent changes are published in order.
    fn renew_view(&self, states: &BTreeMap<Key, State>) {
        let up = |role| {
            let nodes = states.iter().filter(|((_, r), _)| *r == role).filter_map(|(_, state)| state.node.clone());
            nodes.filter(|node| !node.load().draining).collect()
        };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let mut view = self.inner.view.write();
        *view = Arc::new(View::new(up(Role::Prefill), up(Role::Decode), &view.models, now));
        // An address that is listed, but not up, is a node that starts or has failed.
        view.tell_pairs(|role| states.keys().any(|(_, listed)| *listed == role));
        drop(view);
        self.inner.changed.send_modify(|n| *n += 1);
    }
}

/// Resolves when what discovery says about the node changes. Never resolves if the address was given on the command line.
async fn listing_changed(listing: &mut Listing) {
    let changed = match listing {
        Some(listing) => listing.changed().await.is_ok(),
        None => false,
    };
    if !changed {
        std::future::pending().await
    }
}

/// The mismatch that keeps a node from being used: nodes of the other role are up, but none is compatible.
fn unpaired(node: &Node, view: &View) -> Option<String> {
    let (others, check): (_, fn(&Node, &Node) -> _) = match node.info.role {
        Role::Prefill => (&view.decode, View::check_pair),
        Role::Decode => (&view.prefill, |decode, prefill| View::check_pair(prefill, decode)),
    };
    let mut mismatch = None;
    for other in others {
        match check(node, other) {
            Ok(()) => return None,
            Err(e) => mismatch = Some(format!("{e} ({})", other.url)),
        }
    }
    mismatch
}
