//! Builds a config.json from a GGUF file's metadata.

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::{Gguf, header::Metadata, text, tokenizer::Vocabulary};
use crate::{
    Family, Kind, ModelConfig, ModelError, Parameter, Rope, RopeScaling,
    family::{GgufFamily, GgufWindow},
    weights::Stored,
};

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

const WINDOW: &str = "attention.sliding_window";
const PATTERN: &str = "sliding_window_pattern";
const ROPE_FACTORS: &str = "rope_freqs.weight";
/// LongRoPE's, for contexts up to the original one and beyond.
const LONGROPE_FACTORS: [&str; 2] = ["rope_factors_short.weight", "rope_factors_long.weight"];
/// Numbers of layers of Gemma 2 27B and Gemma 3 27B, and the square of their inverse factor of scores. llama.cpp knows them
/// by these numbers too, since no key states the factor.
const GEMMA_27B: [(&str, usize, f64); 2] = [("gemma2", 46, 144.0), ("gemma3", 62, 168.0)];

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
    let (family, GgufFamily { architecture, fields, window, .. }) = found(&metadata)?;
    let key = |key: &str| format!("{architecture}.{key}");
    let mut json = Map::new();
    for (field, name, required) in FIELDS {
        let value = metadata.json(&key(name));
        if required && value.is_null() {
            return Err(metadata.bad(&key(name), "a number"));
        }
        json.insert(field.into(), value);
    }
    for (field, name) in *fields {
        let value = metadata.json(&key(name));
        if !value.is_null() {
            json.insert((*field).into(), value);
        }
    }
    // Every layer has tensors. Rejects an excessive layer count before allocating the list of required tensors.
    let tensors = gguf.header.tensors.len();
    if metadata.index(&key("block_count"))?.is_some_and(|layers| layers > tensors) {
        return Err(metadata.bad(&key("block_count"), &format!("no more than the file's {tensors} tensors")));
    }
    let head_dim = head_dim(&metadata, architecture)?;
    json.insert("head_dim".into(), json!(head_dim));

    // A different width of v is not supported.
    let rotated = metadata.index(&key("rope.dimension_count"))?;
    for (same, found, free) in [
        ("rope.dimension_count", rotated, family.partial_rotation),
        ("attention.value_length", metadata.index(&key("attention.value_length"))?, false),
    ] {
        if found.is_some_and(|n| n != head_dim && !(free && n < head_dim)) {
            return Err(metadata.bad(&key(same), &format!("the width of a head ({head_dim})")));
        }
    }
    if family.partial_rotation
        && let Some(rotated) = rotated
    {
        json.insert("partial_rotary_factor".into(), json!(rotated as f64 / head_dim as f64));
    }
    if metadata.index(&key("expert_count"))?.is_some_and(|n| n > 0) {
        return Err(metadata.bad(&key("expert_count"), "0"));
    }
    let stated = metadata.index(&key(WINDOW))?.filter(|window| *window > 0);
    let mut class = family.class;
    match (stated, window) {
        (stated, GgufWindow::Of(windowed)) => {
            json.insert("sliding_window".into(), json!(stated));
            if stated.is_some() {
                class = windowed;
            } else if fields.iter().any(|(field, _)| *field == PATTERN) {
                // Layers without windows all have the same rope.
                json.insert(PATTERN.into(), json!(1));
            }
        }
        (Some(window), GgufWindow::LimitsContext) => {
            if let Some(context) = metadata.index(&key("context_length"))? {
                json.insert("max_position_embeddings".into(), json!(context.min(window)));
            }
        }
        (Some(_), GgufWindow::Refused) => return Err(metadata.bad(&key(WINDOW), "0")),
        (None, _) => {}
    }
    json.insert("architectures".into(), json!([class]));
    if family.norms_around_zero {
        let layers = metadata.index(&key("block_count"))?;
        let known = GEMMA_27B.iter().find(|(name, count, _)| name == architecture && layers == Some(*count));
        json.insert("query_pre_attn_scalar".into(), json!(known.map_or(head_dim as f64, |(.., scalar)| *scalar)));
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
            let common = FIELDS.iter().map(|(field, name, _)| (*field, *name)).chain([("sliding_window", WINDOW)]);
            let field = match common.chain(fields.iter().copied()).find(|(name, _)| *name == field) {
                Some((_, name)) => key(name),
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
    let [Rope { theta, scaling: RopeScaling::Factors { factors, attention_factor: 1.0 } }] = config.ropes.as_slice()
    else {
        return None;
    };
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
    if let [Some(short), Some(long)] = LONGROPE_FACTORS.map(|name| factors(gguf, name)) {
        return Ok(json!({
            "type": "longrope", "short_factor": short?, "long_factor": long?,
            "attention_factor": metadata.json(&key("attn_factor")),
        }));
    }
    let kind = metadata.text(&key("type"))?.filter(|kind| kind != "none");
    let scaling = match kind.as_deref() {
        None => Value::Null,
        Some("linear") => json!({"rope_type": "linear", "factor": metadata.json(&key("factor"))}),
        Some("yarn") => json!({
            "rope_type": "yarn", "factor": metadata.json(&key("factor")),
            "original_max_position_embeddings": metadata.json(&key("original_context_length")),
        }),
        Some(_) => return Err(metadata.bad(&key("type"), "none, linear, yarn")),
    };
    let Some(factors) = factors(gguf, ROPE_FACTORS) else { return Ok(scaling) };
    if kind.is_some() {
        return Err(metadata.bad(&key("type"), &format!("none, because the file has {ROPE_FACTORS}")));
    }
    Ok(json!({"rope_type": "factors", "factors": factors?}))
}

/// The elements of a tensor with factors of rotary frequencies; `None` if there is no such tensor.
fn factors(gguf: &Gguf, name: &str) -> Option<Result<Vec<f32>, ModelError>> {
    let place = gguf.place(name)?;
    if place.shape.len() != 1 || place.stored != Stored::Plain(Dtype::F32) {
        let found = format!("{:?} of shape {:?}", place.stored, place.shape);
        return Some(Err(ModelError::unsupported(&gguf.file, name, found, "F32 of one dimension")));
    }
    let mut factors = vec![0.0; place.shape[0]];
    Some(place.read_rows(0..factors.len(), &mut factors).map(|()| factors))
}
