//! The tensors of a model, memory-mapped: the safetensors files of a folder, single or sharded, or a GGUF file.

mod compressed;
mod matrix;
mod packed;
mod safetensors;
mod scheme;
mod settings;
mod stored;

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use ::safetensors::Dtype;
use candle_core::{DType, Device, Tensor};
use sha2::{Digest, Sha256};

use crate::{ModelError, gguf::Gguf};

use matrix::Matrix;
use safetensors::Safetensors;
pub(crate) use scheme::CONFIG_FIELDS;
pub(crate) use stored::{Stored, TensorLocation};

/// Number of bytes at each end of a tensor that enter its fingerprint.
const FINGERPRINT_BYTES: usize = 4096;

/// A tensor's shape and type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Stored type; F32 for a quantised tensor, since [`Weights::load`] dequantises to F32.
    pub dtype: Dtype,
}

/// A model's tensors by Hugging Face name. Opening reads only the headers.
pub struct Weights {
    path: PathBuf,
    source: Source,
}

enum Source {
    Safetensors(Safetensors),
    Gguf(Gguf),
}

/// A tensor of a model.
enum Place<'a> {
    /// One tensor of a file.
    Stored(TensorLocation<'a>),
    /// A matrix that is quantised over several tensors.
    Quantised(Matrix<'a>),
}

impl Place<'_> {
    fn shape(&self) -> Vec<usize> {
        match self {
            Self::Stored(place) => place.shape.clone(),
            Self::Quantised(matrix) => matrix.shape().to_vec(),
        }
    }

    fn file_and_name(&self) -> (&Path, &str) {
        match self {
            Self::Stored(place) => (place.file, place.name),
            Self::Quantised(matrix) => (matrix.file, matrix.name),
        }
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), ModelError> {
        match self {
            Self::Stored(place) => place.read_rows(rows, out),
            Self::Quantised(matrix) => matrix.read_rows(rows, out),
        }
    }
}

impl Weights {
    /// Opens a model's weights. In a folder these are `model.safetensors`, or the shards that
    /// `model.safetensors.index.json` lists, or, without safetensors, the only .gguf file. `path` may also be a .gguf
    /// file. Matrices that `quantization_config` of config.json describes are dequantised when they are read.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let source = match Gguf::find(path)? {
            Some(file) => Source::Gguf(Gguf::open(&file)?),
            None => Source::Safetensors(Safetensors::open(path)?),
        };
        Ok(Self { path: path.into(), source })
    }

    fn find(&self, name: &str) -> Result<Option<Place<'_>>, ModelError> {
        match &self.source {
            Source::Gguf(gguf) => Ok(gguf.place(name).map(Place::Stored)),
            Source::Safetensors(files) => match files.matrix(name)? {
                Some(matrix) => Ok(Some(Place::Quantised(matrix))),
                None => Ok(files.tensor(&files.stored_name(name))?.map(Place::Stored)),
            },
        }
    }

    /// The tensor `name`. Fails if its shape is not `shape`, or if its type cannot be widened to f32.
    fn checked(&self, name: &str, shape: &[usize]) -> Result<Place<'_>, ModelError> {
        let missing = || match &self.source {
            Source::Gguf(gguf) => gguf.missing(name, shape),
            Source::Safetensors(_) => {
                ModelError::MissingTensor { file: self.path.clone(), name: name.into(), expected: shape.to_vec() }
            }
        };
        let place = self.find(name)?.ok_or_else(missing)?;
        if place.shape() != shape {
            let (file, stored_name) = place.file_and_name();
            return Err(ModelError::WrongShape {
                file: file.into(),
                name: stored_name.into(),
                expected: shape.to_vec(),
                found: place.shape(),
            });
        }
        if let Place::Stored(TensorLocation { file, stored: Stored::Plain(dtype), .. }) = place
            && !matches!(dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32 | Dtype::F64)
        {
            let (field, value) = (format!("dtype of {name}"), format!("{dtype:?}"));
            let supported = "BF16, F16, F32, F64; others with quantization_config in config.json";
            return Err(ModelError::unsupported(file, &field, value, supported));
        }
        Ok(place)
    }

    /// Fails if the tensor is missing, if its shape is not `shape`, or if its type cannot be widened to f32.
    pub fn check(&self, name: &str, shape: &[usize]) -> Result<(), ModelError> {
        self.checked(name, shape).map(drop)
    }

    /// Names of all stored tensors, sorted: Hugging Face names for GGUF, the files' own for safetensors. A quantised
    /// matrix is stored in several tensors.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = match &self.source {
            Source::Safetensors(files) => files.names().collect(),
            Source::Gguf(gguf) => gguf.names().collect(),
        };
        names.sort_unstable();
        names
    }

    /// A tensor's shape and type; `None` if there is no such tensor.
    pub fn info(&self, name: &str) -> Option<TensorInfo> {
        let place = self.find(name).ok().flatten()?;
        let dtype = match &place {
            Place::Stored(TensorLocation { stored: Stored::Plain(dtype), offset: 0.0, .. }) => *dtype,
            Place::Stored(_) | Place::Quantised(_) => Dtype::F32,
        };
        Some(TensorInfo { shape: place.shape(), dtype })
    }

    /// Loads a tensor in its stored type, or as f32 if it is quantised. Fails if its shape is not `shape`.
    pub fn load(&self, name: &str, shape: &[usize], device: &Device) -> Result<Tensor, ModelError> {
        let place = self.checked(name, shape)?;
        if let Place::Stored(place) = &place
            && let Stored::Plain(dtype) = place.stored
            && place.offset == 0.0
        {
            return Ok(Tensor::from_raw_buffer(&place.ordered()?, DType::try_from(dtype)?, shape, device)?);
        }
        let mut values = vec![0.0; shape.iter().product()];
        place.read_rows(0..shape.first().copied().unwrap_or(1), &mut values)?;
        Ok(Tensor::from_vec(values, shape, device)?)
    }

    /// Reads rows `rows` (indices of the first dimension) of a tensor of `shape` into `out` as f32, whatever their
    /// stored type. It reads no other part of the tensor, so a caller that repacks a tensor never holds it twice in
    /// memory.
    pub fn read_rows(
        &self,
        name: &str,
        shape: &[usize],
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), ModelError> {
        self.checked(name, shape)?.read_rows(rows, out)
    }

    /// A short identifier of these weights: the first 128 bits of a SHA-256, in hexadecimal, over every stored tensor's
    /// name, type, shape and both ends of its data. It does not read all of the data, so that large models start quickly.
    pub fn fingerprint(&self) -> Result<String, ModelError> {
        let mut hash = Sha256::new();
        for name in self.names() {
            let place = match &self.source {
                Source::Safetensors(files) => files.tensor(name)?,
                Source::Gguf(gguf) => gguf.place(name),
            };
            let Some(TensorLocation { shape, stored, data, .. }) = place else { continue };
            hash.update(format!("{name}|{stored:?}|{shape:?}|"));
            hash.update(&data[..data.len().min(FINGERPRINT_BYTES)]);
            hash.update(&data[data.len().saturating_sub(FINGERPRINT_BYTES)..]);
        }
        Ok(hash.finalize()[..16].iter().map(|byte| format!("{byte:02x}")).collect())
    }
}
