//! Qwen2 and 2.5: q, k and v always have a bias, attention's output never has one.

use serde_json::{Map, Value};

use super::{
    Family, GgufFamily, Module, OwnFields, When, filling_heads,
    parameters::{
        ATTENTION_NORM, ATTENTION_OUTPUT, DOWN, EMBEDDING, FINAL_NORM, GATE, HEAD, KEY, MLP_NORM, QUERY, UP, VALUE,
    },
    sliding_window,
};
use crate::{ModelError, config::Fields};

pub(super) const FAMILY: Family = Family {
    class: "Qwen2ForCausalLM",
    model_type: "qwen2",
    gguf: Some(GgufFamily { architecture: "qwen2", interleaved: false }),
    head_dim: filling_heads,
    modules: &[
        EMBEDDING,
        ATTENTION_NORM,
        MLP_NORM,
        Module { bias: When::Always, ..QUERY },
        Module { bias: When::Always, ..KEY },
        Module { bias: When::Always, ..VALUE },
        Module { bias: When::Never, ..ATTENTION_OUTPUT },
        GATE,
        UP,
        DOWN,
        FINAL_NORM,
        HEAD,
    ],
    read,
    keep_layers,
};

/// `use_sliding_window` says whether `sliding_window` applies. In transformers, only layers from `max_window_layers` on
/// have the window. Here any window limits the context of the whole model, so every layer gets it.
pub(super) fn read(fields: Fields<'_>, layers: usize, head_dim: usize) -> Result<OwnFields, ModelError> {
    let window = if fields.flag("use_sliding_window", false)? { sliding_window(fields)? } else { None };
    OwnFields::uniform(fields, layers, head_dim, window)
}

/// Updates `max_window_layers`, which counts layers.
pub(super) fn keep_layers(raw: &mut Map<String, Value>, kept: &[u32]) {
    if let Some(count) = raw.get_mut("max_window_layers").filter(|count| !count.is_null()) {
        *count = kept.len().into();
    }
}
