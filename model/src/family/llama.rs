//! Llama 2 and 3.x, and all other models of class `LlamaForCausalLM`.

use super::{Defaults, Family, GgufFamily, GgufWindow, OwnFields, parameters::COMMON};

pub(super) const FAMILY: Family = Family {
    class: "LlamaForCausalLM",
    model_type: "llama",
    gguf: Some(GgufFamily {
        architecture: "llama",
        interleaved: true,
        fields: &[],
        window: GgufWindow::Of("MistralForCausalLM"),
    }),
    defaults: Defaults::LLAMA,
    modules: COMMON,
    norms_around_zero: false,
    partial_rotation: false,
    read: |fields, sizes| OwnFields::uniform(fields, sizes, None),
    keep_layers: |_, _| (),
};
