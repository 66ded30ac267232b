//! Writes GGUF files from Hugging Face folders, like llama.cpp's convert_hf_to_gguf.py.

use std::{collections::HashMap, fs, path::Path};

use candle_core::{
    DType, Device, Tensor,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{self, Value},
    },
};
use overfill_model::{ModelConfig, Rope, RopeScaling, Weights};
use serde_json::Value as Json;

/// The content of a file. Tests may change it before writing.
pub struct Parts {
    pub metadata: Vec<(String, Value)>,
    pub tensors: Vec<(String, QTensor)>,
}

impl Parts {
    pub fn set(&mut self, key: &str, value: Value) {
        self.metadata.retain(|(name, _)| name != key);
        self.metadata.push((key.into(), value));
    }

    pub fn remove(&mut self, key: &str) {
        self.metadata.retain(|(name, _)| name != key);
    }

    pub fn write(&self, file: &Path) {
        let metadata: Vec<(&str, &Value)> = self.metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let tensors: Vec<(&str, &QTensor)> = self.tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
        gguf_file::write(&mut fs::File::create(file).unwrap(), &metadata, &tensors).unwrap();
    }
}

pub fn texts<T: ToString>(items: impl IntoIterator<Item = T>) -> Value {
    Value::Array(items.into_iter().map(|item| Value::String(item.to_string())).collect())
}

/// Reorders rows like the converter reorders those of q and k: per head, `[2, half]` becomes `[half, 2]`.
fn permute(tensor: &Tensor, head_dim: usize) -> Tensor {
    let (shape, heads) = (tensor.dims().to_vec(), tensor.dim(0).unwrap() / head_dim);
    let split = tensor.reshape((heads, 2, head_dim / 2, shape[1..].iter().product::<usize>())).unwrap();
    split.transpose(1, 2).unwrap().contiguous().unwrap().reshape(shape).unwrap()
}

