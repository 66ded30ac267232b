//! overfill.json: the full model a pruned model was cut from, and how.

use std::{fs, path::Path};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{ModelError, gguf};

/// The content of overfill.json, stored next to a pruned model's config.json or .gguf file. Every field but `version`
/// is optional, because decoders published by others have no such file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// Format version, always 1.
    pub version: u32,
    /// The model that this one was cut from and whose KV it attends to; `None`: its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full_model: Option<FullModel>,
    /// The full model's layers that were kept, ascending; all layers if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_layers: Option<Vec<u32>>,
    /// The full model's hidden channels that were kept, ascending.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hidden_channels: Option<Vec<u32>>,
    /// For each kept layer, the full model's MLP channels that were kept, ascending.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub intermediate_channels: Option<Vec<Vec<u32>>>,
    /// Fine-tuning settings, free-form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training: Option<Value>,
}

/// The full model that a decoder was cut from and whose KV it attends to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FullModel {
    /// Name of its folder or file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its [`crate::Weights::fingerprint`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
}

impl Provenance {
    /// The file's name.
    pub const FILE: &'static str = "overfill.json";

    /// Reads overfill.json from `folder`, or from the folder of a .gguf file; `None` if there is none.
    pub fn from_folder(folder: &Path) -> Result<Option<Self>, ModelError> {
        let file = gguf::folder_of(folder).join(Self::FILE);
        if !file.exists() {
            return Ok(None);
        }
        let bytes = fs::read(&file).map_err(|e| ModelError::io(&file, e))?;
        let read: Self = serde_json::from_slice(&bytes).map_err(|e| ModelError::malformed(&file, e))?;
        if read.version != 1 {
            return Err(ModelError::unsupported(&file, "version", read.version, "1"));
        }
        if let Some(layers) = &read.kept_layers
            && (layers.is_empty() || layers.windows(2).any(|pair| pair[0] >= pair[1]))
        {
            return Err(ModelError::unsupported(
                &file,
                "kept_layers",
                format!("{layers:?}"),
                "ascending layer indices",
            ));
        }
        Ok(Some(read))
    }
}
