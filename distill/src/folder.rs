//! Writing Hugging Face model folders.

use std::{collections::HashMap, fs, path::Path};

use anyhow::{Context, Result};
use candle_core::Tensor;
use overfill_model::{FullModel, ModelConfig, Provenance, WeightDtype, Weights};
use overfill_text::TextFiles;
use serde_json::Value;

/// Writes `value` as indented JSON with a final newline.
pub fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

/// How overfill.json names the full model in `folder`, which has these weights.
pub fn full_model(folder: &Path, weights: &Weights) -> Result<FullModel> {
    let name = folder.canonicalize().with_context(|| format!("reading {}", folder.display()))?;
    Ok(FullModel {
        name: name.file_name().map(|name| name.to_string_lossy().into_owned()),
        fingerprint: Some(weights.fingerprint()?),
    })
}

/// Copies the tokenizer, chat template and generation configuration of the model `from`, if present.
pub fn copy_text_files(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("creating {}", to.display()))?;
    let TextFiles {
        tokenizer_json,
        tokenizer_config_json,
        chat_template,
        generation_config_json,
        special_tokens_map_json,
    } = overfill_model::text_files(from)?;
    for (name, bytes) in [
        ("tokenizer.json", Some(tokenizer_json)),
        ("tokenizer_config.json", tokenizer_config_json),
        ("chat_template.jinja", chat_template),
        ("generation_config.json", generation_config_json),
        ("special_tokens_map.json", special_tokens_map_json),
    ] {
        if let Some(bytes) = bytes {
            let path = to.join(name);
            fs::write(&path, bytes).with_context(|| format!("writing {}", path.display()))?;
        }
    }
    // Overfill does not read this file, but the slow tokenizers of transformers do.
    let source = from.join("added_tokens.json");
    if source.exists() {
        fs::copy(&source, to.join("added_tokens.json")).with_context(|| format!("copying {}", source.display()))?;
    }
    Ok(())
}

/// Writes config.json, with the element type of the weights as `torch_dtype`.
pub fn write_config(folder: &Path, config: &ModelConfig, dtype: WeightDtype) -> Result<()> {
    let mut json = config.to_json();
    if let Value::Object(map) = &mut json {
        map.remove("dtype");
        let name = match dtype {
            WeightDtype::F32 => "float32",
            WeightDtype::Bf16 => "bfloat16",
            WeightDtype::F16 => "float16",
        };
        map.insert("torch_dtype".into(), Value::from(name));
    }
    write_json(&folder.join("config.json"), &json)
}

/// Writes overfill.json.
pub fn write_provenance(folder: &Path, provenance: &Provenance) -> Result<()> {
    write_json(&folder.join(Provenance::FILE), provenance)
}

/// Writes tensors to a safetensors file. The file is replaced atomically.
pub fn write_tensors(path: &Path, tensors: &HashMap<String, Tensor>) -> Result<()> {
    let part = path.with_extension("part");
    // transformers rejects files without this metadata.
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize_to_file(tensors, Some(metadata), &part)
        .with_context(|| format!("writing {}", path.display()))?;
    publish(&part, path)
}

/// Renames a finished file to its final name and makes it world-readable. The safetensors writer creates files that
/// only their owner can read, but services of other users read model folders too.
pub fn publish(part: &Path, path: &Path) -> Result<()> {
    let context = || format!("writing {}", path.display());
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(part, fs::Permissions::from_mode(0o644)).with_context(context)?;
    }
    fs::rename(part, path).with_context(context)
}
