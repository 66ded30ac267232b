//! A tensor within a mapped file: how its elements are stored, and reading its rows as f32.

use std::{borrow::Cow, fmt, ops::Range, path::Path};

use candle_core::quantized::GgmlDType;
use half::{bf16, f16, slice::HalfFloatSliceExt};
use safetensors::Dtype;

use crate::ModelError;

/// Elements dequantised at once, a multiple of every format's block size. Bounds the temporary copy of dequantised
/// values.
const PIECE_ELEMENTS: usize = 1 << 14;

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
    pub(super) fn read(self, bytes: &[u8], out: &mut [f32]) -> candle_core::Result<()> {
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
    pub(super) fn ordered(&self) -> Result<Cow<'_, [u8]>, ModelError> {
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
