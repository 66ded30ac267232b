//! The tensors of a model, memory-mapped: the safetensors files of a folder, single or sharded, or a GGUF file.

use std::{
    borrow::Cow,
    collections::HashMap,
    fmt, fs,
    ops::Range,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor, quantized::GgmlDType, safetensors::MmapedSafetensors};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use safetensors::Dtype;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::{ModelError, gguf::Gguf};

/// Number of bytes at each end of a tensor that enter its fingerprint.
const FINGERPRINT_BYTES: usize = 4096;

/// Elements dequantised at once, a multiple of every format's block size. Bounds the temporary copy of dequantised
/// values.
const PIECE_ELEMENTS: usize = 1 << 14;

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
    Safetensors { files: Vec<(PathBuf, MmapedSafetensors)>, file_of: HashMap<String, usize> },
    Gguf(Gguf),
}

/// How a file stores the elements of a tensor.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stored {
    /// Individually.
    Plain(Dtype),
    /// In quantised blocks. Each row consists of whole blocks.
    Blocks(GgmlDType),
}

impl fmt::Debug for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(dtype) => dtype.fmt(f),
            Self::Blocks(dtype) => dtype.fmt(f),
        }
    }
}

impl Stored {
    /// Size of `elements` elements in bytes; `None` if they do not fill whole blocks, or if the size overflows.
    pub(crate) fn bytes(self, elements: usize) -> Option<usize> {
        match self {
            Self::Plain(dtype) => elements.checked_mul(dtype.bitsize() / 8),
            Self::Blocks(dtype) if elements.is_multiple_of(dtype.block_size()) => {
                (elements / dtype.block_size()).checked_mul(dtype.type_size())
            }
            Self::Blocks(_) => None,
        }
    }

    /// Widens or dequantises `bytes` into `out`. Both hold the same number of elements.
    fn read(self, bytes: &[u8], out: &mut [f32]) -> candle_core::Result<()> {
        match self {
            Self::Plain(Dtype::F32) => {
                out.iter_mut().zip(bytes.as_chunks().0).for_each(|(out, b)| *out = f32::from_le_bytes(*b));
            }
            Self::Plain(Dtype::F64) => {
                out.iter_mut().zip(bytes.as_chunks().0).for_each(|(out, b)| *out = f64::from_le_bytes(*b) as f32);
            }
            Self::Plain(Dtype::BF16) => {
                out.iter_mut().zip(bytes.as_chunks().0).for_each(|(out, b)| *out = bf16::from_le_bytes(*b).to_f32());
            }
            Self::Plain(Dtype::F16) => match bytemuck::try_cast_slice::<u8, f16>(bytes) {
                // Vectorised; requires that the file aligns the values.
                Ok(halves) => halves.convert_to_f32_slice(out),
                Err(_) => {
                    out.iter_mut().zip(bytes.as_chunks().0).for_each(|(out, b)| *out = f16::from_le_bytes(*b).to_f32());
                }
            },
            Self::Plain(dtype) => candle_core::bail!("{dtype:?} can't be converted to f32"),
            Self::Blocks(dtype) => {
                let piece_bytes = PIECE_ELEMENTS / dtype.block_size() * dtype.type_size();
                for (bytes, out) in bytes.chunks(piece_bytes).zip(out.chunks_mut(PIECE_ELEMENTS)) {
                    let values = dtype.from_data(Cow::Borrowed(bytes)).dequantize(out.len())?;
                    out.copy_from_slice(values.as_slice()?);
                }
            }
        }
        Ok(())
    }
}

/// A tensor's data within a mapped file.
pub(crate) struct TensorLocation<'a> {
    pub file: &'a Path,
    /// The tensor's name in the file.
    pub name: &'a str,
    pub shape: Vec<usize>,
    pub stored: Stored,
    pub data: &'a [u8],
    /// What is added to the values that the file holds.
    pub offset: f32,
    /// Head width if the file interleaves the two halves of every head's rows; see [`TensorLocation::stored_row`].
    pub interleaved: Option<usize>,
}

