//! OLMo 2: norms after attention and MLP only, and norms over the whole of q and k.

use super::{
    Defaults, Family, GgufFamily, GgufWindow, Module, llama,
    parameters::{
        ATTENTION_OUTPUT, ATTENTION_OUTPUT_NORM, Axis, DOWN, EMBEDDING, FINAL_NORM, GATE, HEAD, KEY, KEY_NORM,
        MLP_OUTPUT_NORM, Parameter, QUERY, QUERY_NORM, UP, VALUE,
    },
};

pub(super) const FAMILY: Family = Family {
    class: "Olmo2ForCausalLM",
    model_type: "olmo2",
    gguf: Some(GgufFamily { architecture: "olmo2", interleaved: false, fields: &[], window: GgufWindow::Refused }),
    defaults: Defaults { rms_norm_eps: 1e-5, ..Defaults::LLAMA },
    modules: &[
        EMBEDDING,
        QUERY,
        KEY,
        VALUE,
        Module { parts: &[(Parameter::QueryNorm, Axis::QueryHeads)], ..QUERY_NORM },
        Module { parts: &[(Parameter::KeyNorm, Axis::KvHeads)], ..KEY_NORM },
        ATTENTION_OUTPUT,
        ATTENTION_OUTPUT_NORM,
        GATE,
        UP,
        DOWN,
        MLP_OUTPUT_NORM,
        FINAL_NORM,
        HEAD,
    ],
    ..llama::FAMILY
};
