//! Gemma 3, text only: Gemma 2 with norms on the heads of q and k instead of soft caps, and a rope of their own for layers
//! with windows.

use serde_json::{Map, Value};

use super::{
    Activation, Family, GgufFamily, GgufWindow, LayerSpec, OwnFields, Scales, Sizes,
    gemma2::{self, PRE_MLP_NORM, cap, score_scale},
    layers,
    parameters::{
        ATTENTION_NORM, ATTENTION_OUTPUT, ATTENTION_OUTPUT_NORM, DOWN, EMBEDDING, FINAL_NORM, GATE, HEAD, KEY,
        KEY_NORM, MLP_OUTPUT_NORM, QUERY, QUERY_NORM, UP, VALUE,
    },
};
use crate::{ModelError, Rope, RopeScaling, config::Fields};

/// Older configurations state this instead of `layer_types`: every layer of this number attends to all tokens.
const PATTERN: &str = "sliding_window_pattern";
const DEFAULT_PATTERN: usize = 6;

pub(super) const FAMILY: Family = Family {
    class: "Gemma3ForCausalLM",
    model_type: "gemma3_text",
    gguf: Some(GgufFamily {
        architecture: "gemma3",
        interleaved: false,
        fields: &[
            ("final_logit_softcapping", "final_logit_softcapping"),
            ("sliding_window_pattern", "attention.sliding_window_pattern"),
            ("rope_local_base_freq", "rope.freq_base_swa"),
        ],
        window: GgufWindow::Of("Gemma3ForCausalLM"),
    }),
    modules: &[
        EMBEDDING,
        ATTENTION_NORM,
        QUERY,
        KEY,
        VALUE,
        QUERY_NORM,
        KEY_NORM,
        ATTENTION_OUTPUT,
        ATTENTION_OUTPUT_NORM,
        PRE_MLP_NORM,
        GATE,
        UP,
        DOWN,
        MLP_OUTPUT_NORM,
        FINAL_NORM,
        HEAD,
    ],
    read,
    keep_layers,
    ..gemma2::FAMILY
};

fn read(fields: Fields<'_>, sizes: Sizes) -> Result<OwnFields, ModelError> {
    if fields.flag("use_bidirectional_attention", false)? {
        return Err(fields.bad("use_bidirectional_attention", "false"));
    }
    let window = layers::window_or(fields, 4096)?;
    let score_cap = cap(fields, "attn_logit_softcapping", None)?;
    if score_cap.is_some() {
        // transformers reads the field, but does not apply it.
        return Err(fields.bad("attn_logit_softcapping", "null"));
    }
    let score_scale = Some(score_scale(fields)?);
    let pattern = fields.size(PATTERN, Some(DEFAULT_PATTERN))?;
    let sliding = layers::sliding(fields, sizes.layers, layers::in_pattern(pattern))?;
    let layer = |sliding| LayerSpec {
        rope: Some(usize::from(sliding)),
        window: window.filter(|_| sliding),
        score_scale,
        score_cap: None,
    };
    let local = Rope { theta: fields.local_theta()?, scaling: RopeScaling::None };
    Ok(OwnFields {
        ropes: vec![fields.rope(1e6, sizes.rotary_dim)?, local],
        layers: sliding.into_iter().map(layer).collect(),
        activation: Activation::read(fields, "hidden_activation", "gelu_pytorch_tanh")?,
        scales: Scales { embedding: None, logit_cap: cap(fields, "final_logit_softcapping", None)?, ..Scales::ONE },
    })
}

fn keep_layers(raw: &mut Map<String, Value>, kept: &[u32]) {
    let pattern = raw.get(PATTERN).and_then(Value::as_u64).map_or(DEFAULT_PATTERN, |pattern| pattern as usize);
    layers::write_types(raw, kept, layers::in_pattern(pattern));
}
