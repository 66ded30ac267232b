//! Gemma 2: norms around 0, before and after attention and MLP, soft caps, and a window on every second layer.

use super::{
    Activation, Defaults, Family, GgufFamily, GgufWindow, LayerSpec, Module, OwnFields, Scales, Sizes, layers, llama,
    parameters::{
        ATTENTION_NORM, ATTENTION_OUTPUT, ATTENTION_OUTPUT_NORM, DOWN, EMBEDDING, FINAL_NORM, GATE, HEAD, KEY,
        MLP_NORM, MLP_OUTPUT_NORM, QUERY, UP, VALUE,
    },
};
use crate::{ModelError, config::Fields};

/// Every second layer attends to all tokens.
const PATTERN: usize = 2;

pub(super) const FAMILY: Family = Family {
    class: "Gemma2ForCausalLM",
    model_type: "gemma2",
    gguf: Some(GgufFamily {
        architecture: "gemma2",
        interleaved: false,
        fields: &[
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ],
        window: GgufWindow::Of("Gemma2ForCausalLM"),
    }),
    defaults: Defaults { head_dim: |_, _| 256, tie_word_embeddings: true, ..Defaults::LLAMA },
    modules: &[
        EMBEDDING,
        ATTENTION_NORM,
        QUERY,
        KEY,
        VALUE,
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
    norms_around_zero: true,
    read,
    keep_layers: |raw, kept| layers::write_types(raw, kept, layers::in_pattern(PATTERN)),
    ..llama::FAMILY
};

/// The norm of the MLP's input has a name of its own, since `post_attention_layernorm` is another norm.
pub(super) const PRE_MLP_NORM: Module = Module { name: "pre_feedforward_layernorm", ..MLP_NORM };

fn read(fields: Fields<'_>, sizes: Sizes) -> Result<OwnFields, ModelError> {
    let window = layers::window_or(fields, 4096)?;
    let score_cap = cap(fields, "attn_logit_softcapping", Some(50.0))?;
    let plain = LayerSpec { rope: Some(0), score_scale: Some(score_scale(fields)?), score_cap, ..LayerSpec::PLAIN };
    let sliding = layers::sliding(fields, sizes.layers, layers::in_pattern(PATTERN))?;
    let layer = |sliding| LayerSpec { window: window.filter(|_| sliding), ..plain.clone() };
    Ok(OwnFields {
        ropes: vec![fields.rope(10_000.0, sizes.rotary_dim)?],
        layers: sliding.into_iter().map(layer).collect(),
        activation: Activation::read(fields, "hidden_activation", "gelu_pytorch_tanh")?,
        scales: Scales {
            embedding: None,
            logit_cap: cap(fields, "final_logit_softcapping", Some(30.0))?,
            ..Scales::ONE
        },
    })
}

/// A soft cap; `None` if the field is null.
pub(super) fn cap(fields: Fields<'_>, field: &str, default: Option<f64>) -> Result<Option<f64>, ModelError> {
    fields.number_or_null(1e-3, 1e6, field, default)
}

/// The factor of the scores: `query_pre_attn_scalar` is the square of its inverse.
pub(super) fn score_scale(fields: Fields<'_>) -> Result<f64, ModelError> {
    Ok(fields.number_in(1e-6, 1e9, "query_pre_attn_scalar", Some(256.0))?.sqrt().recip())
}
