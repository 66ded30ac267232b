//! The router: takes requests over gRPC and the OpenAI HTTP API, runs each on a prefill and a decode node, and returns
//! text.
//!
//! The path of a request: `openai`, `anthropic` or `grpc` finds its model in the `catalog`, tokenizes its text with `prompt` and checks
//! it, which gives a `request::Generation`. `admission` admits sequences in an order that is fair between `tenants`.
//! `generate` runs the attempts of a sequence: `sequence` turns tokens into text, and `retry` decides what follows a failed
//! attempt. An `attempt` is one pass of a request over one decode and one prefill node. `pick` chooses them from the view
//! that `nodes` maintains, and a node's `breaker` stops requests to the node after failures. `join` connects to an address
//! and creates a node. `legs` measures where the time goes, `waiting` counts who waits, and `scaling` computes how much work each
//! pool has. `refresh` sets the gauges of `metrics`. `watch` has the full model score
//! some answers. `page` is the router's web page, `history` what it shows of the past.
//!
//! Generated protobuf types are used only at the edges: in `grpc` and `wire` towards clients, and in `join` and the two
//! streams of an `attempt` towards nodes.

mod admission;
mod affinity;
mod anthropic;
mod args;
mod attempt;
mod breaker;
mod catalog;
mod config;
mod constraints;
mod error;
mod generate;
mod grpc;
mod history;
mod http;
mod join;
mod legs;
mod metrics;
mod node;
mod nodes;
mod openai;
mod page;
mod pick;
mod prompt;
mod refresh;
mod request;
mod retry;
mod scaling;
mod sequence;
mod service;
mod settings;
mod tenants;
mod waiting;
mod watch;
mod wire;

pub use args::Args;
pub use config::Config;
pub use error::GenerateError;
pub use service::{Router, RouterError, main};
pub use settings::{RequestArgs, RequestSettings};
pub use tenants::ApiKeys;

/// Parts of the router that the simulation and the fuzz targets use separately.
pub mod parts {
    pub use crate::{
        generate::Core,
        metrics::Metrics,
        node::{NodeInfo, ServedModel},
        nodes::Nodes,
        openai::{BodyLimits, HttpApi, check_body},
        pick::{DecodeCandidate, PrefillCandidate, decode as pick_decode, prefill as pick_prefill},
        request::{Finished, Generation, MAX_STOPS, Output, check_length, check_prompt, check_stops, new_request_id},
        scaling::PoolWork,
        service::follow_capacity,
    };
}
