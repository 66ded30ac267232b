//! Code shared by all service processes: startup, the ready line, discovery, admin port, TLS, HTTP serving, shutdown.
//!
//! A service crate calls [`process::run`] with its checked configuration and a function that binds and serves. `run`
//! handles logs, signals and exit codes.

pub mod admin;
pub mod config;
pub mod discovery;
pub mod files;
pub mod grpc;
pub mod http;
pub mod metrics;
pub mod net;
pub mod process;
pub mod ready;
pub mod reloaded;
pub mod shutdown;
pub mod telemetry;
pub mod tls;
pub mod traces;

pub use admin::{Admin, AdminServer, Health, Started};
pub use config::ConfigError;
pub use metrics::MetricsError;
pub use process::{EXIT_CONFIG, EXIT_FAILURE, ProcessArgs};
pub use ready::ReadyLine;
pub use shutdown::Shutdown;
pub use telemetry::{LogFormat, init_telemetry};
pub use tls::{Tls, TlsArgs, TlsError};
