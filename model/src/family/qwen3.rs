//! Qwen3: an RMS norm on every head of q and k.

use super::{
    Defaults, Family, GgufFamily, GgufWindow, llama,
    parameters::{
        ATTENTION_NORM, ATTENTION_OUTPUT, DOWN, EMBEDDING, FINAL_NORM, GATE, HEAD, KEY, KEY_NORM, MLP_NORM, QUERY,
        QUERY_NORM, UP, VALUE,
    },
    qwen2,
};

pub(super) const FAMILY: Family = Family {
    class: "Qwen3ForCausalLM",
    model_type: "qwen3",
    gguf: Some(GgufFamily {
        architecture: "qwen3",
        interleaved: false,
        fields: &[],
        window: GgufWindow::LimitsContext,
    }),
    defaults: Defaults { head_dim: |_, _| 128, ..Defaults::LLAMA },
    modules: &[
        EMBEDDING,
        ATTENTION_NORM,
        MLP_NORM,
        QUERY,
        KEY,
        VALUE,
        ATTENTION_OUTPUT,
        GATE,
        UP,
        DOWN,
        QUERY_NORM,
        KEY_NORM,
        FINAL_NORM,
        HEAD,
    ],
    read: qwen2::read,
    keep_layers: qwen2::keep_layers,
    ..llama::FAMILY
};
