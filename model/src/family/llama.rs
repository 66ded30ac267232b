//! Llama 2 and 3.x, and all other models of class `LlamaForCausalLM`.

use super::{Family, GgufFamily, OwnFields, filling_heads, parameters::COMMON};

pub(super) const FAMILY: Family = Family {
    class: "LlamaForCausalLM",
    model_type: "llama",
    gguf: Some(GgufFamily { architecture: "llama", interleaved: true }),
    head_dim: filling_heads,
    modules: COMMON,
    read: |fields, layers, head_dim| OwnFields::uniform(fields, layers, head_dim, None),
    keep_layers: |_, _| (),
};
