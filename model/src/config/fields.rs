//! Reads the fields of a JSON object. Errors name file, field and value.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{ModelError, Rope, RopeScaling};

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
        self.size_to(1 << 24, field, default)
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

    /// A boolean.
    pub(crate) fn flag(&self, field: &str, default: bool) -> Result<bool, ModelError> {
        match self.present(field) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.bad(field, "true or false")),
        }
    }

    /// The rotary embedding of a model with a single one. transformers 5 writes `rope_parameters`; earlier versions
    /// write `rope_theta` and `rope_scaling`.
    pub(crate) fn rope(&self, head_dim: usize) -> Result<Rope, ModelError> {
        let object = self.present("rope_parameters").or(self.present("rope_scaling")).and_then(Value::as_object);
        let empty = Map::new();
        let rope = Fields { file: self.file, map: object.unwrap_or(&empty) };
        let theta = rope.number("rope_theta", Some(self.number("rope_theta", Some(10_000.0))?))?;
        Ok(Rope { theta, scaling: rope.scaling(head_dim)? })
    }

    fn scaling(&self, head_dim: usize) -> Result<RopeScaling, ModelError> {
        let kind = self.present("rope_type").or(self.present("type")).and_then(Value::as_str).unwrap_or("default");
        match kind {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: self.number("factor", None)? }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: self.number("factor", None)?,
                low_freq_factor: self.number("low_freq_factor", None)?,
                high_freq_factor: self.number("high_freq_factor", None)?,
                original_max_position_embeddings: self.size("original_max_position_embeddings", None)? as u32,
            }),
            "factors" => Ok(RopeScaling::Factors(self.factors(head_dim)?)),
            other => Err(ModelError::unsupported(self.file, "rope_type", other, "default, linear, llama3, factors")),
        }
    }

    fn factors(&self, head_dim: usize) -> Result<Vec<f32>, ModelError> {
        let supported = "a list of numbers from 1e-6 to 1e6";
        let factor = |value: &Value| value.as_f64().filter(|n| (1e-6..=1e6).contains(n)).map(|n| n as f32);
        let factors = self.present("factors").and_then(Value::as_array);
        let factors: Option<Vec<f32>> = factors.and_then(|list| list.iter().map(factor).collect());
        let factors = factors.ok_or_else(|| self.bad("factors", supported))?;
        if factors.len() != head_dim / 2 {
            let (count, supported) = (factors.len(), format!("half of head_dim ({head_dim})"));
            return Err(ModelError::unsupported(self.file, "number of rope factors", count, &supported));
        }
        Ok(factors)
    }
}
