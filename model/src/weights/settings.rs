//! Settings of quantised weights, read field by field.

use std::path::Path;

use serde_json::{Map, Value};

use crate::ModelError;

/// An object of settings in a file. Errors name the whole path of a field.
pub(super) struct Settings<'a> {
    pub file: &'a Path,
    /// Where the object is in the file; empty for the whole file.
    pub path: String,
    pub map: &'a Map<String, Value>,
}

impl<'a> Settings<'a> {
    /// The value of a field that is there and not null.
    pub fn present(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// The error for a field with another value than `supported`.
    pub fn bad(&self, field: &str, supported: &str) -> ModelError {
        let value = self.map.get(field).map_or("absent".into(), Value::to_string);
        ModelError::unsupported(self.file, &self.named(field), value, supported)
    }

    /// The whole path of a field.
    fn named(&self, field: &str) -> String {
        if self.path.is_empty() { field.into() } else { format!("{}.{field}", self.path) }
    }

    /// The object in a field.
    pub fn object(&self, field: &str) -> Result<Settings<'a>, ModelError> {
        let map = self.map.get(field).and_then(Value::as_object).ok_or_else(|| self.bad(field, "an object"))?;
        Ok(Settings { file: self.file, path: self.named(field), map })
    }

    /// A text in small letters.
    pub fn text(&self, field: &str) -> Option<String> {
        self.present(field).and_then(Value::as_str).map(str::to_lowercase)
    }

    /// A list of texts; empty if the field is absent.
    pub fn texts(&self, field: &str) -> Result<Vec<&'a str>, ModelError> {
        let Some(value) = self.present(field) else { return Ok(Vec::new()) };
        let texts = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
        texts.ok_or_else(|| self.bad(field, "a list of texts"))
    }

    /// A number of bits, one of `supported`.
    pub fn bits(&self, field: &str, supported: &[usize]) -> Result<usize, ModelError> {
        let found = self.present(field).and_then(Value::as_u64).and_then(|bits| usize::try_from(bits).ok());
        let names: Vec<String> = supported.iter().map(usize::to_string).collect();
        found.filter(|bits| supported.contains(bits)).ok_or_else(|| self.bad(field, &names.join(", ")))
    }

    /// A positive group size; `None` for -1, which means all columns.
    pub fn group_size(&self, field: &str) -> Result<Option<usize>, ModelError> {
        match self.present(field) {
            Some(value) if value.as_i64() == Some(-1) => Ok(None),
            value => match value.and_then(size) {
                Some(size) => Ok(Some(size)),
                None => Err(self.bad(field, "-1, or a whole number from 1 to 16777216")),
            },
        }
    }

    /// Rows and columns of a block; `None` if the field is absent.
    pub fn block(&self, field: &str) -> Result<Option<[usize; 2]>, ModelError> {
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

    /// Whether a field has this value.
    pub fn is(&self, field: &str, flag: bool) -> bool {
        self.present(field).and_then(Value::as_bool) == Some(flag)
    }
}

fn size(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=1 << 24).contains(n))
}
