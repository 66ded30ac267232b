//! Formats of quantised checkpoints: `quantization_config` of config.json or a file of its own, and the tensors that
//! store a matrix.
//!
//! The libraries that write a format define what it means: compressed-tensors (`compressors/`), AutoGPTQ and
//! GPTQModel (`qlinear`), AutoAWQ (`WQLinear_GEMM`), and for fp8 the FineGrainedFP8 and FBGEMM layers of
//! transformers, and Model Optimizer's export (`hf_quant_config.json`).
//! Settings of activations are ignored: activations are not quantised here.

use std::{fs, path::Path};

use ::safetensors::Dtype;
use serde_json::{Map, Value};

use super::{
    Stored, TensorLocation,
    compressed::{Compressed, Layout, Strategy},
    matrix::{Groups, Index, Matrix, Scales, Zero, check},
    packed::{IN_ORDER, Packed, Packs, Values},
    settings::Settings,
};
use crate::{ModelError, config::Fields};

/// Fields of config.json that describe quantised weights; older files of compressed-tensors have the second one.
pub(crate) const CONFIG_FIELDS: [&str; 2] = ["quantization_config", "compression_config"];

const METHODS: &str = "fp8, fbgemm_fp8, compressed-tensors, gptq, awq, modelopt";

/// The place within a word of each of 8 neighbours in AWQ's GEMM layout.
const AWQ_ORDER: [u8; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// How a checkpoint stores quantised matrices.
#[derive(Debug)]
pub(super) enum Scheme {
    /// `weight` in fp8, with `weight_scale_inv` or `weight_scale`.
    Fp8 {
        /// Rows and columns that share a scale; `None` for a scale per matrix or per row.
        block: Option<[usize; 2]>,
    },
    /// compressed-tensors: `weight` or `weight_packed`, `weight_scale`, `weight_zero_point`.
    Compressed(Compressed),
    /// AutoGPTQ and GPTQModel: `qweight`, `qzeros`, `scales`, `g_idx`.
    Gptq {
        bits: usize,
        group_size: Option<usize>,
        /// Added to stored zeros: 1 in the first version of the format.
        zero_offset: f32,
    },
    /// AutoAWQ, GEMM layout: `qweight`, `qzeros`, `scales`.
    Awq { group_size: Option<usize> },
}

impl Scheme {
    /// Reads the scheme of a folder: from config.json, or from a file of its own where config.json has none. `None` if the
    /// weights are not quantised, or if there is no config.json.
    pub(super) fn from_folder(folder: &Path) -> Result<Option<Self>, ModelError> {
        let file = folder.join("config.json");
        let Some(config) = read(&file)? else { return Ok(None) };
        let fields = Fields { file: &file, map: &config };
        if let Some(field) = CONFIG_FIELDS.into_iter().find(|field| fields.present(field).is_some()) {
            let map = config.get(field).and_then(Value::as_object).ok_or_else(|| fields.bad(field, "an object"))?;
            let method = (field == CONFIG_FIELDS[1]).then_some("compressed-tensors");
            return Self::from_settings(&Settings { file: &file, path: field.into(), map }, method);
        }
        let file = folder.join("quantize_config.json");
        if let Some(map) = read(&file)? {
            return Self::from_settings(&Settings { file: &file, path: String::new(), map: &map }, Some("gptq"));
        }
        let file = folder.join("hf_quant_config.json");
        let Some(map) = read(&file)? else { return Ok(None) };
        let whole = Settings { file: &file, path: String::new(), map: &map };
        Self::from_settings(&whole.object("quantization")?, Some("modelopt"))
    }

    /// `method`: what the settings mean if they don't say.
    fn from_settings(settings: &Settings<'_>, method: Option<&str>) -> Result<Option<Self>, ModelError> {
        let stated = settings.text("quant_method");
        Ok(Some(match stated.as_deref().or(method) {
            Some("fp8") if settings.text("fmt").is_some_and(|format| format != "e4m3") => {
                return Err(settings.bad("fmt", "e4m3"));
            }
            Some("fp8") => Self::Fp8 { block: settings.block("weight_block_size")? },
            Some("fbgemm_fp8") => Self::Fp8 { block: None },
            Some("compressed-tensors") => Self::Compressed(Compressed::new(settings)?),
            Some("gptq") => gptq(settings)?,
            Some("awq") => awq(settings)?,
            // Such as a checkpoint with scales for an fp8 KV cache alone.
            Some("modelopt") if settings.map.get("quant_algo").is_some_and(Value::is_null) => return Ok(None),
            // Modules that the checkpoint leaves as they are (`ignore`, `exclude_modules`) have no fp8 weights.
            Some("modelopt") if settings.text("quant_algo").as_deref() == Some("fp8") => Self::Fp8 { block: None },
            Some("modelopt") => return Err(settings.bad("quant_algo", "FP8")),
            _ => return Err(settings.bad("quant_method", METHODS)),
        }))
    }

    /// The weight of `module` (its name in the files); `None` if it isn't quantised. `find` finds a stored tensor.
    pub(super) fn matrix<'a>(
        &self,
        module: &str,
        find: impl Fn(&str) -> Result<Option<TensorLocation<'a>>, ModelError>,
    ) -> Result<Option<Matrix<'a>>, ModelError> {
        let layout = match self {
            Self::Compressed(compressed) => match compressed.layout(module)? {
                Some(layout) => Some(layout),
                None => return Ok(None),
            },
            _ => None,
        };
        let main = match self {
            Self::Fp8 { .. } => "weight",
            Self::Compressed(_) if layout.is_some_and(|layout| layout.packed) => "weight_packed",
            Self::Compressed(_) => "weight",
            Self::Gptq { .. } | Self::Awq { .. } => "qweight",
        };
        let Some(main) = find(&format!("{module}.{main}"))? else { return Ok(None) };
        let parts = Parts { module, file: main.file, find };
        match *self {
            Self::Fp8 { block } => parts.fp8(main, block),
            Self::Compressed(_) => layout.map_or(Ok(None), |layout| parts.compressed(main, layout)),
            Self::Gptq { bits, group_size, zero_offset } => parts.gptq(main, bits, group_size, zero_offset).map(Some),
            Self::Awq { group_size } => parts.awq(main, group_size).map(Some),
        }
    }
}

