//! Builds a config.json from a GGUF file's metadata.

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::{Gguf, header::Metadata, text, tokenizer::Vocabulary};
use crate::{Family, Kind, ModelConfig, ModelError, Parameter, Rope, RopeScaling, family::GgufFamily, weights::Stored};

/// Fields of config.json, the corresponding metadata keys (after the architecture), and whether a file must have the
/// key. config.json has defaults for the optional fields.
const FIELDS: [(&str, &str, bool); 9] = [
    ("num_hidden_layers", "block_count", true),
    ("hidden_size", "embedding_length", true),
    ("intermediate_size", "feed_forward_length", true),
    ("num_attention_heads", "attention.head_count", true),
    ("num_key_value_heads", "attention.head_count_kv", false),
    ("head_dim", "attention.key_length", false),
    ("max_position_embeddings", "context_length", true),
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon", true),
    ("rope_theta", "rope.freq_base", false),
];

const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The family, and its properties in GGUF files.
fn found(metadata: &Metadata<'_>) -> Result<(&'static Family, &'static GgufFamily), ModelError> {
    let architecture = metadata.text("general.architecture")?;
    Family::of_gguf(architecture.as_deref()).map_err(|known| metadata.bad("general.architecture", &known))
}

/// Width of a head: the stated one, or the hidden size divided by the number of heads.
fn head_dim(metadata: &Metadata<'_>, architecture: &str) -> Result<usize, ModelError> {
    let key = |key: &str| format!("{architecture}.{key}");
    if let Some(stated) = metadata.index(&key("attention.key_length"))? {
        return even(metadata, &key("attention.key_length"), stated);
    }
    let heads = metadata.index(&key("attention.head_count"))?.filter(|heads| *heads > 0);
    let heads = heads.ok_or_else(|| metadata.bad(&key("attention.head_count"), "1 or more"))?;
    let hidden = metadata.index(&key("embedding_length"))?;
    let hidden = hidden.ok_or_else(|| metadata.bad(&key("embedding_length"), "1 or more"))?;
    even(metadata, &key("embedding_length"), hidden / heads)
}

fn even(metadata: &Metadata<'_>, key: &str, head_dim: usize) -> Result<usize, ModelError> {
    if head_dim == 0 || !head_dim.is_multiple_of(2) {
        return Err(metadata.bad(key, &format!("a value that gives heads of an even width (got {head_dim})")));
    }
    Ok(head_dim)
}

/// The family, and the width of a head if llama.cpp's converter interleaves the rows of q and k.
pub(super) fn family(metadata: &Metadata<'_>) -> Result<(&'static Family, Option<usize>), ModelError> {
    let (family, gguf) = found(metadata)?;
    let interleaved = if gguf.interleaved { Some(head_dim(metadata, gguf.architecture)?) } else { None };
    Ok((family, interleaved))
}

