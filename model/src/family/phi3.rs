//! Phi-3 and Phi-4: Llama's block with fused tensors, LongRoPE, and in Phi-4-mini heads that are rotated in part.

use super::{
    Defaults, Family, GgufFamily, GgufWindow, Module, OwnFields, When, layers, llama,
    parameters::{
        ATTENTION_NORM, ATTENTION_OUTPUT, Axis, DOWN, EMBEDDING, FINAL_NORM, GATE, HEAD, MLP_NORM, Parameter, QUERY,
    },
};

pub(super) const FAMILY: Family = Family {
    class: "Phi3ForCausalLM",
    model_type: "phi3",
    gguf: Some(GgufFamily {
        architecture: "phi3",
        interleaved: false,
        fields: &[("original_max_position_embeddings", "rope.scaling.original_context_length")],
        window: GgufWindow::Of("Phi3ForCausalLM"),
    }),
    defaults: Defaults { rms_norm_eps: 1e-5, ..Defaults::LLAMA },
    modules: &[
        EMBEDDING,
        ATTENTION_NORM,
        MLP_NORM,
        Module {
            name: "self_attn.qkv_proj",
            gguf: "attn_qkv",
            parts: &[
                (Parameter::Query, Axis::QueryHeads),
                (Parameter::Key, Axis::KvHeads),
                (Parameter::Value, Axis::KvHeads),
            ],
            bias: When::Never,
            ..QUERY
        },
        Module { bias: When::Never, ..ATTENTION_OUTPUT },
        Module {
            name: "mlp.gate_up_proj",
            gguf: "ffn_up",
            parts: &[(Parameter::Gate, Axis::Intermediate), (Parameter::Up, Axis::Intermediate)],
            bias: When::Never,
            ..GATE
        },
        Module { bias: When::Never, ..DOWN },
        FINAL_NORM,
        HEAD,
    ],
    partial_rotation: true,
    read: |fields, sizes| OwnFields::uniform(fields, sizes, layers::window(fields)?),
    ..llama::FAMILY
};
