//! The safetensors files of a folder: which file has a tensor, and under which name.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use candle_core::safetensors::MmapedSafetensors;
use serde::Deserialize;

use super::{Stored, TensorLocation, matrix::Matrix, scheme::Scheme};
use crate::ModelError;

/// A name that every model has, and that is never quantised.
const FINAL_NORM: &str = "model.norm.weight";

const SINGLE: &str = "model.safetensors";

/// Files of weights in formats that are not read.
const OTHERS: [&str; 5] = [
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "consolidated.safetensors",
    "consolidated.00.pth",
    "adapter_model.safetensors",
];

/// Memory-mapped safetensors files.
pub(super) struct Safetensors {
    files: Vec<(PathBuf, MmapedSafetensors)>,
    file_of: HashMap<String, usize>,
    naming: Naming,
    scheme: Option<Scheme>,
}

/// How a checkpoint names the tensors that a causal language model calls `model.layers...` and `lm_head`.
#[derive(Clone, Copy, Debug)]
enum Naming {
    /// The same.
    Plain,
    /// `layers...`: the checkpoint is of the model without its head.
    Base,
    /// `language_model.model.layers...` and `language_model.lm_head`, in a model of text and images.
    LanguageModel,
    /// `model.language_model.layers...` and `lm_head`, in a model of text and images.
    InnerLanguageModel,
}

impl Naming {
    const ALL: [Self; 4] = [Self::Plain, Self::Base, Self::LanguageModel, Self::InnerLanguageModel];

    fn stored(self, name: &str) -> String {
        match (self, name.strip_prefix("model.")) {
            (Self::Base, Some(rest)) => rest.into(),
            (Self::LanguageModel, _) => format!("language_model.{name}"),
            (Self::InnerLanguageModel, Some(rest)) => format!("model.language_model.{rest}"),
            _ => name.into(),
        }
    }
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: HashMap<String, String>,
}

impl Safetensors {
    pub(super) fn open(folder: &Path) -> Result<Self, ModelError> {
        let scheme = Scheme::from_folder(folder)?;
        let index_file = folder.join("model.safetensors.index.json");
        let other = OTHERS.iter().find(|file| folder.join(file).exists());
        if let Some(other) = other.filter(|_| !index_file.exists() && !folder.join(SINGLE).exists()) {
            let supported = format!("{SINGLE}, model.safetensors.index.json, a .gguf file");
            return Err(ModelError::unsupported(folder, "the file of weights", other, &supported));
        }
        let mut names: Vec<String> = if index_file.exists() {
            let bytes = fs::read(&index_file).map_err(|e| ModelError::io(&index_file, e))?;
            let index: ShardIndex =
                serde_json::from_slice(&bytes).map_err(|e| ModelError::malformed(&index_file, e))?;
            index.weight_map.into_values().collect()
        } else {
            vec![SINGLE.into()]
        };
        names.sort();
        names.dedup();
        let mut files = Vec::new();
        let mut file_of = HashMap::new();
        for name in names {
            if name.contains(['/', '\\']) {
                return Err(ModelError::malformed(&index_file, format!("weight_map names {name:?}, which is a path")));
            }
            let path = folder.join(name);
            let mapped = map(&path)?;
            file_of.extend(mapped.tensors().into_iter().map(|(tensor, _)| (tensor, files.len())));
            files.push((path, mapped));
        }
        let naming = Naming::ALL.into_iter().find(|naming| file_of.contains_key(&naming.stored(FINAL_NORM)));
        Ok(Self { files, file_of, naming: naming.unwrap_or(Naming::Plain), scheme })
    }

    /// The name in the files of a tensor of a causal language model.
    pub(super) fn stored_name(&self, name: &str) -> String {
        self.naming.stored(name)
    }

    /// Names in the files.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.file_of.keys().map(String::as_str)
    }

    /// A tensor by its name in the files.
    pub(super) fn tensor(&self, stored_name: &str) -> Result<Option<TensorLocation<'_>>, ModelError> {
        let Some((name, index)) = self.file_of.get_key_value(stored_name) else { return Ok(None) };
        let (file, mapped) = &self.files[*index];
        let view = mapped.get(name).map_err(|e| ModelError::malformed(file, e))?;
        let (shape, stored) = (view.shape().to_vec(), Stored::Plain(view.dtype()));
        Ok(Some(TensorLocation { file, name, shape, stored, data: view.data(), offset: 0.0, interleaved: None }))
    }

    /// The matrix `name` if the files have it quantised. `name` ends with `.weight`.
    pub(super) fn matrix(&self, name: &str) -> Result<Option<Matrix<'_>>, ModelError> {
        let (Some(scheme), Some(module)) = (&self.scheme, name.strip_suffix(".weight")) else { return Ok(None) };
        scheme.matrix(&self.naming.stored(module), |name| self.tensor(name))
    }
}

#[allow(unsafe_code)]
fn map(path: &Path) -> Result<MmapedSafetensors, ModelError> {
    if let Err(e) = fs::File::open(path) {
        return Err(ModelError::io(path, e));
    }
    // SAFETY: the mapping is read-only. If another process truncates the file, reading can fault (SIGBUS). This risk is
    // inherent to mapping weights.
    unsafe { MmapedSafetensors::new(path) }.map_err(|e| ModelError::malformed(path, e))
}
