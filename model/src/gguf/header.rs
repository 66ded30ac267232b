//! The header of a GGUF file: its metadata, and the position and type of its tensors.
//!
//! candle-core has a reader too, but it divides by the alignment that the file states, allocates 32 bytes per array
//! element, and does not name a tensor of unknown type. This reader checks every length against the file before using
//! it, and does not copy texts and arrays.

use std::{borrow::Cow, collections::HashMap, ops::Range, path::Path};

use candle_core::quantized::GgmlDType;
use safetensors::Dtype;
use serde_json::json;

use crate::{ModelError, weights::Stored};

const MAGIC: &[u8] = b"GGUF";
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_DIMENSIONS: u32 = 4;

/// A metadata value. Texts and arrays are byte ranges of the file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(Range<usize>),
    Array { kind: u32, count: usize, bytes: Range<usize> },
}

/// A tensor's shape, type and byte range.
pub(crate) struct Entry {
    pub name: String,
    /// Outermost dimension first; the file stores dimensions in reverse order.
    pub shape: Vec<usize>,
    pub stored: Stored,
    pub bytes: Range<usize>,
}

/// The header. Texts and arrays are byte ranges of the file.
pub(crate) struct Header {
    pub metadata: HashMap<String, Value>,
    pub tensors: Vec<Entry>,
}

