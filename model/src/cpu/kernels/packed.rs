//! Weight matrices in the layout that the kernels read: panels of 32 rows. Within a panel, the data for one step of a
//! kernel is contiguous.
//!
//! A panel holds 32 rows of the matrix (32 outputs) and all K columns (inputs). A vector register holds the weights of
//! one input for several outputs, and is multiplied with that input, broadcast. So there are no sums across lanes, and
//! K is arbitrary.
//!
//! | format | layout of a panel | bytes per weight |
//! |---|---|---|
//! | f32, f16 | `[K][32]` | 4, 2 |
//! | bf16 | `[K/2][32][2]`: shifting and masking a register widens it | 2 |
//! | int8 | `[K/32]` groups of `{[32] f16 scales, [8][32][4] bytes}` | 1.0625 |
//! | int8-channel | `{[32] f32 scales}`, then `[K/32][8][32][4]` bytes | 1 |
//! | int4 | `[K/32]` groups of `{[32] f16 scales, [4][32][4] bytes}`: input j in low halves, j + 4 in high ones | 0.5625 |
//!
//! int8 and int4 quantise like llama.cpp's Q8_0 and Q4_0 (one scale per 32 inputs), so weights from such files lose no
//! further precision. Integers are stored as unsigned bytes, with 128 or 8 added; see [`super::simd::Simd`].

use half::{bf16, f16};
use rayon::prelude::*;

use super::{inputs::InputType, memory::LargePages, simd::Isa};
pub(crate) use crate::options::WeightFormat;

/// Outputs per panel.
pub(crate) const PANEL: usize = 32;
/// Inputs per scale.
pub(crate) const GROUP: usize = 32;
/// Size of a group's f16 scales in bytes.
pub(crate) const SCALES_BYTES: usize = 2 * PANEL;

impl WeightFormat {
    /// Size in bytes of a panel of a matrix with `columns` columns.
    pub(crate) fn panel_bytes(self, columns: usize) -> usize {
        let groups = columns.div_ceil(GROUP);
        match self {
            Self::F32 => columns * PANEL * 4,
            Self::F16 => columns * PANEL * 2,
            Self::Bf16 => columns.next_multiple_of(2) * PANEL * 2,
            Self::Int8 => groups * self.group_bytes(),
            Self::Int8Channel => 4 * PANEL + groups * self.group_bytes(),
            Self::Int4 => groups * self.group_bytes(),
            Self::Fp8 => unreachable!("the CPU engine refuses fp8"),
        }
    }

    /// Size in bytes of a group in an integer format; meaningless for other formats.
    pub(crate) fn group_bytes(self) -> usize {
        match self {
            Self::Int8Channel => PANEL * GROUP,
            Self::Int4 => SCALES_BYTES + PANEL * GROUP / 2,
            _ => SCALES_BYTES + PANEL * GROUP,
        }
    }

    /// The type that inputs are converted to.
    ///
    /// It is the same for every product that a node computes, so that a row's result never depends on the other rows of
    /// the batch.
    pub(crate) fn inputs(self, Arithmetic { isa, rows }: Arithmetic) -> InputType {
        match self {
            Self::Bf16 if isa.traits().fast_bf16 => InputType::Bf16,
            Self::F32 | Self::F16 | Self::Bf16 => InputType::F32,
            Self::Int8 | Self::Int8Channel if rows == Rows::Many && !isa.traits().fast_int8 => InputType::F32,
            Self::Int8 | Self::Int8Channel | Self::Int4 => InputType::Int8,
            Self::Fp8 => unreachable!("the CPU engine refuses fp8"),
        }
    }
}

/// Number of input rows that a node usually multiplies at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// One row per running request, as on decode nodes: reading weights takes most of the time.
    Few,
    /// The tokens of a prompt, as on prefill nodes: multiplying takes most of the time.
    Many,
}

/// How a node computes. It is the same for all layers of a model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arithmetic {
    pub(crate) isa: Isa,
    pub(crate) rows: Rows,
}

/// A packed matrix `[rows, columns]` that owns its memory.
pub(crate) struct Packed {
    format: WeightFormat,
    rows: usize,
    columns: usize,
    /// The panels, in order.
    memory: LargePages,
}

