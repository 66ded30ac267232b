//! Mistral: Llama's block, with a sliding window in its first version.

use super::{Family, OwnFields, layers, llama};

pub(super) const FAMILY: Family = Family {
    class: "MistralForCausalLM",
    model_type: "mistral",
    // llama.cpp's converter writes this family as `llama`.
    gguf: None,
    read: |fields, sizes| OwnFields::uniform(fields, sizes, layers::window(fields)?),
    ..llama::FAMILY
};
