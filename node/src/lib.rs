//! Code shared by prefill and decode nodes: the process around a model and its engine.
//!
//! A node binds a [`Host`] (listeners, admin port, loaded model), creates its [`Identity`] and starts its engine. Then
//! [`Front::serve`] serves the role's gRPC service and the [`NodeService`] until the node has drained. [`NodeCore`]
//! holds the state that the parts of a running node share. [`request`] checks the request fields that both roles have.

mod args;
mod constraint;
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
mod transport;

pub use args::{MAX_DEADLINE_SECONDS, NodeArgs, NodeConfig, Variant, positive_seconds};
pub use constraint::{Constraint, Constraints};
pub use drain::Drain;
pub use engine::{Turn, spawn_engine};
pub use host::{Front, Host, NodeError, connections};
pub use identity::{Identity, new_incarnation};
pub use kv_plane::{KvListener, kv_dialer};
pub use load::{Load, LoadState};
pub use metrics::NodeMetrics;
pub use overfill_text::GrammarError;
pub use request::{Refused, RequestError, RequestLimits};
pub use serve::{NodeCore, RoleService, Served};
pub use service::NodeService;
pub use stream::{Ending, EventStream, ended_early, request_span};
pub use transport::{TransportArgs, TransportConfig};