impl Packed {
    /// Packs a matrix. `read(panel, values)` fills in 32 rows at a time, `[32][columns]` f32. `values` is zero before
    /// the call, and rows past the end may stay zero. Panels are packed in parallel, and each thread holds only one
    /// unpacked panel.
    pub(crate) fn pack<E: Send + From<std::io::Error>>(
        format: WeightFormat,
        rows: usize,
        columns: usize,
        read: impl Fn(usize, &mut [f32]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        let panel_bytes = format.panel_bytes(columns);
        let mut memory = LargePages::zeroed(rows.div_ceil(PANEL) * panel_bytes)?;
        let panels = memory.par_chunks_exact_mut(panel_bytes);
        panels.enumerate().try_for_each_init(Vec::new, |values, (i, panel)| {
            values.clear();
            values.resize(PANEL * columns, 0.0);
            read(i, values)?;
            pack_panel(format, values, columns, panel);
            Ok::<_, E>(())
        })?;
        Ok(Self { format, rows, columns, memory })
    }

    pub(crate) fn format(&self) -> WeightFormat {
        self.format
    }

    /// Number of outputs.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Number of inputs.
    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// Size of all panels in bytes.
    pub(crate) fn size_bytes(&self) -> usize {
        self.panels() * self.format.panel_bytes(self.columns)
    }

    /// Number of panels.
    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    pub(crate) fn panel(&self, i: usize) -> &[u8] {
        let size = self.format.panel_bytes(self.columns);
        &self.memory[i * size..][..size]
    }

    /// Unpacks one row into f32, `[columns]`. Used to look up embeddings.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        let (panel, lane) = (self.panel(row / PANEL), row % PANEL);
        let half = |i: usize| [panel[2 * i], panel[2 * i + 1]];
        let group_bytes = self.format.group_bytes();
        for (k, out) in out.iter_mut().enumerate().take(self.columns) {
            let (group, within) = (k / GROUP, k % GROUP);
            let start = group * group_bytes;
            let scale = || f16::from_le_bytes([panel[start + 2 * lane], panel[start + 2 * lane + 1]]).to_f32();
            *out = match self.format {
                WeightFormat::F32 => {
                    let at = (k * PANEL + lane) * 4;
                    f32::from_le_bytes([panel[at], panel[at + 1], panel[at + 2], panel[at + 3]])
                }
                WeightFormat::F16 => f16::from_le_bytes(half(k * PANEL + lane)).to_f32(),
                WeightFormat::Bf16 => bf16::from_le_bytes(half((k / 2 * PANEL + lane) * 2 + k % 2)).to_f32(),
                WeightFormat::Int8 => {
                    let byte = panel[start + SCALES_BYTES + int8_at(within, lane)];
                    (f32::from(byte) - 128.0) * scale()
                }
                WeightFormat::Int8Channel => {
                    let at = 4 * lane;
                    let scale = f32::from_le_bytes([panel[at], panel[at + 1], panel[at + 2], panel[at + 3]]);
                    (f32::from(panel[4 * PANEL + start + int8_at(within, lane)]) - 128.0) * scale
                }
                WeightFormat::Int4 => {
                    let (at, shift) = int4_at(within, lane);
                    (f32::from(panel[start + SCALES_BYTES + at] >> shift & 15) - 8.0) * scale()
                }
                WeightFormat::Fp8 => unreachable!("the CPU engine refuses fp8"),
            };
        }
    }
}

/// Index within a group's bytes of input `k` (0 to 31) and output `lane`.
fn int8_at(k: usize, lane: usize) -> usize {
    (k / 4 * PANEL + lane) * 4 + k % 4
}

/// The same for int4, and the bit shift of the value within the byte.
fn int4_at(k: usize, lane: usize) -> (usize, u32) {
    ((k / 8 * PANEL + lane) * 4 + k % 4, if k % 8 < 4 { 0 } else { 4 })
}

/// Packs `[32][columns]` values.
fn pack_panel(format: WeightFormat, values: &[f32], columns: usize, panel: &mut [u8]) {
    let put2 = |panel: &mut [u8], i: usize, bytes: [u8; 2]| panel[2 * i..][..2].copy_from_slice(&bytes);
    let group_bytes = format.group_bytes();
    for (lane, row) in values.chunks_exact(columns).enumerate() {
        match format {
            WeightFormat::F32 => {
                for (k, value) in row.iter().enumerate() {
                    panel[(k * PANEL + lane) * 4..][..4].copy_from_slice(&value.to_le_bytes());
                }
            }
            WeightFormat::F16 => {
                for (k, value) in row.iter().enumerate() {
                    put2(panel, k * PANEL + lane, f16::from_f32(*value).to_le_bytes());
                }
            }
            WeightFormat::Bf16 => {
                for (k, value) in row.iter().enumerate() {
                    put2(panel, (k / 2 * PANEL + lane) * 2 + k % 2, bf16::from_f32(*value).to_le_bytes());
                }
            }
            WeightFormat::Int8 => {
                for (group, values) in panel.chunks_exact_mut(group_bytes).zip(row.chunks(GROUP)) {
                    let (scales, bytes) = group.split_at_mut(SCALES_BYTES);
                    let scale = f16::from_f32(greatest(values) / 127.0);
                    put2(scales, lane, scale.to_le_bytes());
                    put_int8(bytes, lane, values, scale.to_f32());
                }
            }
            WeightFormat::Int8Channel => {
                let (scales, groups) = panel.split_at_mut(4 * PANEL);
                let scale = greatest(row) / 127.0;
                scales[4 * lane..][..4].copy_from_slice(&scale.to_le_bytes());
                for (bytes, values) in groups.chunks_exact_mut(group_bytes).zip(row.chunks(GROUP)) {
                    put_int8(bytes, lane, values, scale);
                }
            }
            WeightFormat::Int4 => {
                for (group, values) in panel.chunks_exact_mut(group_bytes).zip(row.chunks(GROUP)) {
                    let (scales, bytes) = group.split_at_mut(SCALES_BYTES);
                    // The value of greatest magnitude becomes -8, because the range is -8 to 7.
                    let extreme = values.iter().copied().fold(0.0, |a: f32, b| if b.abs() > a.abs() { b } else { a });
                    let scale = f16::from_f32(extreme / -8.0);
                    put2(scales, lane, scale.to_le_bytes());
                    let inverse = inverse(scale.to_f32());
                    for k in 0..GROUP {
                        let quantised = (values.get(k).unwrap_or(&0.0) * inverse + 8.5).clamp(0.0, 15.0) as u8;
                        let (at, shift) = int4_at(k, lane);
                        bytes[at] |= quantised << shift;
                    }
                }
            }
            WeightFormat::Fp8 => unreachable!("the CPU engine refuses fp8"),
        }
    }
}

fn put_int8(bytes: &mut [u8], lane: usize, values: &[f32], scale: f32) {
    let inverse = inverse(scale);
    for k in 0..GROUP {
        let quantised = (values.get(k).unwrap_or(&0.0) * inverse).round().clamp(-127.0, 127.0);
        bytes[int8_at(k, lane)] = (quantised + 128.0) as u8;
    }
}

fn greatest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |a: f32, b| a.max(b.abs()))
}

/// `1 / scale`, or 0 if all values are zero.
fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}