/// The object in a JSON file; `None` if there is no such file.
fn read(file: &Path) -> Result<Option<Map<String, Value>>, ModelError> {
    if !file.exists() {
        return Ok(None);
    }
    let bytes = fs::read(file).map_err(|e| ModelError::io(file, e))?;
    serde_json::from_slice(&bytes).map(Some).map_err(|e| ModelError::malformed(file, e))
}

fn gptq(settings: &Settings<'_>) -> Result<Scheme, ModelError> {
    let zero_offset = match settings.text("checkpoint_format").as_deref() {
        _ if settings.is("is_marlin_format", true) => return Err(settings.bad("is_marlin_format", "false")),
        None | Some("gptq") => 1.0,
        Some("gptq_v2") => 0.0,
        _ => return Err(settings.bad("checkpoint_format", "gptq, gptq_v2")),
    };
    let (bits, group_size) = (settings.bits("bits", &[4, 8])?, settings.group_size("group_size")?);
    Ok(Scheme::Gptq { bits, group_size, zero_offset })
}

fn awq(settings: &Settings<'_>) -> Result<Scheme, ModelError> {
    if settings.text("version").is_some_and(|version| version != "gemm") {
        return Err(settings.bad("version", "gemm"));
    }
    if settings.is("zero_point", false) {
        return Err(settings.bad("zero_point", "true"));
    }
    settings.bits("bits", &[4])?;
    Ok(Scheme::Awq { group_size: settings.group_size("group_size")? })
}

/// The tensors of one module.
struct Parts<'m, 'a, F> {
    module: &'m str,
    file: &'a Path,
    find: F,
}

