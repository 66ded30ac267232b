//! Qwen2 and 2.5: q, k and v always have a bias, attention's output never has one.

use serde_json::{Map, Value};

use super::{
    Family, GgufFamily, GgufWindow, Module, OwnFields, Sizes, When, layers, llama,
    parameters::{
        ATTENTION_NORM, ATTENTION_OUTPUT, DOWN, EMBEDDING, FINAL_NORM, GATE, HEAD, KEY, MLP_NORM, QUERY, UP, VALUE,
    },
};
use crate::{ModelError, config::Fields};

const FULL_LAYERS: &str = "max_window_layers";

pub(super) const FAMILY: Family = Family {
    class: "Qwen2ForCausalLM",
    model_type: "qwen2",
    gguf: Some(GgufFamily {
        architecture: "qwen2",
        interleaved: false,
        fields: &[],
        window: GgufWindow::LimitsContext,
    }),
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
    ..llama::FAMILY
};

/// `use_sliding_window` says whether `sliding_window` applies. Without `layer_types`, it applies to the layers from
/// `max_window_layers` on.
pub(super) fn read(fields: Fields<'_>, sizes: Sizes) -> Result<OwnFields, ModelError> {
    let window = if fields.flag("use_sliding_window", false)? { layers::window(fields)? } else { None };
    let full = fields.count(FULL_LAYERS, 28)?;
    let sliding = layers::sliding(fields, sizes.layers, |layer| layer >= full)?;
    OwnFields::with_windows(fields, sizes, sliding.into_iter().map(|sliding| window.filter(|_| sliding)).collect())
}

/// Updates `max_window_layers`, which counts layers.
pub(super) fn keep_layers(raw: &mut Map<String, Value>, kept: &[u32]) {
    if let Some(count) = raw.get_mut(FULL_LAYERS).filter(|count| !count.is_null()) {
        let full = count.as_u64().unwrap_or(u64::MAX);
        *count = kept.iter().filter(|layer| u64::from(**layer) < full).count().into();
    }
}