fn gguf_name(name: &str, architecture: &str) -> String {
    let fixed = [("model.embed_tokens.", "token_embd."), ("model.norm.", "output_norm."), ("lm_head.", "output.")];
    for (from, to) in fixed {
        if let Some(rest) = name.strip_prefix(from) {
            return format!("{to}{rest}");
        }
    }
    let mut name = name.replace("model.layers.", "blk.");
    // The norm of the MLP's input, unless there is another one for it.
    let norm = if matches!(architecture, "gemma2" | "gemma3" | "olmo2") { "post_attention_norm" } else { "ffn_norm" };
    for (from, to) in [
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", norm),
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
        ("self_attn.qkv_proj", "attn_qkv"),
        ("mlp.gate_up_proj", "ffn_up"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ] {
        name = name.replace(from, to);
    }
    name
}

/// The content of a GGUF file for `folder`'s model, with matrices stored as `dtype`.
pub fn parts(folder: &Path, dtype: GgmlDType) -> Parts {
    let (config, weights) = (ModelConfig::from_folder(folder).unwrap(), Weights::open(folder).unwrap());
    let class = config.raw["architectures"][0].as_str().unwrap();
    let architecture = HashMap::from([
        ("LlamaForCausalLM", "llama"),
        ("MistralForCausalLM", "llama"),
        ("Qwen2ForCausalLM", "qwen2"),
        ("Qwen3ForCausalLM", "qwen3"),
        ("Gemma2ForCausalLM", "gemma2"),
        ("Gemma3ForCausalLM", "gemma3"),
        ("Phi3ForCausalLM", "phi3"),
        ("SmolLM3ForCausalLM", "smollm3"),
        ("Olmo2ForCausalLM", "olmo2"),
        ("GraniteForCausalLM", "granite"),
    ])[class];
    let mut tensors = Vec::new();
    for (name, shape) in config.tensor_shapes() {
        let mut tensor = weights.load(&name, &shape, &Device::Cpu).unwrap();
        if matches!(architecture, "llama" | "smollm3" | "granite")
            && (name.contains("q_proj") || name.contains("k_proj"))
        {
            tensor = permute(&tensor, config.head_dim);
        }
        if architecture.starts_with("gemma") && shape.len() == 1 {
            tensor = (tensor.to_dtype(DType::F32).unwrap() + 1.0).unwrap();
        }
        let stored = if shape.len() == 1 { GgmlDType::F32 } else { dtype };
        tensors.push((gguf_name(&name, architecture), QTensor::quantize(&tensor, stored).unwrap()));
    }
    let mut metadata: Vec<(String, Value)> = Vec::new();
    let mut add = |key: &str, value: Value| metadata.push((key.replace("ARCH", architecture), value));
    let size = |n: usize| Value::U32(n as u32);
    add("general.architecture", Value::String(architecture.into()));
    add("ARCH.block_count", size(config.num_hidden_layers));
    add("ARCH.embedding_length", size(config.hidden_size));
    add("ARCH.feed_forward_length", size(config.intermediate_size));
    add("ARCH.attention.head_count", size(config.num_attention_heads));
    add("ARCH.attention.head_count_kv", size(config.num_key_value_heads));
    add("ARCH.attention.key_length", size(config.head_dim));
    add("ARCH.attention.value_length", size(config.head_dim));
    add("ARCH.rope.dimension_count", size(config.rotary_dim));
    add("ARCH.context_length", size(config.max_position_embeddings));
    add("ARCH.attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps as f32));
    add("ARCH.rope.freq_base", Value::F32(config.ropes[0].theta as f32));
    add_tokenizer(folder, &mut add);
    // Fields of config.json that some families have.
    for (key, field) in [
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
        ("attention.scale", "attention_multiplier"),
        ("embedding_scale", "embedding_multiplier"),
        ("residual_scale", "residual_multiplier"),
        ("logit_scale", "logits_scaling"),
    ] {
        if let Some(value) = config.raw.get(field).and_then(Json::as_f64) {
            add(&format!("ARCH.{key}"), Value::F32(value as f32));
        }
    }
    for (key, field) in [
        ("attention.sliding_window", "sliding_window"),
        ("attention.sliding_window_pattern", "sliding_window_pattern"),
        ("rope.scaling.original_context_length", "original_max_position_embeddings"),
    ] {
        if let Some(value) = config.raw.get(field).and_then(Json::as_u64) {
            add(&format!("ARCH.{key}"), Value::U32(value as u32));
        }
    }
    match &config.ropes[0].scaling {
        RopeScaling::None => {}
        RopeScaling::Linear { factor } => {
            add("ARCH.rope.scaling.type", Value::String("linear".into()));
            add("ARCH.rope.scaling.factor", Value::F32(*factor as f32));
        }
        RopeScaling::Llama3 { .. } => tensors.push(rope_factors(&config)),
        RopeScaling::Yarn { factor, original_max_position_embeddings, .. } => {
            add("ARCH.rope.scaling.type", Value::String("yarn".into()));
            add("ARCH.rope.scaling.factor", Value::F32(*factor as f32));
            add("ARCH.rope.scaling.original_context_length", Value::U32(*original_max_position_embeddings));
        }
        RopeScaling::Factors { attention_factor, .. } => {
            add("ARCH.rope.scaling.attn_factor", Value::F32(*attention_factor as f32));
            for length in ["short", "long"] {
                let factors = config.raw["rope_scaling"][format!("{length}_factor")].as_array().unwrap();
                let factors: Vec<f32> = factors.iter().map(|factor| factor.as_f64().unwrap() as f32).collect();
                let tensor = QTensor::quantize(&Tensor::new(factors, &Device::Cpu).unwrap(), GgmlDType::F32).unwrap();
                tensors.push((format!("rope_factors_{length}.weight"), tensor));
            }
        }
        _ => panic!("the test does not write {:?}", config.ropes[0].scaling),
    }
    Parts { metadata, tensors }
}

/// The converter's rope factors: unscaled frequencies divided by scaled ones.
pub fn rope_factors(config: &ModelConfig) -> (String, QTensor) {
    let (rope, head_dim) = (&config.ropes[0], config.head_dim);
    let unscaled = Rope { scaling: RopeScaling::None, ..rope.clone() };
    let pairs = unscaled.inverse_frequencies(head_dim).into_iter().zip(rope.inverse_frequencies(head_dim));
    let factors = Tensor::from_iter(pairs.map(|(plain, scaled)| plain / scaled), &Device::Cpu).unwrap();
    ("rope_freqs.weight".into(), QTensor::quantize(&factors, GgmlDType::F32).unwrap())
}

fn add_tokenizer(folder: &Path, add: &mut dyn FnMut(&str, Value)) {
    let json = |name: &str| -> Json { serde_json::from_slice(&fs::read(folder.join(name)).unwrap()).unwrap() };
    let tokenizer = json("tokenizer.json");
    let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
    let mut tokens: Vec<(u64, &str)> = vocab.iter().map(|(token, id)| (id.as_u64().unwrap(), token.as_str())).collect();
    tokens.sort_unstable();
    let special: Vec<u64> =
        tokenizer["added_tokens"].as_array().unwrap().iter().map(|t| t["id"].as_u64().unwrap()).collect();
    let merges = tokenizer["model"]["merges"].as_array().unwrap().iter().map(|merge| match merge {
        Json::String(merge) => merge.clone(),
        pair => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
    });
    add("tokenizer.ggml.model", Value::String("gpt2".into()));
    add("tokenizer.ggml.pre", Value::String("gpt-2".into()));
    add("tokenizer.ggml.tokens", texts(tokens.iter().map(|(_, token)| token)));
    let kinds = tokens.iter().map(|(id, _)| Value::I32(if special.contains(id) { 3 } else { 1 }));
    add("tokenizer.ggml.token_type", Value::Array(kinds.collect()));
    add("tokenizer.ggml.merges", texts(merges));
    let generation = json("generation_config.json");
    for (key, field) in [("bos", "bos_token_id"), ("eos", "eos_token_id")] {
        let id = generation[field].as_u64().unwrap();
        add(&format!("tokenizer.ggml.{key}_token_id"), Value::U32(id as u32));
    }
    let template = fs::read_to_string(folder.join("chat_template.jinja")).unwrap();
    add("tokenizer.chat_template", Value::String(template));
}
