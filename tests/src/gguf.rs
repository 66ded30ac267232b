//! Writes golden models as GGUF files.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// Writes a Llama model from a Hugging Face folder as a GGUF file in f32, in the layout of llama.cpp's converter.
pub fn write_llama(folder: &str, out: &Path) -> Result<()> {
    let json = |name: &str| -> Result<Value> { Ok(serde_json::from_slice(&fs::read(format!("{folder}/{name}"))?)?) };
    let config = json("config.json")?;
    ensure!(config["model_type"] == "llama" && config["rope_scaling"].is_null(), "{folder} is not a plain Llama");
    let size = |field: &str| config[field].as_u64().with_context(|| field.to_owned());
    let head_dim = size("head_dim")? as usize;

    let mut metadata = Entries::default();
    metadata.text("general.architecture", "llama");
    for (key, field) in [
        ("block_count", "num_hidden_layers"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("attention.key_length", "head_dim"),
        ("context_length", "max_position_embeddings"),
    ] {
        metadata.add(&format!("llama.{key}"), U32, &(size(field)? as u32).to_le_bytes());
    }
    for (key, field) in [("attention.layer_norm_rms_epsilon", "rms_norm_eps"), ("rope.freq_base", "rope_theta")] {
        let value = config[field].as_f64().context(field)? as f32;
        metadata.add(&format!("llama.{key}"), F32, &value.to_le_bytes());
    }
    add_tokenizer(&mut metadata, &json("tokenizer.json")?)?;
    metadata.text("tokenizer.chat_template", &fs::read_to_string(format!("{folder}/chat_template.jinja"))?);

    let (mut tensors, mut data) = (Entries::default(), Vec::new());
    for file in fs::read_dir(folder)? {
        let path = file?.path();
        if path.extension().is_some_and(|end| end == "safetensors") {
            add_tensors(&fs::read(path)?, head_dim, &mut tensors, &mut data)?;
        }
    }
    let mut bytes = [b"GGUF".as_slice(), &3_u32.to_le_bytes()].concat();
    bytes.extend([tensors.count.to_le_bytes(), metadata.count.to_le_bytes()].concat());
    bytes.extend(metadata.bytes);
    bytes.extend(tensors.bytes);
    bytes.resize(bytes.len().next_multiple_of(32), 0);
    bytes.extend(data);
    Ok(fs::write(out, bytes)?)
}

/// Encoded entries of a header, and their number.
#[derive(Default)]
struct Entries {
    count: u64,
    bytes: Vec<u8>,
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

impl Entries {
    fn add(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.count += 1;
        self.bytes.extend([&text(key), kind.to_le_bytes().as_slice(), value].concat());
    }

    fn text(&mut self, key: &str, value: &str) {
        self.add(key, TEXT, &text(value));
    }

    fn array(&mut self, key: &str, kind: u32, items: &[Vec<u8>]) {
        let length = (items.len() as u64).to_le_bytes();
        self.add(key, ARRAY, &[kind.to_le_bytes().as_slice(), &length, &items.concat()].concat());
    }
}

/// Adds the golden models' byte-level BPE tokenizer.
fn add_tokenizer(metadata: &mut Entries, tokenizer: &Value) -> Result<()> {
    let vocabulary = tokenizer["model"]["vocab"].as_object().context("vocab")?;
    let mut tokens: Vec<(u64, &String)> = Vec::new();
    for (token, id) in vocabulary {
        tokens.push((id.as_u64().context("id")?, token));
    }
    tokens.sort_unstable();
    let special: Vec<_> =
        tokenizer["added_tokens"].as_array().context("added_tokens")?.iter().map(|t| &t["id"]).collect();
    let kind = |id: &u64| if special.iter().any(|special| **special == *id) { 3_i32 } else { 1 };
    let merges = tokenizer["model"]["merges"].as_array().context("merges")?.iter().map(|merge| match merge {
        Value::String(merge) => text(merge),
        pair => text(&format!("{} {}", pair[0].as_str().unwrap_or_default(), pair[1].as_str().unwrap_or_default())),
    });
    metadata.text("tokenizer.ggml.model", "gpt2");
    metadata.text("tokenizer.ggml.pre", "gpt-2");
    metadata.array("tokenizer.ggml.tokens", TEXT, &tokens.iter().map(|(_, token)| text(token)).collect::<Vec<_>>());
    let kinds: Vec<_> = tokens.iter().map(|(id, _)| kind(id).to_le_bytes().to_vec()).collect();
    metadata.array("tokenizer.ggml.token_type", I32, &kinds);
    metadata.array("tokenizer.ggml.merges", TEXT, &merges.collect::<Vec<_>>());
    metadata.add("tokenizer.ggml.bos_token_id", U32, &0_u32.to_le_bytes());
    metadata.add("tokenizer.ggml.eos_token_id", U32, &1_u32.to_le_bytes());
    Ok(())
}

/// Adds the tensors of a safetensors file. They must be f32.
fn add_tensors(file: &[u8], head_dim: usize, tensors: &mut Entries, data: &mut Vec<u8>) -> Result<()> {
    let (length, rest) = file.split_first_chunk().context("a short file")?;
    let (header, body) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header: Value = serde_json::from_slice(header)?;
    for (name, info) in header.as_object().context("header")?.iter().filter(|(name, _)| *name != "__metadata__") {
        if info["dtype"] != "F32" {
            bail!("{name} is {}, not F32", info["dtype"]);
        }
        let shape: Vec<usize> = serde_json::from_value(info["shape"].clone())?;
        let range: [usize; 2] = serde_json::from_value(info["data_offsets"].clone())?;
        let stored = &body[range[0]..range[1]];
        let mut entry = (shape.len() as u32).to_le_bytes().to_vec();
        shape.iter().rev().for_each(|size| entry.extend((*size as u64).to_le_bytes()));
        entry.extend(0_u32.to_le_bytes());
        entry.extend((data.len() as u64).to_le_bytes());
        tensors.count += 1;
        tensors.bytes.extend([text(&gguf_name(name)), entry].concat());

        let row_bytes = stored.len() / shape[0];
        let rotated = name.contains("q_proj") || name.contains("k_proj");
        for row in 0..shape[0] {
            // In rotated heads, GGUF row 2i is row i, and row 2i + 1 is row i + head_dim / 2.
            let (head, within) = (row / head_dim, row % head_dim);
            let from = if rotated { head * head_dim + within / 2 + within % 2 * (head_dim / 2) } else { row };
            data.extend_from_slice(&stored[from * row_bytes..(from + 1) * row_bytes]);
        }
        data.resize(data.len().next_multiple_of(32), 0);
    }
    Ok(())
}

fn gguf_name(name: &str) -> String {
    [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ]
    .into_iter()
    .fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}