impl<'a, F: Fn(&str) -> Result<Option<TensorLocation<'a>>, ModelError>> Parts<'_, 'a, F> {
    fn optional(&self, part: &str) -> Result<Option<TensorLocation<'a>>, ModelError> {
        (self.find)(&format!("{}.{part}", self.module))
    }

    fn required(&self, part: &str, shape: &[usize]) -> Result<TensorLocation<'a>, ModelError> {
        let name = format!("{}.{part}", self.module);
        let missing =
            || ModelError::MissingTensor { file: self.file.into(), name: name.clone(), expected: shape.into() };
        (self.find)(&name)?.ok_or_else(missing)
    }

    fn dimensions(&self, place: &TensorLocation<'_>) -> Result<[usize; 2], ModelError> {
        <[usize; 2]>::try_from(place.shape.as_slice()).map_err(|_| {
            let field = format!("shape of {}", place.name);
            ModelError::unsupported(place.file, &field, format!("{:?}", place.shape), "two dimensions")
        })
    }

    /// Number of integers in `words` words.
    fn unpacked(&self, place: &TensorLocation<'_>, words: usize, bits: usize) -> Result<usize, ModelError> {
        words.checked_mul(32 / bits).ok_or_else(|| {
            let field = format!("shape of {}", place.name);
            ModelError::unsupported(place.file, &field, format!("{:?}", place.shape), "fewer elements")
        })
    }

    /// `Ok(None)` for a matrix that is not fp8, such as one that was left as it is.
    fn fp8(&self, main: TensorLocation<'a>, block: Option<[usize; 2]>) -> Result<Option<Matrix<'a>>, ModelError> {
        if main.stored != Stored::Plain(Dtype::F8_E4M3) {
            return Ok(None);
        }
        let [rows, columns] = self.dimensions(&main)?;
        let [height, width] = block.unwrap_or([1, columns.max(1)]);
        let groups = columns.div_ceil(width);
        let scale = match self.optional("weight_scale_inv")? {
            Some(place) => place,
            None => self.required("weight_scale", &[rows.div_ceil(height), groups])?,
        };
        let scales = match block {
            Some(_) => Scales::blocks(&scale, rows, groups, height)?,
            None if scale.shape.iter().product::<usize>() == 1 => Scales::tensor(&scale, rows)?,
            None => Scales::rows(&scale, rows)?,
        };
        let (values, groups) = (Values::Fp8(main.data), Groups::Runs(width));
        let TensorLocation { file, name, .. } = main;
        Ok(Some(Matrix { file, name, rows, columns, values, zero: Zero::Same(0.0), scales, groups }))
    }

    /// Scales of compressed-tensors, and the width of a group.
    fn scales(&self, rows: usize, columns: usize, strategy: Strategy) -> Result<(Scales<'a>, usize), ModelError> {
        let all = columns.max(1);
        let scale = |shape: &[usize]| self.required("weight_scale", shape);
        Ok(match strategy {
            Strategy::Tensor => (Scales::tensor(&scale(&[1])?, rows)?, all),
            Strategy::Channel => (Scales::rows(&scale(&[rows, 1])?, rows)?, all),
            Strategy::Group(width) => {
                let groups = columns.div_ceil(width);
                (Scales::blocks(&scale(&[rows, groups])?, rows, groups, 1)?, width)
            }
            Strategy::Block([height, width]) => {
                let groups = columns.div_ceil(width);
                let shape = [rows.div_ceil(height), groups];
                (Scales::blocks(&scale(&shape)?, rows, groups, height)?, width)
            }
        })
    }

    /// The groups of columns: in order, or as the tensor `part` says if there is one.
    fn groups(&self, part: &str, columns: usize, width: usize) -> Result<Groups<'a>, ModelError> {
        match self.optional(part)? {
            Some(place) if !Index::is_unset(&place) => {
                let groups = columns.div_ceil(width);
                Ok(Groups::Index(Index::new(place, columns, groups)?, groups))
            }
            _ => Ok(Groups::Runs(width)),
        }
    }

    /// `Ok(None)` for a matrix that was left as it is.
    fn compressed(&self, main: TensorLocation<'a>, layout: Layout) -> Result<Option<Matrix<'a>>, ModelError> {
        let Layout { bits, packed, symmetric, strategy } = layout;
        match packed {
            true => self.packed(main, bits, symmetric, strategy).map(Some),
            false => self.bytes(main, symmetric, strategy),
        }
    }

    /// compressed-tensors, a byte per element. `Ok(None)` for a matrix that was left as it is.
    fn bytes(
        &self,
        main: TensorLocation<'a>,
        symmetric: bool,
        strategy: Strategy,
    ) -> Result<Option<Matrix<'a>>, ModelError> {
        let values = match main.stored {
            Stored::Plain(Dtype::F8_E4M3) => Values::Fp8(main.data),
            Stored::Plain(Dtype::I8) => Values::Int8(main.data),
            _ => return Ok(None),
        };
        let [rows, columns] = self.dimensions(&main)?;
        let (scales, width) = self.scales(rows, columns, strategy)?;
        let zero = if symmetric {
            Zero::Same(0.0)
        } else {
            let shape = [rows, columns.div_ceil(width)];
            let place = self.required("weight_zero_point", &shape)?;
            check(&place, &[Dtype::I8], &[&shape])?;
            Zero::Each(Values::Int8(place.data), 0.0)
        };
        let groups = self.groups("weight_g_idx", columns, width)?;
        let TensorLocation { file, name, .. } = main;
        Ok(Some(Matrix { file, name, rows, columns, values, zero, scales, groups }))
    }

    /// compressed-tensors, packed along rows. Stored integers are 0 or more; half of their range is zero.
    fn packed(
        &self,
        main: TensorLocation<'a>,
        bits: usize,
        symmetric: bool,
        strategy: Strategy,
    ) -> Result<Matrix<'a>, ModelError> {
        let [rows, words] = self.dimensions(&main)?;
        check(&main, &[Dtype::I32], &[&[rows, words]])?;
        let columns = self.columns(&main, rows, words, bits)?;
        let (scales, width) = self.scales(rows, columns, strategy)?;
        let zero = if symmetric {
            Zero::Same((1 << (bits - 1)) as f32)
        } else {
            let groups = columns.div_ceil(width);
            let shape = [rows.div_ceil(32 / bits), groups];
            let place = self.required("weight_zero_point", &shape)?;
            check(&place, &[Dtype::I32], &[&shape])?;
            let packs = Packs::Rows;
            let words = place.data;
            Zero::Each(
                Values::Packed(Packed { words, bits, packs, row_step: groups, column_step: 1, order: IN_ORDER }),
                0.0,
            )
        };
        let packs = Packs::Columns;
        let packed = Packed { words: main.data, bits, packs, row_step: words, column_step: 1, order: IN_ORDER };
        let groups = self.groups("weight_g_idx", columns, width)?;
        let TensorLocation { file, name, .. } = main;
        Ok(Matrix { file, name, rows, columns, values: Values::Packed(packed), zero, scales, groups })
    }

    /// Number of columns of a packed matrix: its last word of a row may be part empty, so `weight_shape` states it.
    fn columns(&self, main: &TensorLocation<'_>, rows: usize, words: usize, bits: usize) -> Result<usize, ModelError> {
        let place = self.required("weight_shape", &[2])?;
        let dtype = check(&place, &[Dtype::I64, Dtype::I32], &[&[2]])?;
        let stated: Vec<i64> = match dtype {
            Dtype::I64 => place.data.as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect(),
            _ => place.data.as_chunks().0.iter().map(|bytes| i64::from(i32::from_le_bytes(*bytes))).collect(),
        };
        let all = self.unpacked(main, words, bits)?;
        let fits = |columns: &usize| *columns <= all && columns.div_ceil(32 / bits) == words;
        match stated.as_slice() {
            [height, width] if usize::try_from(*height) == Ok(rows) => usize::try_from(*width).ok().filter(fits),
            _ => None,
        }
        .ok_or_else(|| {
            let supported = format!("[{rows}, {} to {all}]", (all + 1).saturating_sub(32 / bits));
            ModelError::unsupported(place.file, place.name, format!("{stated:?}"), &supported)
        })
    }

    /// Integers that pack neighbouring rows, in a tensor `[columns, rows / integers per word]`.
    fn rows_packed(
        &self,
        place: &TensorLocation<'a>,
        columns: usize,
        words: usize,
        bits: usize,
        order: [u8; 8],
    ) -> Result<Values<'a>, ModelError> {
        check(place, &[Dtype::I32], &[&[columns, words]])?;
        Ok(Values::Packed(Packed {
            words: place.data,
            bits,
            packs: Packs::Rows,
            row_step: 1,
            column_step: words,
            order,
        }))
    }

    /// GPTQ: `qweight` is `[columns / integers per word, rows]`.
    fn gptq(
        &self,
        main: TensorLocation<'a>,
        bits: usize,
        group_size: Option<usize>,
        zero_offset: f32,
    ) -> Result<Matrix<'a>, ModelError> {
        let [words, rows] = self.dimensions(&main)?;
        check(&main, &[Dtype::I32], &[&[words, rows]])?;
        let columns = self.unpacked(&main, words, bits)?;
        let width = group_size.unwrap_or(columns).max(1);
        let groups = columns.div_ceil(width);
        let zero_words = rows.div_ceil(32 / bits);
        let zeros = self.required("qzeros", &[groups, zero_words])?;
        let zero = Zero::Each(self.rows_packed(&zeros, groups, zero_words, bits, IN_ORDER)?, zero_offset);
        let scales = Scales::transposed(&self.required("scales", &[groups, rows])?, rows, groups)?;
        let packs = Packs::Columns;
        let packed = Packed { words: main.data, bits, packs, row_step: 1, column_step: rows, order: IN_ORDER };
        let groups = self.groups("g_idx", columns, width)?;
        let TensorLocation { file, name, .. } = main;
        Ok(Matrix { file, name, rows, columns, values: Values::Packed(packed), zero, scales, groups })
    }

    /// AWQ: `qweight` is `[columns, rows / 8]`.
    fn awq(&self, main: TensorLocation<'a>, group_size: Option<usize>) -> Result<Matrix<'a>, ModelError> {
        const BITS: usize = 4;
        let [columns, words] = self.dimensions(&main)?;
        let values = self.rows_packed(&main, columns, words, BITS, AWQ_ORDER)?;
        let rows = self.unpacked(&main, words, BITS)?;
        let width = group_size.unwrap_or(columns).max(1);
        let groups = columns.div_ceil(width);
        let zeros = self.required("qzeros", &[groups, words])?;
        let zero = Zero::Each(self.rows_packed(&zeros, groups, words, BITS, AWQ_ORDER)?, 0.0);
        let scales = Scales::transposed(&self.required("scales", &[groups, rows])?, rows, groups)?;
        let groups = Groups::Runs(width);
        let TensorLocation { file, name, .. } = main;
        Ok(Matrix { file, name, rows, columns, values, zero, scales, groups })
    }
}
