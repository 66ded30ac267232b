//! A model of random weights: as slow as a trained one.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use overfill_model::ModelConfig;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

const HIDDEN: usize = 512;
const INTERMEDIATE: usize = 1408;
const VOCABULARY: usize = 8192;

/// Writes a Llama of about 28 million parameters whose widths are cut by `ratio`, as pruning cuts them.
pub fn write(folder: &Path, ratio: f64) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    let cut = |width: usize| (width as f64 * (1.0 - ratio)) as usize;
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": cut(HIDDEN), "intermediate_size": cut(INTERMEDIATE), "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": true,
        "eos_token_id": 0, "bos_token_id": 1, "torch_dtype": "bfloat16",
    });
    fs::write(folder.join("config.json"), config.to_string())?;
    // Never used to read text, but nodes agree on its hash and a router parses it.
    let vocabulary: serde_json::Map<_, _> = (0..VOCABULARY).map(|id| (format!("w{id}"), json!(id))).collect();
    let tokenizer = json!({"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}});
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string())?;

    let config = ModelConfig::from_folder(folder)?;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = config
        .tensor_shapes()
        .into_iter()
        .map(|(name, shape)| {
            let data = fill(&shape, &mut state);
            (name, shape, data)
        })
        .collect();
    let mut views = Vec::new();
    for (name, shape, data) in &tensors {
        views.push((name.as_str(), TensorView::new(Dtype::BF16, shape.clone(), data)?));
    }
    let path = folder.join("model.safetensors");
    safetensors::serialize_to_file(views, None, &path).with_context(|| format!("writing {}", path.display()))
}

/// bf16 bytes: norms are 1, matrices uniform with a spread that keeps activations near 1.
fn fill(shape: &[usize], state: &mut u64) -> Vec<u8> {
    let spread = if shape.len() == 1 { None } else { shape.last().map(|&inputs| (3.0 / inputs as f32).sqrt()) };
    let mut data = Vec::with_capacity(2 * shape.iter().product::<usize>());
    for _ in 0..shape.iter().product() {
        let value = spread.map_or(1.0, |spread| spread * uniform(state));
        // The upper half of an f32 is a bf16, rounded towards zero.
        data.extend_from_slice(&value.to_le_bytes()[2..]);
    }
    data
}

/// In [-1, 1): xorshift64.
fn uniform(state: &mut u64) -> f32 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 40) as f32 / (1 << 23) as f32 - 1.0
}
