//! SmolLM3: Llama's block, without rotation in every fourth layer.

use serde_json::{Map, Value};

use super::{Defaults, Family, GgufFamily, GgufWindow, OwnFields, Sizes, layers, llama};
use crate::{ModelError, config::Fields};

/// A list with 1 for each layer with rotation, in spite of its name.
const ROTATED: &str = "no_rope_layers";
/// Every layer of this number has no rotation, if that list is absent.
const INTERVAL: &str = "no_rope_layer_interval";
const DEFAULT_INTERVAL: usize = 4;

pub(super) const FAMILY: Family = Family {
    class: "SmolLM3ForCausalLM",
    model_type: "smollm3",
    gguf: Some(GgufFamily { architecture: "smollm3", interleaved: true, fields: &[], window: GgufWindow::Refused }),
    defaults: Defaults { tie_word_embeddings: true, ..Defaults::LLAMA },
    read,
    keep_layers,
    ..llama::FAMILY
};

fn read(fields: Fields<'_>, sizes: Sizes) -> Result<OwnFields, ModelError> {
    let interval = fields.size(INTERVAL, Some(DEFAULT_INTERVAL))?;
    let rotated = match layers::flags(fields, ROTATED, sizes.layers)? {
        Some(stated) => stated,
        None => (0..sizes.layers).map(layers::in_pattern(interval)).collect(),
    };
    let window = if fields.flag("use_sliding_window", false)? { layers::window(fields)? } else { None };
    let sliding = layers::sliding(fields, sizes.layers, |layer| !rotated[layer])?;
    let windows = sliding.into_iter().map(|sliding| window.filter(|_| sliding)).collect();
    let mut own = OwnFields::with_windows(fields, sizes, windows)?;
    for (layer, rotated) in own.layers.iter_mut().zip(rotated) {
        layer.rope = layer.rope.filter(|_| rotated);
    }
    Ok(own)
}

fn keep_layers(raw: &mut Map<String, Value>, kept: &[u32]) {
    if raw.get(ROTATED).is_some_and(Value::is_array) {
        return layers::keep_entries(raw, ROTATED, kept);
    }
    let interval = raw.get(INTERVAL).and_then(Value::as_u64).map_or(DEFAULT_INTERVAL, |interval| interval as usize);
    let rotated = layers::in_pattern(interval);
    let list: Vec<u8> = kept.iter().map(|layer| u8::from(rotated(*layer as usize))).collect();
    raw.insert(ROTATED.into(), list.into());
}
