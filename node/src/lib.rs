//! What prefill and decode nodes share: the process around a model and its engine.
//!
//! A node binds a [`Host`] (listeners, admin port, the loaded model), says what it is ([`Identity`]), starts its engine, and
//! has the host serve its role's gRPC service beside the [`NodeService`] until the node has drained. A [`NodeCore`] is what
//! the parts of a running node have in common. The checks that both roles' requests share are in [`request`].

mod args;
mod drain;
mod engine;
mod host;
mod identity;
mod kv_plane;
pub mod load;
mod metrics;
pub mod request;
mod serve;
mod service;
mod stream;

pub use args::{MAX_DEADLINE_SECONDS, NodeArgs, NodeConfig};
pub use drain::Drain;
pub use engine::{Turn, spawn_engine};
pub use host::{Front, Host, NodeError, connections};
pub use identity::{Identity, new_incarnation};
pub use kv_plane::{KvListener, kv_dialer};
pub use load::{Load, LoadState};
pub use metrics::NodeMetrics;
pub use request::{Refused, RequestError, RequestLimits};
pub use serve::{NodeCore, RoleService, Served};
pub use service::NodeService;
pub use stream::{Ending, EventStream, ended_early};