impl TensorLocation<'_> {
    /// Elements per row: the product of all dimensions but the first.
    fn row_elements(&self) -> usize {
        self.shape.iter().skip(1).product()
    }

    /// Index in the file of row `row`.
    ///
    /// Rotation pairs row i of a head with row `i + head_dim / 2` in Hugging Face's order, and row 2i with row 2i + 1
    /// in llama.cpp's Llama files. llama.cpp's converter reorders the rows of q and k; this reverses it.
    fn stored_row(&self, row: usize) -> usize {
        match self.interleaved {
            None => row,
            Some(head_dim) => {
                let (head, within) = (row / head_dim, row % head_dim);
                let (half, i) = (within / (head_dim / 2), within % (head_dim / 2));
                head * head_dim + 2 * i + half
            }
        }
    }

    /// Bytes of one row.
    fn row_bytes(&self) -> Result<usize, ModelError> {
        let bytes = self.stored.bytes(self.row_elements());
        bytes.ok_or_else(|| ModelError::malformed(self.file, format!("rows of {} end within a block", self.name)))
    }

    /// The tensor's bytes with rows in Hugging Face's order; borrowed if the file already has that order.
    fn ordered(&self) -> Result<Cow<'_, [u8]>, ModelError> {
        if self.interleaved.is_none() {
            return Ok(Cow::Borrowed(self.data));
        }
        let row_bytes = self.row_bytes()?;
        let mut out = Vec::with_capacity(self.data.len());
        for row in 0..self.shape[0] {
            let at = self.stored_row(row) * row_bytes;
            out.extend_from_slice(&self.data[at..at + row_bytes]);
        }
        Ok(Cow::Owned(out))
    }

    pub(crate) fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), ModelError> {
        let (count, elements) = (self.shape.first().copied().unwrap_or(1), self.row_elements());
        if rows.start > rows.end || rows.end > count || out.len() != rows.len() * elements {
            let (name, room) = (self.name, out.len());
            let fault =
                format!("can't read rows {rows:?} of {name} ({count} rows of {elements} each) into {room} elements");
            return Err(candle_core::Error::Msg(fault).into());
        }
        let row_bytes = self.row_bytes()?;
        if self.interleaved.is_none() {
            self.stored.read(&self.data[rows.start * row_bytes..rows.end * row_bytes], out)?;
            if self.offset != 0.0 {
                out.iter_mut().for_each(|value| *value += self.offset);
            }
            return Ok(());
        }
        for (row, out) in rows.zip(out.chunks_mut(elements.max(1))) {
            let at = self.stored_row(row) * row_bytes;
            self.stored.read(&self.data[at..at + row_bytes], out)?;
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: HashMap<String, String>,
}

impl Weights {
    /// Opens a model's weights. In a folder these are `model.safetensors`, or the shards that
    /// `model.safetensors.index.json` lists, or, without safetensors, the only .gguf file. `path` may also be a .gguf
    /// file.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let source = match Gguf::find(path)? {
            Some(file) => Source::Gguf(Gguf::open(&file)?),
            None => open_safetensors(path)?,
        };
        Ok(Self { path: path.into(), source })
    }

    fn find(&self, name: &str) -> Result<Option<TensorLocation<'_>>, ModelError> {
        match &self.source {
            Source::Gguf(gguf) => Ok(gguf.place(name)),
            Source::Safetensors { files, file_of } => {
                let Some((name, index)) = file_of.get_key_value(name) else { return Ok(None) };
                let (file, mapped) = &files[*index];
                let view = mapped.get(name).map_err(|e| ModelError::malformed(file, e))?;
                let (shape, stored) = (view.shape().to_vec(), Stored::Plain(view.dtype()));
                Ok(Some(TensorLocation {
                    file,
                    name,
                    shape,
                    stored,
                    data: view.data(),
                    offset: 0.0,
                    interleaved: None,
                }))
            }
        }
    }

    /// The tensor `name`. Fails if its shape is not `shape`, or if its type cannot be widened to f32.
    fn checked(&self, name: &str, shape: &[usize]) -> Result<TensorLocation<'_>, ModelError> {
        let missing = || match &self.source {
            Source::Gguf(gguf) => gguf.missing(name, shape),
            Source::Safetensors { .. } => {
                ModelError::MissingTensor { file: self.path.clone(), name: name.into(), expected: shape.to_vec() }
            }
        };
        let place = self.find(name)?.ok_or_else(missing)?;
        if place.shape != shape {
            return Err(ModelError::WrongShape {
                file: place.file.into(),
                name: place.name.into(),
                expected: shape.to_vec(),
                found: place.shape,
            });
        }
        if let Stored::Plain(dtype) = place.stored
            && !matches!(dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32 | Dtype::F64)
        {
            let (field, value) = (format!("dtype of {name}"), format!("{dtype:?}"));
            return Err(ModelError::unsupported(place.file, &field, value, "BF16, F16, F32, F64"));
        }
        Ok(place)
    }

    /// Fails if the tensor is missing, if its shape is not `shape`, or if its type cannot be widened to f32.
    pub fn check(&self, name: &str, shape: &[usize]) -> Result<(), ModelError> {
        self.checked(name, shape).map(drop)
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = match &self.source {
            Source::Safetensors { file_of, .. } => file_of.keys().map(String::as_str).collect(),
            Source::Gguf(gguf) => gguf.names().collect(),
        };
        names.sort_unstable();
        names
    }

    /// A tensor's shape and type; `None` if there is no such tensor.
    pub fn info(&self, name: &str) -> Option<TensorInfo> {
        let place = self.find(name).ok().flatten()?;
        let dtype = match place.stored {
            Stored::Plain(dtype) if place.offset == 0.0 => dtype,
            Stored::Plain(_) | Stored::Blocks(_) => Dtype::F32,
        };
        Some(TensorInfo { shape: place.shape, dtype })
    }

    /// Loads a tensor in its stored type, or as f32 if it is quantised. Fails if its shape is not `shape`.
    pub fn load(&self, name: &str, shape: &[usize], device: &Device) -> Result<Tensor, ModelError> {
        let place = self.checked(name, shape)?;
        match place.stored {
            Stored::Plain(dtype) if place.offset == 0.0 => {
                Ok(Tensor::from_raw_buffer(&place.ordered()?, DType::try_from(dtype)?, shape, device)?)
            }
            Stored::Plain(_) | Stored::Blocks(_) => {
                let mut values = vec![0.0; shape.iter().product()];
                place.read_rows(0..shape.first().copied().unwrap_or(1), &mut values)?;
                Ok(Tensor::from_vec(values, shape, device)?)
            }
        }
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

    /// A short identifier of these weights: the first 128 bits of a SHA-256, in hexadecimal, over every tensor's name,
    /// type, shape and both ends of its data. It does not read all of the data, so that large models start quickly.
    pub fn fingerprint(&self) -> Result<String, ModelError> {
        let mut hash = Sha256::new();
        for name in self.names() {
            let Some(TensorLocation { shape, stored, data, .. }) = self.find(name)? else { continue };
            hash.update(format!("{name}|{stored:?}|{shape:?}|"));
            hash.update(&data[..data.len().min(FINGERPRINT_BYTES)]);
            hash.update(&data[data.len().saturating_sub(FINGERPRINT_BYTES)..]);
        }
        Ok(hash.finalize()[..16].iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

fn open_safetensors(folder: &Path) -> Result<Source, ModelError> {
    let index_file = folder.join("model.safetensors.index.json");
    let mut names: Vec<String> = if index_file.exists() {
        let bytes = fs::read(&index_file).map_err(|e| ModelError::io(&index_file, e))?;
        let index: ShardIndex = serde_json::from_slice(&bytes).map_err(|e| ModelError::malformed(&index_file, e))?;
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
            return Err(ModelError::malformed(&index_file, format!("weight_map names {name:?}, which is a path")));
        }
        let path = folder.join(name);
        let mapped = map_safetensors(&path)?;
        file_of.extend(mapped.tensors().into_iter().map(|(tensor, _)| (tensor, files.len())));
        files.push((path, mapped));
    }
    Ok(Source::Safetensors { files, file_of })
}

#[allow(unsafe_code)]
fn map_safetensors(path: &Path) -> Result<MmapedSafetensors, ModelError> {
    if let Err(e) = fs::File::open(path) {
        return Err(ModelError::io(path, e));
    }
    // SAFETY: the mapping is read-only. If another process truncates the file, reading can fault (SIGBUS). This risk is
    // inherent to mapping weights.
    unsafe { MmapedSafetensors::new(path) }.map_err(|e| ModelError::malformed(path, e))
}
