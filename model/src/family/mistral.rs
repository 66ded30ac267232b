//! Mistral: Llama's block, with a sliding window in its first version.

use super::{Family, OwnFields, filling_heads, parameters::COMMON, sliding_window};

pub(super) const FAMILY: Family = Family {
    class: "MistralForCausalLM",
    model_type: "mistral",
    // llama.cpp's converter writes this family as `llama`.
    gguf: None,
    head_dim: filling_heads,
    modules: COMMON,
    read: |fields, layers, head_dim| OwnFields::uniform(fields, layers, head_dim, sliding_window(fields)?),
    keep_layers: |_, _| (),
};
