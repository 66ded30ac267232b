//! Formats of quantised checkpoints: `quantization_config` of config.json, and the tensors that store a matrix.
//!
//! The libraries that write a format define what it means: compressed-tensors (`compressors/`), AutoGPTQ and
//! GPTQModel (`qlinear`), AutoAWQ (`WQLinear_GEMM`), and for fp8 the FineGrainedFP8 and FBGEMM layers of transformers.
//! Settings of activations are ignored: activations are not quantised here.

use std::{fs, path::Path};

use ::safetensors::Dtype;
use serde_json::{Map, Value};

use super::{
    Stored, TensorLocation,
    matrix::{Groups, Index, Matrix, Scales, Zero, check},
    packed::{IN_ORDER, Packed, Packs, Values},
};
use crate::{ModelError, config::Fields};

/// Fields of config.json that describe quantised weights; older files of compressed-tensors have the second one.
pub(crate) const CONFIG_FIELDS: [&str; 2] = ["quantization_config", "compression_config"];

const METHODS: &str = "fp8, fbgemm_fp8, compressed-tensors, gptq, awq";
const FORMATS: &str = "float-quantized, int-quantized, naive-quantized, pack-quantized";

/// The place within a word of each of 8 neighbours in AWQ's GEMM layout.
const AWQ_ORDER: [u8; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// How a checkpoint stores quantised matrices.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Scheme {
    /// `weight` in fp8, with `weight_scale_inv` or `weight_scale`.
    Fp8 {
        /// Rows and columns that share a scale; `None` for a scale per matrix or per row.
        block: Option<[usize; 2]>,
    },
    /// compressed-tensors: `weight` or `weight_packed`, `weight_scale`, `weight_zero_point`.
    Compressed { bits: usize, packed: bool, symmetric: bool, strategy: Strategy },
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

/// Which elements share a scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Strategy {
    Tensor,
    Channel,
    Group(usize),
    Block([usize; 2]),
}

/// `quantization_config`, or an object within it. Errors name the whole path of a field.
struct Settings<'a> {
    file: &'a Path,
    path: String,
    map: &'a Map<String, Value>,
}

impl<'a> Settings<'a> {
    fn present(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    fn bad(&self, field: &str, supported: &str) -> ModelError {
        let value = self.map.get(field).map_or("absent".into(), Value::to_string);
        ModelError::unsupported(self.file, &format!("{}.{field}", self.path), value, supported)
    }

    fn object(&self, field: &str) -> Result<Settings<'a>, ModelError> {
        let map = self.map.get(field).and_then(Value::as_object).ok_or_else(|| self.bad(field, "an object"))?;
        Ok(Settings { file: self.file, path: format!("{}.{field}", self.path), map })
    }

    fn text(&self, field: &str) -> Option<String> {
        self.present(field).and_then(Value::as_str).map(str::to_lowercase)
    }

    /// A number of bits, one of `supported`.
    fn bits(&self, field: &str, supported: &[usize]) -> Result<usize, ModelError> {
        let found = self.present(field).and_then(Value::as_u64).and_then(|bits| usize::try_from(bits).ok());
        let names: Vec<String> = supported.iter().map(usize::to_string).collect();
        found.filter(|bits| supported.contains(bits)).ok_or_else(|| self.bad(field, &names.join(", ")))
    }

    /// A positive group size; `None` for -1, which means all columns.
    fn group_size(&self, field: &str) -> Result<Option<usize>, ModelError> {
        match self.present(field) {
            Some(value) if value.as_i64() == Some(-1) => Ok(None),
            value => match value.and_then(size) {
                Some(size) => Ok(Some(size)),
                None => Err(self.bad(field, "-1, or a whole number from 1 to 16777216")),
            },
        }
    }

    /// Rows and columns of a block; `None` if the field is absent.
    fn block(&self, field: &str) -> Result<Option<[usize; 2]>, ModelError> {
        match self.present(field) {
            None => Ok(None),
            Some(value) => match value.as_array().map(Vec::as_slice) {
                Some([rows, columns]) => size(rows).zip(size(columns)).map(|(rows, columns)| [rows, columns]),
                _ => None,
            }
            .map(Some)
            .ok_or_else(|| self.bad(field, "two whole numbers from 1 to 16777216")),
        }
    }

    fn is(&self, field: &str, flag: bool) -> bool {
        self.present(field).and_then(Value::as_bool) == Some(flag)
    }
}

fn size(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=1 << 24).contains(n))
}

