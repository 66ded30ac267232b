//! Reads the fields of a JSON object. Errors name file, field and value.

use std::path::Path;

use serde_json::{Map, Value};

use crate::ModelError;

/// Greatest size that a configuration may state.
pub(super) const MOST: usize = 1 << 24;

/// config.json, or an object within it.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    /// File that errors name.
    pub(crate) file: &'a Path,
    pub(crate) map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The field's value, unless it is absent or null.
    pub(crate) fn present(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|v| !v.is_null())
    }

    /// The error for a field whose value is unsupported; `supported` describes the supported values.
    pub(crate) fn bad(&self, field: &str, supported: &str) -> ModelError {
        let value = self.map.get(field).map_or("absent".into(), Value::to_string);
        ModelError::unsupported(self.file, field, value, supported)
    }

    /// A whole number from 1 to 2^24.
    pub(crate) fn size(&self, field: &str, default: Option<usize>) -> Result<usize, ModelError> {
        self.size_to(MOST, field, default)
    }

    /// A whole number from 1 to `limit`.
    pub(crate) fn size_to(&self, limit: usize, field: &str, default: Option<usize>) -> Result<usize, ModelError> {
        match (self.present(field), default) {
            (None, Some(default)) if default <= limit => Ok(default),
            (value, _) => value
                .and_then(Value::as_u64)
                .and_then(|n| usize::try_from(n).ok())
                .filter(|n| (1..=limit).contains(n))
                .ok_or_else(|| self.bad(field, &format!("a whole number from 1 to {limit}"))),
        }
    }

    /// A positive number.
    pub(crate) fn number(&self, field: &str, default: Option<f64>) -> Result<f64, ModelError> {
        match (self.present(field), default) {
            (None, Some(default)) => Ok(default),
            (value, _) => value
                .and_then(Value::as_f64)
                .filter(|n| n.is_finite() && *n > 0.0)
                .ok_or_else(|| self.bad(field, "a positive number")),
        }
    }

    /// A number from `least` to `most`.
    pub(crate) fn number_in(
        &self,
        least: f64,
        most: f64,
        field: &str,
        default: Option<f64>,
    ) -> Result<f64, ModelError> {
        match (self.present(field), default) {
            (None, Some(default)) => Ok(default),
            (value, _) => value
                .and_then(Value::as_f64)
                .filter(|n| (least..=most).contains(n))
                .ok_or_else(|| self.bad(field, &format!("a number from {least} to {most}"))),
        }
    }

    /// A number from `least` to `most`. `None` if the field is null; `default` if it is absent.
    pub(crate) fn number_or_null(
        &self,
        least: f64,
        most: f64,
        field: &str,
        default: Option<f64>,
    ) -> Result<Option<f64>, ModelError> {
        match self.map.get(field) {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(_) => self.number_in(least, most, field, None).map(Some),
        }
    }

    /// A whole number from 0 to 2^24.
    pub(crate) fn count(&self, field: &str, default: usize) -> Result<usize, ModelError> {
        match self.present(field) {
            None => Ok(default),
            Some(value) => value
                .as_u64()
                .and_then(|n| usize::try_from(n).ok())
                .filter(|n| *n <= MOST)
                .ok_or_else(|| self.bad(field, &format!("a whole number from 0 to {MOST}"))),
        }
    }

    /// A boolean.
    pub(crate) fn flag(&self, field: &str, default: bool) -> Result<bool, ModelError> {
        match self.present(field) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.bad(field, "true or false")),
        }
    }
}
