//! Names of tensors, in GGUF and in the Hugging Face layout.

const WHOLE: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];

const OF_A_LAYER: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// `blk.LAYER.MODULE.KIND`.
fn of_a_layer(name: &str) -> Option<(&str, &str, &str)> {
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.')?;
    Some((layer, module, kind))
}

/// The Hugging Face name of a tensor; its own where there is none.
pub(super) fn hugging_face(name: &str) -> String {
    if let Some((_, whole)) = WHOLE.iter().find(|(gguf, _)| *gguf == name) {
        return (*whole).into();
    }
    let translated = of_a_layer(name).and_then(|(layer, module, kind)| {
        let (_, module) = OF_A_LAYER.iter().find(|(gguf, _)| *gguf == module)?;
        Some(format!("model.layers.{layer}.{module}.{kind}"))
    });
    translated.unwrap_or_else(|| name.into())
}

/// The name that a file would have for a Hugging Face one.
pub(super) fn in_file(name: &str) -> String {
    if let Some((whole, _)) = WHOLE.iter().find(|(_, hugging_face)| *hugging_face == name) {
        return (*whole).into();
    }
    let translated = name.strip_prefix("model.layers.").and_then(|name| {
        let (layer, rest) = name.split_once('.')?;
        let (module, kind) = rest.rsplit_once('.')?;
        let (module, _) = OF_A_LAYER.iter().find(|(_, hugging_face)| *hugging_face == module)?;
        Some(format!("blk.{layer}.{module}.{kind}"))
    });
    translated.unwrap_or_else(|| name.into())
}

/// Is it the weight or bias of q or k, whose rows rotation pairs?
pub(super) fn is_rotated(name: &str) -> bool {
    of_a_layer(name).is_some_and(|(_, module, _)| matches!(module, "attn_q" | "attn_k"))
}
