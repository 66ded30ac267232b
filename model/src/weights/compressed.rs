//! Settings of compressed-tensors: which modules are quantised, and how.

use std::path::PathBuf;

use fancy_regex::Regex;
use serde_json::Value;

use super::settings::Settings;
use crate::ModelError;

const FORMATS: &str = "float-quantized, int-quantized, naive-quantized, pack-quantized";

/// Which elements share a scale.
#[derive(Clone, Copy, Debug)]
pub(super) enum Strategy {
    Tensor,
    Channel,
    Group(usize),
    Block([usize; 2]),
}

/// How the weight of a module is stored.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub bits: usize,
    pub packed: bool,
    pub symmetric: bool,
    pub strategy: Strategy,
}

/// The groups of a checkpoint.
#[derive(Debug)]
pub(super) struct Compressed {
    file: PathBuf,
    /// What groups apply to; first what wins. `None` for groups that quantise no weights.
    targets: Vec<(Target, Option<Layout>)>,
    /// Modules that are left as they are.
    ignore: Vec<Target>,
}

/// A set of modules, as `match_name` and `_match_class` of compressed-tensors read it (utils/match.py).
#[derive(Debug)]
enum Target {
    /// One with this name, or all of a class with this name.
    Name(String),
    /// Those whose names begin with a match of a regular expression (`re:...`).
    Pattern(String, Regex),
}

impl Target {
    fn new(text: &str, settings: &Settings<'_>, field: &str) -> Result<Self, ModelError> {
        let Some(pattern) = text.strip_prefix("re:") else { return Ok(Self::Name(text.into())) };
        // Python's `re.match` looks at the beginning only.
        let regex = Regex::new(&format!(r"\A(?:{pattern})"));
        regex.map(|regex| Self::Pattern(text.into(), regex)).map_err(|_| settings.bad(field, "regular expressions"))
    }

    /// What sorts first wins: names, then patterns.
    fn rank(&self) -> (bool, &str) {
        match self {
            Self::Name(name) => (false, name),
            Self::Pattern(text, _) => (true, text),
        }
    }

    fn has_name(&self, module: &str) -> Result<bool, String> {
        match self {
            Self::Name(name) => Ok(name == module),
            Self::Pattern(text, regex) => regex.is_match(module).map_err(|_| text.clone()),
        }
    }

    fn has_class(&self, module: &str) -> bool {
        let class = if module.ends_with("embed_tokens") { "Embedding" } else { "Linear" };
        matches!(self, Self::Name(name) if name == class || name == "Module")
    }
}

impl Compressed {
    pub(super) fn new(settings: &Settings<'_>) -> Result<Self, ModelError> {
        let groups = settings.object("config_groups")?;
        let mut targets: Vec<(Target, Option<Layout>)> = Vec::new();
        for name in groups.map.keys() {
            let group = groups.object(name)?;
            let layout = layout(settings, &group)?;
            let texts = group.texts("targets")?;
            if texts.is_empty() {
                return Err(group.bad("targets", "names of modules or classes, or regular expressions after re:"));
            }
            for text in texts {
                let target = Target::new(text, &group, "targets")?;
                // The last group with a target has it.
                targets.retain(|(other, _)| other.rank() != target.rank());
                targets.push((target, layout));
            }
        }
        if targets.is_empty() {
            return Err(settings.bad("config_groups", "one group, or several"));
        }
        targets.sort_by(|(a, _), (b, _)| a.rank().cmp(&b.rank()));
        let ignore = settings.texts("ignore")?.into_iter().map(|text| Target::new(text, settings, "ignore"));
        let ignore = ignore.collect::<Result<_, _>>()?;
        // Sparse weights, and weights that expect rotated inputs.
        let sparsity = settings.present("sparsity_config").and_then(Value::as_object).filter(|map| !map.is_empty());
        if sparsity.is_some_and(|map| map.get("format").and_then(Value::as_str) != Some("dense")) {
            return Err(settings.object("sparsity_config")?.bad("format", "dense"));
        }
        if settings.present("transform_config").and_then(Value::as_object).is_some_and(|map| !map.is_empty()) {
            return Err(settings.bad("transform_config", "absent or {}"));
        }
        Ok(Self { file: settings.file.into(), targets, ignore })
    }

    /// How the weight of `module` is stored; `None` if it is not quantised. A target that names the module wins over a pattern,
    /// and a pattern over a class.
    pub(super) fn layout(&self, module: &str) -> Result<Option<Layout>, ModelError> {
        let named = |target: &Target| {
            target.has_name(module).map_err(|pattern| {
                ModelError::unsupported(&self.file, "the work of a target", pattern, "patterns that end soon")
            })
        };
        for target in &self.ignore {
            if target.has_class(module) || named(target)? {
                return Ok(None);
            }
        }
        for (target, layout) in &self.targets {
            if named(target)? {
                return Ok(*layout);
            }
        }
        Ok(self.targets.iter().find(|(target, _)| target.has_class(module)).and_then(|(_, layout)| *layout))
    }
}

/// How a group stores weights; `None` if it quantises none.
fn layout(settings: &Settings<'_>, group: &Settings<'_>) -> Result<Option<Layout>, ModelError> {
    if group.map.get("weights").is_none_or(Value::is_null) {
        return Ok(None);
    }
    let own = group.text("format");
    let (place, format) = if own.is_some() { (group, own) } else { (settings, settings.text("format")) };
    let packed = match format.as_deref() {
        Some("float-quantized" | "int-quantized" | "naive-quantized") => false,
        Some("pack-quantized") => true,
        _ => return Err(place.bad("format", FORMATS)),
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
    Ok(Some(Layout { bits, packed, symmetric: weights.is("symmetric", true), strategy }))
}