impl Scheme {
    /// Reads the scheme from `folder/config.json`; `None` if the file has none, or if there is no such file.
    pub(super) fn from_folder(folder: &Path) -> Result<Option<Self>, ModelError> {
        let file = folder.join("config.json");
        if !file.exists() {
            return Ok(None);
        }
        let bytes = fs::read(&file).map_err(|e| ModelError::io(&file, e))?;
        let config: Map<String, Value> = serde_json::from_slice(&bytes).map_err(|e| ModelError::malformed(&file, e))?;
        let fields = Fields { file: &file, map: &config };
        let Some(field) = CONFIG_FIELDS.into_iter().find(|field| fields.present(field).is_some()) else {
            return Ok(None);
        };
        let map = config.get(field).and_then(Value::as_object).ok_or_else(|| fields.bad(field, "an object"))?;
        let settings = Settings { file: &file, path: field.into(), map };
        let scheme = match settings.text("quant_method").as_deref() {
            Some("fp8") if settings.text("fmt").is_some_and(|format| format != "e4m3") => {
                return Err(settings.bad("fmt", "e4m3"));
            }
            Some("fp8") => Self::Fp8 { block: settings.block("weight_block_size")? },
            Some("fbgemm_fp8") => Self::Fp8 { block: None },
            Some("compressed-tensors") => compressed(&settings)?,
            Some("gptq") => gptq(&settings)?,
            Some("awq") => awq(&settings)?,
            None if field == CONFIG_FIELDS[1] => compressed(&settings)?,
            _ => return Err(settings.bad("quant_method", METHODS)),
        };
        Ok(Some(scheme))
    }

    /// The weight of `module` (its name in the files); `None` if it isn't quantised. `find` finds a stored tensor.
    pub(super) fn matrix<'a>(
        &self,
        module: &str,
        find: impl Fn(&str) -> Result<Option<TensorLocation<'a>>, ModelError>,
    ) -> Result<Option<Matrix<'a>>, ModelError> {
        let main = match self {
            Self::Fp8 { .. } | Self::Compressed { packed: false, .. } => "weight",
            Self::Compressed { packed: true, .. } => "weight_packed",
            Self::Gptq { .. } | Self::Awq { .. } => "qweight",
        };
        let Some(main) = find(&format!("{module}.{main}"))? else { return Ok(None) };
        let parts = Parts { module, file: main.file, find };
        match *self {
            Self::Fp8 { block } => parts.fp8(main, block),
            Self::Compressed { packed: false, symmetric, strategy, .. } => parts.bytes(main, symmetric, strategy),
            Self::Compressed { bits, symmetric, strategy, .. } => {
                parts.compressed(main, bits, symmetric, strategy).map(Some)
            }
            Self::Gptq { bits, group_size, zero_offset } => parts.gptq(main, bits, group_size, zero_offset).map(Some),
            Self::Awq { group_size } => parts.awq(main, group_size).map(Some),
        }
    }
}

fn compressed(settings: &Settings<'_>) -> Result<Scheme, ModelError> {
    let groups = settings.object("config_groups")?;
    let mut schemes = Vec::new();
    for name in groups.map.keys() {
        let group = groups.object(name)?;
        let format =
            group.text("format").map_or_else(|| (settings, settings.text("format")), |own| (&group, Some(own)));
        let packed = match format.1.as_deref() {
            Some("float-quantized" | "int-quantized" | "naive-quantized") => false,
            Some("pack-quantized") => true,
            _ => return Err(format.0.bad("format", FORMATS)),
        };
        let weights = group.object("weights")?;
        let float = match weights.text("type").as_deref() {
            Some("float") if !packed => true,
            None | Some("int") => false,
            _ => return Err(weights.bad("type", if packed { "int" } else { "int, float" })),
        };
        let bits = weights.bits("num_bits", if packed { &[4, 8] } else { &[8] })?;
        let strategy = match weights.text("strategy").as_deref() {
            Some("tensor") => Strategy::Tensor,
            Some("channel") => Strategy::Channel,
            Some("block") => {
                let block = weights.block("block_structure")?;
                Strategy::Block(block.ok_or_else(|| weights.bad("block_structure", "two whole numbers"))?)
            }
            Some("group") => weights.group_size("group_size")?.map_or(Strategy::Channel, Strategy::Group),
            _ => return Err(weights.bad("strategy", "tensor, channel, group, block")),
        };
        if !weights.is("symmetric", true) && (float || matches!(strategy, Strategy::Tensor | Strategy::Block(_))) {
            return Err(weights.bad("symmetric", "true for this type and strategy"));
        }
        schemes.push(Scheme::Compressed { bits, packed, symmetric: weights.is("symmetric", true), strategy });
    }
    // Sparse weights, and weights that expect rotated inputs.
    let sparsity = settings.present("sparsity_config").and_then(Value::as_object).filter(|map| !map.is_empty());
    if sparsity.is_some_and(|map| map.get("format").and_then(Value::as_str) != Some("dense")) {
        return Err(settings.object("sparsity_config")?.bad("format", "dense"));
    }
    if settings.present("transform_config").and_then(Value::as_object).is_some_and(|map| !map.is_empty()) {
        return Err(settings.bad("transform_config", "absent or {}"));
    }
    match schemes.as_slice() {
        [first, rest @ ..] if rest.iter().all(|other| other == first) => Ok(first.clone()),
        _ => Err(settings.bad("config_groups", "one group, or several that store weights in the same way")),
    }
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
    fn compressed(
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
