//! overfill.json: where a pruned model comes from.

use std::{fs, path::Path};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{ModelError, gguf};

/// Beside a pruned model's config.json or .gguf file. Every field but `version` is optional: a published decoder has no such file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// 1.
    pub version: u32,
    /// The model it was cut from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full_model: Option<FullModel>,
    /// The full model's layers that were kept, ascending; all of them where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_layers: Option<Vec<u32>>,
    /// The full model's hidden channels that were kept, ascending.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hidden_channels: Option<Vec<u32>>,
    /// The same of every kept layer's MLP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub intermediate_channels: Option<Vec<Vec<u32>>>,
    /// How it was fine-tuned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training: Option<Value>,
}

/// The model that a decoder was cut from, and whose KV it attends to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FullModel {
    /// Name of its folder or file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// [`crate::Weights::fingerprint`] of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
}

impl Provenance {
    /// Name of the file.
    pub const FILE: &'static str = "overfill.json";

    /// Reads `folder/overfill.json`, or that beside a .gguf file; `None` where there is none.
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
