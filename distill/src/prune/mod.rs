//! Prunes a full model to a decode model, by width and optionally by depth.

mod cut;
mod importance;
mod samples;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use candle_core::DType;
use indicatif::{ProgressBar, ProgressStyle};
use overfill_model::{Decoder, DeviceSpec, ModelConfig, Ops, Provenance, WeightDtype, Weights};

pub use cut::Kept;
pub use importance::{Importance, Norm};

use crate::{folder, train::load_text};

/// Samples run through the model together until they have this many tokens. It bounds the memory of activations, and one
/// widening of the weights serves all of them.
const BATCH_TOKENS: usize = 2048;

/// Settings of a pruning run.
#[derive(Clone, Debug)]
pub struct PruneConfig {
    /// Folder of the full model.
    pub model: PathBuf,
    /// Folder for the pruned model.
    pub out: PathBuf,
    /// Text or JSONL file with calibration samples.
    pub calibration: PathBuf,
    /// Maximum number of samples.
    pub samples: usize,
    /// Maximum length of a sample in tokens.
    pub sample_tokens: usize,
    /// Hidden width.
    pub hidden: Width,
    /// MLP width.
    pub intermediate: Width,
    /// Widths are rounded down to a multiple of this.
    pub multiple_of: usize,
    /// Norm over samples.
    pub norm: Norm,
    /// Layers to keep, ascending. `None` keeps all.
    pub layers: Option<Vec<u32>>,
    /// Device for calibration.
    pub device: DeviceSpec,
    /// Whether to draw progress bars.
    pub progress: bool,
}

/// Number of channels to keep.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Width {
    /// Absolute number of channels.
    Channels(usize),
    /// Fraction to remove. `int(width * (1 - ratio))` channels are kept.
    Ratio(f64),
}

impl Width {
    fn keep(self, field: &str, width: usize, multiple_of: usize) -> Result<usize> {
        let keep = match self {
            Self::Channels(n) => n,
            Self::Ratio(ratio) if (0.0..1.0).contains(&ratio) => (width as f64 * (1.0 - ratio)) as usize,
            Self::Ratio(ratio) => bail!("ratio must be in 0..1, got {ratio}"),
        };
        let rounded = keep / multiple_of.max(1) * multiple_of.max(1);
        if rounded == 0 || rounded > width {
            bail!("{field}: {rounded} channels of {width} can't be kept ({keep} in multiples of {multiple_of})");
        }
        Ok(rounded)
    }
}

fn bar(shown: bool, length: u64, what: &'static str) -> Result<ProgressBar> {
    if !shown {
        return Ok(ProgressBar::hidden());
    }
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {elapsed} (left {eta})");
    let bar = ProgressBar::new(length).with_style(style.context("progress bar")?);
    bar.set_message(what);
    Ok(bar)
}

