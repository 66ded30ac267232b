//! The router: takes requests over gRPC and the OpenAI HTTP API, leads each through a prefill and a decode node, and
//! gives back text.
//!
//! The way of one request: `openai` or `grpc` finds its model in the `catalog`, makes token ids of its text with
//! `prompt` and checks it into a `request::Generation`. `admission` lets it in, in an order that is fair between
//! `tenants`. `generate` leads it from attempt to attempt: `sequence` turns tokens into text, `retry` says what follows
//! a failed attempt. An `attempt` is one pass over one decode and one prefill node: `pick` chooses them from the view
//! that `nodes` keeps, and a node's `breaker` keeps requests from it after failures. `join` makes a node of an address.
//! `legs` measures where the time goes.
//!
//! Generated protobuf types stay at the edges: `grpc` and `wire` towards clients; `join` and the two streams of an
//! `attempt` towards nodes.

mod admission;
mod affinity;
mod args;
mod attempt;
mod breaker;
mod catalog;
mod error;
mod generate;
mod grpc;
mod join;
mod legs;
mod metrics;
mod node;
mod nodes;
mod openai;
mod pick;
mod prompt;
mod request;
mod retry;
mod sequence;
mod service;
mod tenants;
mod wire;

pub use args::{Args, Config};
pub use error::GenerateError;
pub use service::{Router, RouterError, main};

/// The parts that the simulation and the fuzz targets put together without a router around them.
pub mod parts {
    pub use crate::{
        generate::Core,
        metrics::Metrics,
        node::{NodeInfo, ServedModel},
        nodes::Nodes,
        openai::{BodyLimits, check_body},
        request::{Generation, MAX_STOPS, Output, check_length, check_prompt, check_stops, new_request_id},
        service::follow_capacity,
    };
}
