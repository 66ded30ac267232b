//! The router: takes requests over gRPC and the OpenAI HTTP API, leads each through a prefill and a decode node, and
//! gives back text.
//!
//! The way of one request: [`openai`] or [`grpc`] finds its model in the [`catalog`] and checks it into a [`request::Generation`]; [`admission`] lets it in, in an order that
//! is fair between [`tenants`];
//! [`generate`] leads it from attempt to attempt and turns tokens into text; [`attempt`] is one pass over one decode
//! and one prefill node, chosen by [`pick`] from the view that [`nodes`] keeps, as long as its [`breaker`] admits requests ([`join`] makes a node
//! of an address).

pub mod admission;
pub mod affinity;
pub mod args;
pub mod attempt;
pub mod breaker;
pub mod catalog;
pub mod error;
pub mod generate;
pub mod grpc;
pub mod join;
pub mod legs;
pub mod metrics;
pub mod node;
pub mod nodes;
pub mod openai;
pub mod pick;
pub mod prompt;
pub mod request;
pub mod service;
pub mod simulated;
pub mod tenants;
mod wire;

pub use args::{Args, Config};
pub use error::GenerateError;
pub use service::{Router, main};