/// Calibrates, prunes, and writes the pruned model's folder. Returns the kept layers and channels.
///
/// Calibration loads the full model once, in its stored type. Cutting reads one tensor at a time from the files.
pub fn prune(config: &PruneConfig) -> Result<Kept> {
    let full = ModelConfig::from_folder(&config.model)?;
    let weights = Weights::open(&config.model)?;
    let hidden = config.hidden.keep("hidden", full.hidden_size, config.multiple_of)?;
    let intermediate = config.intermediate.keep("intermediate", full.intermediate_size, config.multiple_of)?;
    let layers = match &config.layers {
        None => (0..full.num_hidden_layers as u32).collect(),
        Some(layers) => layers.clone(),
    };
    let ascending = layers.windows(2).all(|pair| pair[0] < pair[1]);
    if layers.is_empty() || !ascending || layers.iter().any(|l| *l as usize >= full.num_hidden_layers) {
        bail!("layers must be ascending and below {}, got {layers:?}", full.num_hidden_layers);
    }
    if config.samples == 0 || config.sample_tokens == 0 {
        bail!("samples and sample-tokens must be 1 or more");
    }

    let importance = calibrate(config, &full)?;
    let kept = Kept {
        hidden: importance.hidden_channels(hidden),
        intermediate: layers.iter().map(|l| importance.intermediate_channels(*l as usize, intermediate)).collect(),
        layers,
    };

    folder::copy_text_files(&config.model, &config.out)?;
    let writing = bar(config.progress, 0, "writing")?;
    cut::write(&weights, &full, &kept, &config.out, &writing)?;
    writing.finish_and_clear();
    let mut pruned = kept.config(&full);
    // Set explicitly, since head_dim no longer follows from hidden_size.
    pruned.raw.insert("head_dim".into(), full.head_dim.into());
    folder::write_json(&config.out.join("config.json"), &pruned.to_json())?;
    folder::write_provenance(
        &config.out,
        &Provenance {
            version: 1,
            full_model: Some(folder::full_model(&config.model, &weights)?),
            kept_layers: Some(kept.layers.clone()),
            hidden_channels: Some(kept.hidden.clone()),
            intermediate_channels: Some(kept.intermediate.clone()),
            training: None,
        },
    )?;
    Ok(kept)
}

/// Loads a full model for calibration, in its stored type, and its configuration.
pub(crate) fn calibration_model(folder: &Path, device: DeviceSpec) -> Result<(Decoder, ModelConfig)> {
    let (full, weights, device) = (ModelConfig::from_folder(folder)?, Weights::open(folder)?, device.open()?);
    // A CPU computes in f32 and widens one matrix at a time. A GPU computes in the stored type.
    let stored = weights.info("model.norm.weight").map(|i| i.dtype);
    let stored = if stored == Some(safetensors::Dtype::BF16) { WeightDtype::Bf16.dtype() } else { DType::F32 };
    let compute = if device.is_cpu() { DType::F32 } else { stored };
    let model = Decoder::build(&full, Ops::Fused, compute, &mut |name, shape| weights.load(name, shape, &device))?;
    Ok((model, full))
}

fn calibrate(config: &PruneConfig, full: &ModelConfig) -> Result<Importance> {
    let text = load_text(&config.model)?;
    let (model, _) = calibration_model(&config.model, config.device)?;
    let bar = bar(config.progress, config.samples as u64, "calibrating")?;
    let mut importance = Importance::new(config.norm, full.hidden_size, full.intermediate_size, full.num_hidden_layers);
    let mut some: Vec<Vec<u32>> = Vec::new();
    let mut observe = |some: &mut Vec<Vec<u32>>| {
        let samples: Vec<&[u32]> = some.iter().map(Vec::as_slice).collect();
        if !samples.is_empty() {
            importance.observe(&model, &samples)?;
        }
        bar.inc(samples.len() as u64);
        some.clear();
        Ok(())
    };
    samples::stream(&config.calibration, &text, config.samples, config.sample_tokens, |tokens| {
        some.push(tokens.to_vec());
        if some.iter().map(Vec::len).sum::<usize>() >= BATCH_TOKENS { observe(&mut some) } else { Ok(()) }
    })?;
    observe(&mut some)?;
    bar.finish_and_clear();
    Ok(importance)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_are_those_of_the_reference() {
        let of = |width, ratio| Width::Ratio(ratio).keep("hidden", width, 1).unwrap();
        assert_eq!((of(3072, 0.45), of(8192, 0.45)), (1689, 4505));
        assert_eq!((of(4096, 0.43), of(14336, 0.43)), (2334, 8171));
        assert_eq!(Width::Ratio(0.45).keep("hidden", 3072, 64).unwrap(), 1664);
        assert!(Width::Channels(97).keep("hidden", 96, 1).is_err());
        assert!(Width::Channels(3).keep("hidden", 96, 4).is_err());
        assert!(Width::Ratio(1.0).keep("hidden", 96, 1).is_err());
    }
}
