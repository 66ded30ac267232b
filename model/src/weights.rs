//! The safetensors files of a model folder, memory-mapped: single or sharded, any float type.

use std::{
    collections::HashMap,
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use candle_core::{Device, Tensor, safetensors::MmapedSafetensors};
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::ModelError;

/// Bytes at either end of a tensor that its fingerprint reads.
const FINGERPRINT_BYTES: usize = 4096;

/// What a file says of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// Its type as stored.
    pub dtype: safetensors::Dtype,
}

/// The tensors of a model folder. Opening reads headers only.
pub struct Weights {
    folder: PathBuf,
    files: Vec<(PathBuf, MmapedSafetensors)>,
    file_of: HashMap<String, usize>,
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: HashMap<String, String>,
}

impl Weights {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` lists.
    pub fn open(folder: &Path) -> Result<Self, ModelError> {
        let index_file = folder.join("model.safetensors.index.json");
        let mut names: Vec<String> = if index_file.exists() {
            let bytes = fs::read(&index_file).map_err(|e| ModelError::io(&index_file, e))?;
            let index: ShardIndex =
                serde_json::from_slice(&bytes).map_err(|e| ModelError::malformed(&index_file, e))?;
            index.weight_map.into_values().collect()
        } else {
            vec!["model.safetensors".into()]
        };
        names.sort();
        names.dedup();
        let mut files = Vec::new();
        let mut file_of = HashMap::new();
        for name in names {
            if name.contains(['/', '\\']) {
                return Err(ModelError::malformed(&index_file, format!("weight_map names {name:?}, a path")));
            }
            let path = folder.join(name);
            let mapped = map_file(&path)?;
            file_of.extend(mapped.tensors().into_iter().map(|(tensor, _)| (tensor, files.len())));
            files.push((path, mapped));
        }
        Ok(Self { folder: folder.into(), files, file_of })
    }

    fn find(&self, name: &str) -> Option<&(PathBuf, MmapedSafetensors)> {
        self.file_of.get(name).map(|i| &self.files[*i])
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.file_of.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// Shape and stored type of a tensor; `None` where there is none of that name.
    pub fn info(&self, name: &str) -> Option<TensorInfo> {
        let view = self.find(name)?.1.get(name).ok()?;
        Some(TensorInfo { shape: view.shape().to_vec(), dtype: view.dtype() })
    }

    /// Loads a tensor in its stored type, refusing any other shape than `shape`.
    pub fn load(&self, name: &str, shape: &[usize], device: &Device) -> Result<Tensor, ModelError> {
        self.checked(name, shape)?;
        match self.find(name) {
            Some((_, mapped)) => Ok(mapped.load(name, device)?),
            None => Err(self.missing(name, shape)),
        }
    }

    fn missing(&self, name: &str, shape: &[usize]) -> ModelError {
        ModelError::MissingTensor { file: self.folder.clone(), name: name.into(), expected: shape.to_vec() }
    }

    /// A tensor that is there, of this shape, and of a type that can be read.
    fn checked(&self, name: &str, shape: &[usize]) -> Result<(&Path, TensorView<'_>), ModelError> {
        let Some((file, mapped)) = self.find(name) else { return Err(self.missing(name, shape)) };
        let view = mapped.get(name).map_err(|e| ModelError::malformed(file, e))?;
        if view.shape() != shape {
            return Err(ModelError::WrongShape {
                file: file.clone(),
                name: name.into(),
                expected: shape.to_vec(),
                found: view.shape().to_vec(),
            });
        }
        use safetensors::Dtype::{BF16, F16, F32, F64};
        if !matches!(view.dtype(), BF16 | F16 | F32 | F64) {
            let dtype = format!("{:?}", view.dtype());
            return Err(ModelError::unsupported(file, &format!("dtype of {name}"), dtype, "BF16, F16, F32, F64"));
        }
        Ok((file, view))
    }

    /// Some rows of a tensor of shape `shape`, as f32. `out` is as long as they are.
    pub fn read_rows(
        &self,
        name: &str,
        shape: &[usize],
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), ModelError> {
        let (file, view) = self.checked(name, shape)?;
        let width: usize = shape[1..].iter().product();
        let data = view.data();
        let bytes_each = data.len() / shape.iter().product::<usize>().max(1);
        let from = data
            .get(rows.start * width * bytes_each..rows.end * width * bytes_each)
            .filter(|from| from.len() == out.len() * bytes_each)
            .ok_or_else(|| {
                ModelError::malformed(file, format!("{name} has no rows {rows:?} of {} values", out.len()))
            })?;
        let values = from.chunks_exact(bytes_each).zip(out);
        match view.dtype() {
            safetensors::Dtype::BF16 => values.for_each(|(b, out)| *out = bf16::from_le_bytes([b[0], b[1]]).to_f32()),
            safetensors::Dtype::F16 => values.for_each(|(b, out)| *out = f16::from_le_bytes([b[0], b[1]]).to_f32()),
            safetensors::Dtype::F32 => {
                values.for_each(|(b, out)| *out = f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            }
            _ => values.for_each(|(b, out)| {
                *out = f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as f32;
            }),
        }
        Ok(())
    }

    /// A short name for exactly these weights: the SHA-256 over every tensor's name, type, shape and both ends of its
    /// data. It does not read the whole model, so that a node of many gigabytes starts at once.
    pub fn fingerprint(&self) -> Result<String, ModelError> {
        let mut hash = Sha256::new();
        for name in self.names() {
            let Some((file, mapped)) = self.find(name) else { continue };
            let view = mapped.get(name).map_err(|e| ModelError::malformed(file, e))?;
            hash.update(format!("{name}|{:?}|{:?}|", view.dtype(), view.shape()));
            let data = view.data();
            hash.update(&data[..data.len().min(FINGERPRINT_BYTES)]);
            hash.update(&data[data.len().saturating_sub(FINGERPRINT_BYTES)..]);
        }
        Ok(hash.finalize()[..16].iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

#[allow(unsafe_code)]
fn map_file(path: &Path) -> Result<MmapedSafetensors, ModelError> {
    if let Err(e) = fs::File::open(path) {
        return Err(ModelError::io(path, e));
    }
    // SAFETY: the mapping is only read. Another process that shortens the file meanwhile can fault this one: that is
    // the known price of mapping weights, and what every loader of this format accepts.
    unsafe { MmapedSafetensors::new(path) }.map_err(|e| ModelError::malformed(path, e))
}