/// The configuration. Errors about numbers name the metadata key, because the generated config.json exists in no file.
pub(super) fn read(gguf: &Gguf) -> Result<ModelConfig, ModelError> {
    let metadata = gguf.metadata();
    let (family, GgufFamily { architecture, .. }) = found(&metadata)?;
    let key = |key: &str| format!("{architecture}.{key}");
    let mut json = Map::new();
    for (field, name, required) in FIELDS {
        let value = metadata.json(&key(name));
        if required && value.is_null() {
            return Err(metadata.bad(&key(name), "a number"));
        }
        json.insert(field.into(), value);
    }
    // Every layer has tensors. Rejects an excessive layer count before allocating the list of required tensors.
    let tensors = gguf.header.tensors.len();
    if metadata.index(&key("block_count"))?.is_some_and(|layers| layers > tensors) {
        return Err(metadata.bad(&key("block_count"), &format!("no more than the file's {tensors} tensors")));
    }
    let head_dim = head_dim(&metadata, architecture)?;
    json.insert("architectures".into(), json!([family.class]));
    json.insert("head_dim".into(), json!(head_dim));

    // Partial rotation and a different width of v are not supported.
    for same in ["rope.dimension_count", "attention.value_length"] {
        if metadata.index(&key(same))?.is_some_and(|n| n != head_dim) {
            return Err(metadata.bad(&key(same), &format!("the width of a head ({head_dim})")));
        }
    }
    if metadata.index(&key("expert_count"))?.is_some_and(|n| n > 0) {
        return Err(metadata.bad(&key("expert_count"), "0"));
    }
    // Sliding windows are not implemented. A window has no effect up to its width, so the context is limited to it.
    let window = metadata.index(&key("attention.sliding_window"))?.filter(|window| *window > 0);
    if let (Some(window), Some(context)) = (window, metadata.index(&key("context_length"))?) {
        json.insert("max_position_embeddings".into(), json!(context.min(window)));
    }

    let has = |parameter, kind| family.first_name(parameter, kind).is_some_and(|name| gguf.place(&name).is_some());
    let embedding = family.first_name(Parameter::Embedding, Kind::Weight).unwrap_or_default();
    let embedding = gguf.place(&embedding).ok_or_else(|| gguf.missing(&embedding, &[]))?;
    json.insert("vocab_size".into(), json!(embedding.shape[0]));
    json.insert("tie_word_embeddings".into(), json!(!has(Parameter::Head, Kind::Weight)));
    json.insert("attention_bias".into(), json!(has(Parameter::Query, Kind::Bias)));
    json.insert("mlp_bias".into(), json!(has(Parameter::Gate, Kind::Bias)));
    json.insert("rope_scaling".into(), rope_scaling(gguf, &metadata, architecture)?);
    // A generation_config.json next to the file may override these.
    if let Some(vocabulary) = Vocabulary::read(&metadata)? {
        json.insert("eos_token_id".into(), json!(text::end_token_ids(&metadata, &vocabulary)?));
    }

    let config = ModelConfig::from_json(&gguf.file, Value::Object(json)).map_err(|e| match e {
        ModelError::Unsupported { file, field, value, supported } => {
            let field = match FIELDS.iter().find(|(name, ..)| *name == field) {
                Some((_, name, _)) => key(name),
                None => field,
            };
            ModelError::Unsupported { file, field, value, supported }
        }
        other => other,
    })?;
    Ok(as_llama3(&config).unwrap_or(config))
}

/// Converts factors back to Llama 3.x's scaling, if llama.cpp's converter computed them from its parameters. The KV
/// schema is then the same as for safetensors, so the two models of a pair may use different formats.
fn as_llama3(config: &ModelConfig) -> Option<ModelConfig> {
    let [Rope { theta, scaling: RopeScaling::Factors(factors) }] = config.ropes.as_slice() else { return None };
    // All published models share the other three parameters. `factor` is the factor of the longest wave.
    let factor = f64::from(*factors.last()?);
    let json = json!({
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    let scaling = RopeScaling::Llama3 {
        factor,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let mut llama3 = ModelConfig { ropes: vec![Rope { theta: *theta, scaling }], ..config.clone() };
    llama3.raw.insert("rope_scaling".into(), json);
    let of = |config: &ModelConfig| config.inverse_frequencies().concat();
    let mut frequencies = of(config).into_iter().zip(of(&llama3));
    let near = |(a, b): (f32, f32)| (a - b).abs() <= 1e-5 * b;
    frequencies.all(near).then_some(llama3)
}

fn rope_scaling(gguf: &Gguf, metadata: &Metadata<'_>, architecture: &str) -> Result<Value, ModelError> {
    let key = |key: &str| format!("{architecture}.rope.scaling.{key}");
    let linear = match metadata.text(&key("type"))?.as_deref() {
        None | Some("none") => None,
        Some("linear") => Some(metadata.json(&key("factor"))),
        Some(_) => return Err(metadata.bad(&key("type"), "none, linear")),
    };
    let Some(place) = gguf.place(ROPE_FACTORS) else {
        return Ok(match linear {
            Some(factor) => json!({"rope_type": "linear", "factor": factor}),
            None => Value::Null,
        });
    };
    if linear.is_some() {
        return Err(metadata.bad(&key("type"), &format!("none, because the file has {ROPE_FACTORS}")));
    }
    if place.shape.len() != 1 || place.stored != Stored::Plain(Dtype::F32) {
        let found = format!("{:?} of shape {:?}", place.stored, place.shape);
        return Err(ModelError::unsupported(&gguf.file, ROPE_FACTORS, found, "F32 of one dimension"));
    }
    let mut factors = vec![0.0; place.shape[0]];
    place.read_rows(0..factors.len(), &mut factors)?;
    Ok(json!({"rope_type": "factors", "factors": factors}))
}
