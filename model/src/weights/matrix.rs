//! A matrix that is stored quantised: `(value - zero) * scale`, with scales and zeros for groups of elements.

use std::{ops::Range, path::Path};

use ::safetensors::Dtype;
use candle_core::Error;

use super::{Stored, TensorLocation, packed::Values};
use crate::ModelError;

/// A quantised matrix `[rows, columns]`. Reading computes in f32.
pub(super) struct Matrix<'a> {
    /// The file that has the values.
    pub file: &'a Path,
    /// Name in the file of the values.
    pub name: &'a str,
    pub rows: usize,
    pub columns: usize,
    /// `[rows, columns]`.
    pub values: Values<'a>,
    pub zero: Zero<'a>,
    pub scales: Scales<'a>,
    pub groups: Groups<'a>,
}

/// What is subtracted from the values.
pub(super) enum Zero<'a> {
    /// The same number everywhere.
    Same(f32),
    /// A number per row and group, `[rows, groups]`, plus a constant.
    Each(Values<'a>, f32),
}

/// Scales per row and group. The scale of a row and a group is at `row / rows_per_scale * row_step + group * group_step`.
pub(super) struct Scales<'a> {
    data: &'a [u8],
    dtype: Dtype,
    pub rows_per_scale: usize,
    pub row_step: usize,
    pub group_step: usize,
}

/// The columns that share a scale and a zero within a row.
pub(super) enum Groups<'a> {
    /// Runs of this many columns; the last may be shorter.
    Runs(usize),
    /// The group of each column, and the number of groups.
    Index(Index<'a>, usize),
}

/// The group of each column: an I32 tensor whose values were checked.
pub(super) struct Index<'a>(&'a [u8]);

impl<'a> Index<'a> {
    /// Reads the groups of all columns. Fails unless `place` has one per column, below `groups`.
    pub(super) fn new(place: TensorLocation<'a>, columns: usize, groups: usize) -> Result<Self, ModelError> {
        check(&place, &[Dtype::I32], &[&[columns]])?;
        let index = Self(place.data);
        let outside = index.groups().find(|group| *group >= groups);
        if let Some(found) = outside {
            let (field, found) = (format!("a value of {}", place.name), found as u32 as i32);
            return Err(ModelError::unsupported(
                place.file,
                &field,
                found,
                &format!("0 to {}", groups.saturating_sub(1)),
            ));
        }
        Ok(index)
    }

    /// Whether a tensor says that no column has a group of its own.
    pub(super) fn is_unset(place: &TensorLocation<'_>) -> bool {
        place.stored == Stored::Plain(Dtype::I32) && place.data.as_chunks().0.iter().all(|b| i32::from_le_bytes(*b) < 0)
    }

    fn groups(&self) -> impl Iterator<Item = usize> {
        self.0.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes) as usize)
    }
}

impl<'a> Scales<'a> {
    /// One scale for the whole matrix.
    pub(super) fn tensor(place: &TensorLocation<'a>, rows: usize) -> Result<Self, ModelError> {
        Self::new(place, &[&[], &[1], &[1, 1]], rows.max(1), 0, 0)
    }

    /// One scale per row.
    pub(super) fn rows(place: &TensorLocation<'a>, rows: usize) -> Result<Self, ModelError> {
        Self::new(place, &[&[rows, 1], &[rows]], 1, 1, 0)
    }

    /// A scale per `rows_per_scale` rows and group, `[rows / rows_per_scale, groups]`.
    pub(super) fn blocks(
        place: &TensorLocation<'a>,
        rows: usize,
        groups: usize,
        rows_per_scale: usize,
    ) -> Result<Self, ModelError> {
        Self::new(place, &[&[rows.div_ceil(rows_per_scale), groups]], rows_per_scale, groups, 1)
    }

    /// A scale per group and row, `[groups, rows]`.
    pub(super) fn transposed(place: &TensorLocation<'a>, rows: usize, groups: usize) -> Result<Self, ModelError> {
        Self::new(place, &[&[groups, rows]], 1, 1, rows)
    }

    fn new(
        place: &TensorLocation<'a>,
        shapes: &[&[usize]],
        rows_per_scale: usize,
        row_step: usize,
        group_step: usize,
    ) -> Result<Self, ModelError> {
        let dtype = check(place, &[Dtype::F32, Dtype::BF16, Dtype::F16], shapes)?;
        Ok(Self { data: place.data, dtype, rows_per_scale, row_step, group_step })
    }

    /// Reads the scales of a row, one per group.
    fn row(&self, row: usize, out: &mut [f32]) -> Result<(), ModelError> {
        let (first, bytes) = (row / self.rows_per_scale * self.row_step, self.dtype.bitsize() / 8);
        if self.group_step == 1 {
            return Ok(Stored::Plain(self.dtype).read(&self.data[first * bytes..(first + out.len()) * bytes], out)?);
        }
        for (group, out) in out.iter_mut().enumerate() {
            let at = (first + group * self.group_step) * bytes;
            Stored::Plain(self.dtype).read(&self.data[at..at + bytes], std::slice::from_mut(out))?;
        }
        Ok(())
    }
}

impl Matrix<'_> {
    pub(super) fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// Dequantises rows into `out`.
    pub(super) fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), ModelError> {
        let Self { name, columns, .. } = *self;
        if rows.start > rows.end || rows.end > self.rows || out.len() != rows.len() * columns {
            let (count, room) = (self.rows, out.len());
            let fault =
                format!("can't read rows {rows:?} of {name} ({count} rows of {columns} each) into {room} elements");
            return Err(Error::Msg(fault).into());
        }
        let groups = match &self.groups {
            Groups::Runs(width) => columns.div_ceil(*width),
            Groups::Index(_, groups) => *groups,
        };
        let (mut scales, mut zeros) = (vec![0.0; groups], vec![0.0; groups]);
        for (row, out) in rows.zip(out.chunks_mut(columns.max(1))) {
            self.values.row(row, out);
            self.scales.row(row, &mut scales)?;
            match &self.zero {
                Zero::Same(zero) => zeros.fill(*zero),
                Zero::Each(values, more) => {
                    values.row(row, &mut zeros);
                    zeros.iter_mut().for_each(|zero| *zero += more);
                }
            }
            match &self.groups {
                Groups::Runs(width) => {
                    for (out, (scale, zero)) in out.chunks_mut(*width).zip(scales.iter().zip(&zeros)) {
                        out.iter_mut().for_each(|value| *value = (*value - zero) * scale);
                    }
                }
                Groups::Index(index, _) => {
                    for (value, group) in out.iter_mut().zip(index.groups()) {
                        *value = (*value - zeros[group]) * scales[group];
                    }
                }
            }
        }
        Ok(())
    }
}

/// Checks a tensor's type and shape. Returns its type.
pub(super) fn check(place: &TensorLocation<'_>, dtypes: &[Dtype], shapes: &[&[usize]]) -> Result<Dtype, ModelError> {
    let found = match place.stored {
        Stored::Plain(dtype) if dtypes.contains(&dtype) => dtype,
        other => {
            let supported: Vec<String> = dtypes.iter().map(|dtype| format!("{dtype:?}")).collect();
            let field = format!("dtype of {}", place.name);
            return Err(ModelError::unsupported(place.file, &field, format!("{other:?}"), &supported.join(", ")));
        }
    };
    if !shapes.contains(&place.shape.as_slice()) {
        return Err(ModelError::WrongShape {
            file: place.file.into(),
            name: place.name.into(),
            expected: shapes.first().map_or_else(Vec::new, |shape| shape.to_vec()),
            found: place.shape.clone(),
        });
    }
    Ok(found)
}
