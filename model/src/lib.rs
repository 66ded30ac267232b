//! The models: configuration and weights of a Hugging Face folder or a GGUF file, one decoder block for all supported
//! families, the paged KV cache it attends to, and the sampler.
//!
//! The same [`Decoder`] serves and trains: what differs is where attention finds keys and values ([`Attention`]), and
//! whether its operations keep a gradient ([`Ops`]).

pub mod bench;
mod cache;
mod config;
mod cpu;
mod decoder;
mod differentiable;
mod error;
mod gguf;
mod kernels;
mod linear;
mod loading;
mod options;
mod paged;
mod provenance;
mod sampler;
mod weights;

pub use cache::KvCache;
pub use config::{Family, ModelConfig, RopeScaling};
pub use decoder::{Attention, Decoder, Observer, Ops, Site};
pub use error::ModelError;
pub use gguf::text_files;
pub use loading::Model;
pub use options::{DeviceSpec, LoadOptions, Rows, WeightDtype, WeightFormat, resolve};
pub use paged::{Logits, SequenceSlice, Want};
pub use provenance::{FullModel, Provenance};
pub use sampler::{report, sample};
pub use weights::{TensorInfo, Weights};
