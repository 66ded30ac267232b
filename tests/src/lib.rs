//! Whole-cluster tests: real processes of the real binary, used through their public interfaces.
//!
//! This code is synchronous and uses plain threads.

pub mod certify;
pub mod cluster;
pub mod completion;
pub mod etcd;
pub mod gguf;
pub mod golden;
pub mod gpu;
pub mod metrics;
pub mod network;
pub mod python;
pub mod rig;
pub mod service;
pub mod wait;

pub use cluster::{Cluster, Refused};
pub use completion::{Completion, Request};
pub use etcd::Etcd;
pub use golden::Golden;
pub use metrics::Router;
pub use network::Network;
pub use rig::Rig;
pub use service::Service;
pub use wait::wait_for;