/// Reads a file from its beginning.
struct Reader<'a> {
    file: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: u64, what: &str) -> Result<Range<usize>, ModelError> {
        let left = self.bytes.len() - self.at;
        let taken = usize::try_from(count).ok().filter(|count| *count <= left).ok_or_else(|| {
            ModelError::malformed(self.file, format!("{what} takes {count} bytes, but the file has {left} left"))
        })?;
        let start = self.at;
        self.at += taken;
        Ok(start..self.at)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], ModelError> {
        let range = self.take(N as u64, what)?;
        let mut out = [0; N];
        out.copy_from_slice(&self.bytes[range]);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32, ModelError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, ModelError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn text(&mut self, what: &str) -> Result<Range<usize>, ModelError> {
        let length = self.u64(what)?;
        self.take(length, what)
    }

    fn name(&mut self, what: &str) -> Result<String, ModelError> {
        let range = self.text(what)?;
        Ok(String::from_utf8_lossy(&self.bytes[range]).into_owned())
    }

    fn value(&mut self, key: &str) -> Result<Value, ModelError> {
        let kind = self.u32(key)?;
        if kind != ARRAY {
            return self.scalar(kind, key);
        }
        let kind = self.u32(key)?;
        let count = self.u64(key)?;
        let start = self.at;
        match (kind, scalar_bytes(kind)) {
            (_, Some(size)) => {
                self.take(count.saturating_mul(size), key)?;
            }
            (TEXT, None) => {
                for _ in 0..count {
                    self.text(key)?;
                }
            }
            _ => return Err(self.unknown_kind(key, kind)),
        }
        // The elements fit in the file, so their count fits in a usize.
        Ok(Value::Array { kind, count: count as usize, bytes: start..self.at })
    }

    fn scalar(&mut self, kind: u32, key: &str) -> Result<Value, ModelError> {
        Ok(match kind {
            0 => Value::Unsigned(u8::from_le_bytes(self.array(key)?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.array(key)?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array(key)?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array(key)?).into()),
            4 => Value::Unsigned(self.u32(key)?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array(key)?).into()),
            6 => Value::Float(as_written(f32::from_le_bytes(self.array(key)?))),
            7 => Value::Bool(self.array::<1>(key)?[0] != 0),
            TEXT => Value::Text(self.text(key)?),
            10 => Value::Unsigned(self.u64(key)?),
            11 => Value::Signed(i64::from_le_bytes(self.array(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            other => return Err(self.unknown_kind(key, other)),
        })
    }

    fn unknown_kind(&self, key: &str, kind: u32) -> ModelError {
        ModelError::unsupported(self.file, &format!("type of {key}"), kind, "numbers, texts, and arrays of either")
    }

    /// Reads a tensor's entry. Its byte range starts at 0; the second value is its offset from the start of the tensor
    /// data.
    fn entry(&mut self) -> Result<(Entry, u64), ModelError> {
        let file = self.file;
        let name = self.name("a tensor's name")?;
        let dimensions = self.u32(&name)?;
        if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
            let supported = format!("1 to {MAX_DIMENSIONS}");
            return Err(ModelError::unsupported(file, &format!("dimensions of {name}"), dimensions, &supported));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let size = self.u64(&name)?;
            let size = usize::try_from(size).ok().filter(|size| *size > 0);
            shape.insert(0, size.ok_or_else(|| ModelError::malformed(file, format!("a size of {name} is 0")))?);
        }
        let kind = self.u32(&name)?;
        let stored = stored(kind)
            .ok_or_else(|| ModelError::unsupported(file, &format!("type of {name}"), kind, &supported_types()))?;
        let offset = self.u64(&name)?;
        // A row must consist of whole blocks, so that rows can be read individually.
        let row: Option<usize> = shape[1..].iter().try_fold(1_usize, |n, size| n.checked_mul(*size));
        let bytes = row.and_then(|row| stored.bytes(row)).and_then(|row_bytes| row_bytes.checked_mul(shape[0]));
        let bytes = bytes.ok_or_else(|| {
            ModelError::malformed(file, format!("tensor {name} of shape {shape:?} can't be stored as {stored:?}"))
        })?;
        Ok((Entry { name, shape, stored, bytes: 0..bytes }, offset))
    }
}

const TEXT: u32 = 8;
const ARRAY: u32 = 9;

fn scalar_bytes(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// The shortest decimal that rounds to this f32: 1e-5, not 9.9999997e-6.
fn as_written(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// Supported tensor types and their numbers in the file.
const TYPES: [(u32, Stored); 14] = [
    (0, Stored::Plain(Dtype::F32)),
    (1, Stored::Plain(Dtype::F16)),
    (2, Stored::Blocks(GgmlDType::Q4_0)),
    (3, Stored::Blocks(GgmlDType::Q4_1)),
    (6, Stored::Blocks(GgmlDType::Q5_0)),
    (7, Stored::Blocks(GgmlDType::Q5_1)),
    (8, Stored::Blocks(GgmlDType::Q8_0)),
    (10, Stored::Blocks(GgmlDType::Q2K)),
    (11, Stored::Blocks(GgmlDType::Q3K)),
    (12, Stored::Blocks(GgmlDType::Q4K)),
    (13, Stored::Blocks(GgmlDType::Q5K)),
    (14, Stored::Blocks(GgmlDType::Q6K)),
    (28, Stored::Plain(Dtype::F64)),
    (30, Stored::Plain(Dtype::BF16)),
];

fn stored(kind: u32) -> Option<Stored> {
    TYPES.iter().find(|(number, _)| *number == kind).map(|(_, stored)| *stored)
}

fn supported_types() -> String {
    let types: Vec<String> = TYPES.iter().map(|(number, stored)| format!("{number} ({stored:?})")).collect();
    types.join(", ")
}

impl Header {
    /// Reads the header of a whole file.
    pub(crate) fn read(file: &Path, bytes: &[u8]) -> Result<Self, ModelError> {
        let mut reader = Reader { file, bytes, at: 0 };
        let magic: [u8; 4] = reader.array("the magic number")?;
        if magic != MAGIC {
            return Err(ModelError::malformed(file, "not a GGUF file: it does not begin with GGUF"));
        }
        let version = reader.u32("the version")?;
        if !(2..=3).contains(&version) {
            return Err(ModelError::unsupported(file, "version", version, "2, 3, little-endian"));
        }
        let (tensor_count, metadata_count) = (reader.u64("the tensor count")?, reader.u64("the metadata count")?);
        // These counts allocate nothing: if a count is too large, reading hits the end of the file.
        let mut metadata = HashMap::new();
        for _ in 0..metadata_count {
            let key = reader.name("a metadata key")?;
            let value = reader.value(&key)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(ModelError::malformed(file, format!("{key} is there twice")));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(Value::Unsigned(n)) if n.is_power_of_two() && (8..=1 << 20).contains(n) => *n,
            Some(_) => {
                let metadata = Metadata { file, bytes, values: &metadata };
                return Err(metadata.bad("general.alignment", "a power of two from 8 to 1048576"));
            }
        };
        let mut entries = Vec::new();
        for _ in 0..tensor_count {
            entries.push(reader.entry()?);
        }
        let start = (reader.at as u64).next_multiple_of(alignment);
        let mut tensors = Vec::new();
        for (mut entry, offset) in entries {
            let (name, length) = (&entry.name, bytes.len());
            if !offset.is_multiple_of(alignment) {
                let field = format!("offset of {name}");
                return Err(ModelError::unsupported(file, &field, offset, &format!("multiples of {alignment}")));
            }
            let first = start.checked_add(offset).and_then(|first| usize::try_from(first).ok());
            let end = first.and_then(|first| first.checked_add(entry.bytes.end)).filter(|end| *end <= length);
            let (Some(first), Some(end)) = (first, end) else {
                let size = entry.bytes.end;
                let fault =
                    format!("tensor {name} has {size} bytes at offset {offset}, outside of the file's {length}");
                return Err(ModelError::malformed(file, fault));
            };
            entry.bytes = first..end;
            tensors.push(entry);
        }
        Ok(Self { metadata, tensors })
    }
}

/// Metadata, and the file that contains it.
pub(crate) struct Metadata<'a> {
    pub file: &'a Path,
    pub bytes: &'a [u8],
    pub values: &'a HashMap<String, Value>,
}

impl<'a> Metadata<'a> {
    /// An error that names `key`, its value and the supported values.
    pub(crate) fn bad(&self, key: &str, supported: &str) -> ModelError {
        let value = self.json(key);
        let value = if value.is_null() { "absent".into() } else { value.to_string() };
        ModelError::unsupported(self.file, key, value, supported)
    }

    /// A value as JSON; null if absent. For an array, a text that states its size.
    pub(crate) fn json(&self, key: &str) -> serde_json::Value {
        match self.values.get(key) {
            None => serde_json::Value::Null,
            Some(Value::Unsigned(n)) => json!(n),
            Some(Value::Signed(n)) => json!(n),
            // JSON has no NaN or infinity; null would be mistaken for an absent value.
            Some(Value::Float(n)) if !n.is_finite() => json!(n.to_string()),
            Some(Value::Float(n)) => json!(n),
            Some(Value::Bool(b)) => json!(b),
            Some(Value::Text(range)) => json!(self.lossy(range)),
            Some(Value::Array { count, .. }) => json!(format!("an array of {count}")),
        }
    }

    fn lossy(&self, range: &Range<usize>) -> Cow<'a, str> {
        String::from_utf8_lossy(&self.bytes[range.clone()])
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<Cow<'a, str>>, ModelError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Text(range)) => Ok(Some(self.lossy(range))),
            Some(_) => Err(self.bad(key, "a text")),
        }
    }

    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.bad(key, "true or false")),
        }
    }

    pub(crate) fn index(&self, key: &str) -> Result<Option<usize>, ModelError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Unsigned(n)) => Ok(usize::try_from(*n).ok()),
            Some(Value::Signed(n)) => usize::try_from(*n).map(Some).map_err(|_| self.bad(key, "0 or more")),
            Some(_) => Err(self.bad(key, "a whole number")),
        }
    }

    pub(crate) fn texts(&self, key: &str) -> Result<Option<Vec<Cow<'a, str>>>, ModelError> {
        let (count, bytes) = match self.values.get(key) {
            None => return Ok(None),
            // An empty array may have any element type, because the writer cannot know it.
            Some(Value::Array { kind, count, bytes }) if *kind == TEXT || *count == 0 => (*count, bytes),
            Some(_) => return Err(self.bad(key, "an array of texts")),
        };
        let mut reader = Reader { file: self.file, bytes: &self.bytes[..bytes.end], at: bytes.start };
        (0..count).map(|_| Ok(self.lossy(&reader.text(key)?))).collect::<Result<_, _>>().map(Some)
    }

    /// An array of `count` numbers; `None` if absent.
    pub(crate) fn numbers(&self, key: &str, count: usize) -> Result<Option<Vec<f64>>, ModelError> {
        let (kind, bytes) = match self.values.get(key) {
            None => return Ok(None),
            Some(Value::Array { kind, count: found, bytes }) if *kind != TEXT && *found == count => (*kind, bytes),
            Some(_) => return Err(self.bad(key, &format!("an array of {count} numbers"))),
        };
        let mut reader = Reader { file: self.file, bytes: &self.bytes[..bytes.end], at: bytes.start };
        let number = |value| match value {
            Value::Unsigned(n) => n as f64,
            Value::Signed(n) => n as f64,
            Value::Float(n) => n,
            Value::Bool(b) => f64::from(u8::from(b)),
            Value::Text(_) | Value::Array { .. } => f64::NAN,
        };
        (0..count).map(|_| Ok(number(reader.scalar(kind, key)?))).collect::<Result<_, _>>().map(Some)
    }
}
