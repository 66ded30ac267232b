//! Attention settings of layers, and the fields of config.json that they are read from.

use serde_json::{Map, Value, json};

use crate::{ModelError, config::Fields};

const SLIDING: &str = "sliding_attention";
const FULL: &str = "full_attention";
const TYPES: &str = "layer_types";
const WINDOW: &str = "sliding_window";

/// Attention settings that may differ between the layers of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// Index of the layer's rotary embedding in [`ModelConfig::ropes`](crate::ModelConfig::ropes); `None`: no rotation.
    pub rope: Option<usize>,
    /// Sliding window: number of tokens that a query attends to, itself included; `None` means all.
    pub window: Option<usize>,
    /// Factor of the scores; `None` means `1 / sqrt(head_dim)`.
    pub score_scale: Option<f64>,
    /// Scores are `cap * tanh(score / cap)`, after the factor; `None`: as they are.
    pub score_cap: Option<f64>,
}

impl LayerSpec {
    /// Attention to all tokens, without rotation.
    pub(crate) const PLAIN: Self = Self { rope: None, window: None, score_scale: None, score_cap: None };

    /// Factor for the queries that gives `score_scale` with attention that multiplies scores by `1 / sqrt(head_dim)`.
    /// `None` leaves the queries as they are.
    pub(crate) fn query_factor(&self, head_dim: usize) -> Option<f32> {
        self.score_scale.map(|scale| (scale * (head_dim as f64).sqrt()) as f32)
    }

    /// Position of the first token that a query at `position` attends to.
    pub fn first_visible(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

/// The field `sliding_window`; `None` if absent or null.
pub(super) fn window(fields: Fields<'_>) -> Result<Option<usize>, ModelError> {
    fields.present(WINDOW).map(|_| fields.size(WINDOW, None)).transpose()
}

/// The field `sliding_window`, `default` if it is absent; `None` if it is null.
pub(super) fn window_or(fields: Fields<'_>, default: usize) -> Result<Option<usize>, ModelError> {
    if fields.map.contains_key(WINDOW) { window(fields) } else { Ok(Some(default)) }
}

/// Which of `layers` layers have a sliding window: as `layer_types` says, or `default` of the layer's number if that is
/// absent.
pub(super) fn sliding(
    fields: Fields<'_>,
    layers: usize,
    default: impl Fn(usize) -> bool,
) -> Result<Vec<bool>, ModelError> {
    let Some(value) = fields.present(TYPES) else { return Ok((0..layers).map(default).collect()) };
    let Some(types) = value.as_array().filter(|types| types.len() == layers) else {
        let found = value.as_array().map_or_else(|| value.to_string(), |types| format!("a list of {}", types.len()));
        let supported = format!("a list with an entry for each layer ({layers})");
        return Err(ModelError::unsupported(fields.file, TYPES, found, &supported));
    };
    let sliding = |kind: &Value| match kind.as_str() {
        Some(SLIDING) => Ok(true),
        Some(FULL) => Ok(false),
        _ => Err(ModelError::unsupported(fields.file, TYPES, kind, &format!("{SLIDING}, {FULL}"))),
    };
    types.iter().map(sliding).collect()
}

/// Every `pattern`th layer attends to all tokens; the others have a window.
pub(super) fn in_pattern(pattern: usize) -> impl Fn(usize) -> bool {
    move |layer| !(layer + 1).is_multiple_of(pattern.max(1))
}

/// Writes `layer_types` for a model that keeps only these layers, if the full model's configuration had none. `sliding`
/// says it of each of the full model's layers.
pub(super) fn write_types(raw: &mut Map<String, Value>, kept: &[u32], sliding: impl Fn(usize) -> bool) {
    if raw.get(TYPES).is_none_or(Value::is_null) {
        let kind = |layer: &u32| if sliding(*layer as usize) { SLIDING } else { FULL };
        raw.insert(TYPES.into(), kept.iter().map(kind).collect::<Vec<_>>().into());
    }
}

/// Keeps these entries of a list with one entry per layer.
pub(super) fn keep_entries(raw: &mut Map<String, Value>, field: &str, kept: &[u32]) {
    if let Some(Value::Array(entries)) = raw.get_mut(field) {
        *entries = kept.iter().filter_map(|layer| entries.get(*layer as usize).cloned()).collect();
    }
}

/// A list with one entry per layer, 1 or 0.
pub(super) fn flags(fields: Fields<'_>, field: &str, layers: usize) -> Result<Option<Vec<bool>>, ModelError> {
    let Some(value) = fields.present(field) else { return Ok(None) };
    let flag = |value: &Value| match value.as_u64() {
        Some(0) => Some(false),
        Some(1) => Some(true),
        _ => value.as_bool(),
    };
    let list = value.as_array().filter(|list| list.len() >= layers);
    let found: Option<Vec<bool>> = list.and_then(|list| list.iter().take(layers).map(flag).collect());
    match found {
        Some(found) => Ok(Some(found)),
        None => {
            let found =
                value.as_array().map_or_else(|| value.clone(), |list| json!(format!("a list of {}", list.len())));
            let supported = format!("a list of 0 and 1 for each layer ({layers})");
            Err(ModelError::unsupported(fields.file, field, found, &supported))
        }
    }
}
