//! Models: configuration and weights from a Hugging Face folder or a GGUF file, one decoder block for all supported
//! families, the paged KV cache, and the sampler.
//!
//! An [`Engine`] serves. [`Decoder`] trains, and is the reference in tests. Two things vary in it: where attention finds keys
//! and values ([`Attention`]), and whether operations record gradients ([`Ops`]).

mod batch;
pub mod bench;
mod config;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod engine;
mod error;
mod family;
mod gguf;
mod hub;
mod loading;
mod options;
mod provenance;
mod rope;
mod sampler;
mod source;
mod tensor;
mod weights;

pub use batch::{Choice, Logits, Outputs, SequenceSlice, Want};
pub use config::ModelConfig;
pub use engine::{Engine, LayerSink, no_layers};
pub use error::ModelError;
pub use family::{Activation, Axis, Family, Kind, LayerSpec, Module, Parameter, Scales, TensorSpec, When};
pub use gguf::text_files;
pub use hub::{pull, resolve, wait_until_complete};
pub use loading::Model;
pub use options::{DeviceSpec, LoadOptions, Rows, WeightDtype, WeightFormat};
pub use provenance::{FullModel, Provenance};
pub use rope::{Rope, RopeScaling};
pub use sampler::{SamplingContext, TokenMask, report, sample};
pub use tensor::{
    AdamStep, Attention, Decoder, GradientSums, LayerKv, Observer, Ops, Ragged, Site, add_in_place, column_sums,
    ragged_attention, square_sum, zero_in_place,
};
pub use weights::{TensorInfo, Weights};
