//! What one machine can do with a pair of models: the measurements that a plan is made from.
//!
//! `overfill bench profile` writes a profile. It may also be written by hand, for example from published figures. Then
//! `machine` should say so.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use overfill_kv::BLOCK_TOKENS;
use serde::{Deserialize, Serialize};

use super::curve::{Point, StepCurve};

/// Version of the file format.
pub const FORMAT: u32 = 1;
/// Longest time in a profile, in seconds.
const MOST_SECONDS: f64 = 3600.0;
/// Largest number of tokens in a profile.
const MOST_TOKENS: usize = 1 << 30;

/// The measurements of one machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Version of the file format: 1.
    pub format: u32,
    /// The machine, and where the figures come from.
    pub machine: String,
    /// Program that measured.
    #[serde(default)]
    pub software: String,
    /// Device of the models: `cpu` or `cuda:N`.
    #[serde(default)]
    pub device: String,
    /// Format of the weights in memory.
    #[serde(default)]
    pub weights: String,
    /// Type of the KV cache.
    #[serde(default)]
    pub kv_dtype: String,
    /// Capacity of the KV cache of one node, in tokens.
    pub kv_pool_tokens: usize,
    /// Size of the KV of one token, in bytes.
    pub kv_bytes_per_token: f64,
    /// Speed of a handoff from one prefill node, in bytes per second.
    pub transfer_bytes_per_second: f64,
    /// The full model.
    pub full: ModelProfile,
    /// The pruned model. Without it, decode nodes run the full model.
    pub pruned: Option<ModelProfile>,
    /// What serving adds to the engines' steps.
    #[serde(default)]
    pub overhead: Overhead,
    /// Equally likely factors on the duration of a prefill step, sorted. Empty: all steps of a size take equally long.
    #[serde(default)]
    pub prefill_spread: Vec<f64>,
    /// The same for decode steps, with what happens on the way to the client.
    #[serde(default)]
    pub decode_spread: Vec<f64>,
}

/// One model on the machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelProfile {
    /// Name of the model.
    pub name: String,
    /// Time from the start of a node until it can serve, in seconds.
    pub start_seconds: f64,
    /// Steps of a prefill node: prompt tokens computed, tokens before them in the prompt, seconds.
    pub prefill: Vec<Point>,
    /// Steps of a decode node: sequences, tokens of each sequence, seconds.
    pub decode: Vec<Point>,
}

/// What serving adds to the engines' steps.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Overhead {
    /// Added to the time to the first token: client, router, reservation, and the calls between services. Equally likely
    /// values in seconds; empty: nothing.
    #[serde(default)]
    pub request_seconds: Vec<f64>,
    /// Added between the first token and the second one, beside the transfer of the bytes. Equally likely values.
    #[serde(default)]
    pub handoff_seconds: Vec<f64>,
    /// Added to a decode step, by the number of its sequences (`rows`).
    #[serde(default)]
    pub steps: Vec<Point>,
}

impl Profile {
    /// Reads and checks a profile.
    ///
    /// # Errors
    /// The file can't be read, or a field is missing, unknown or out of range.
    pub fn read(file: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(file).with_context(|| format!("reading the profile {}", file.display()))?;
        let profile: Self = serde_json::from_str(&text)
            .with_context(|| format!("{}: a profile of format {FORMAT} is needed", file.display()))?;
        profile.check().with_context(|| format!("the profile {}", file.display()))?;
        Ok(profile)
    }

    /// Checks all fields.
    ///
    /// # Errors
    /// The first field that is out of range.
    pub fn check(&self) -> Result<()> {
        ensure!(self.format == FORMAT, "format must be {FORMAT}, got {}", self.format);
        let tokens = self.kv_pool_tokens;
        ensure!(
            (BLOCK_TOKENS..=MOST_TOKENS).contains(&tokens),
            "kv_pool_tokens must be in [{BLOCK_TOKENS}, {MOST_TOKENS}], got {tokens}"
        );
        for (field, value) in [
            ("kv_bytes_per_token", self.kv_bytes_per_token),
            ("transfer_bytes_per_second", self.transfer_bytes_per_second),
        ] {
            ensure!(value > 0.0 && value.is_finite(), "{field} must be above 0, got {value}");
        }
        let Overhead { request_seconds, handoff_seconds, steps } = &self.overhead;
        for (name, list) in [("request_seconds", request_seconds), ("handoff_seconds", handoff_seconds)] {
            for (i, seconds) in list.iter().enumerate() {
                time(&format!("overhead.{name}[{i}]"), *seconds, true)?;
            }
        }
        for (i, step) in steps.iter().enumerate() {
            time(&format!("overhead.steps[{i}].seconds"), step.seconds, true)?;
            ensure!(step.rows >= 1, "overhead.steps[{i}].rows must be at least 1, got {}", step.rows);
        }
        for (name, list) in [("prefill_spread", &self.prefill_spread), ("decode_spread", &self.decode_spread)] {
            for (i, value) in list.iter().enumerate() {
                ensure!((1e-6..=1e6).contains(value), "{name}[{i}] must be in [0.000001, 1000000], got {value}");
            }
        }
        for (name, model) in [("full", Some(&self.full)), ("pruned", self.pruned.as_ref())] {
            let Some(model) = model else { continue };
            time(&format!("{name}.start_seconds"), model.start_seconds, true)?;
            points(&format!("{name}.prefill"), &model.prefill)?;
            points(&format!("{name}.decode"), &model.decode)?;
        }
        Ok(())
    }

    /// The model of decode nodes.
    pub fn decoder(&self) -> &ModelProfile {
        self.pruned.as_ref().unwrap_or(&self.full)
    }

    /// Capacity of the KV cache of one node, in blocks.
    pub fn kv_blocks(&self) -> usize {
        self.kv_pool_tokens / BLOCK_TOKENS
    }
}

fn time(field: &str, seconds: f64, may_be_zero: bool) -> Result<()> {
    let ok = (0.0..=MOST_SECONDS).contains(&seconds) && (may_be_zero || seconds > 0.0);
    let range = if may_be_zero { "[0" } else { "(0" };
    ensure!(ok, "{field} must be in {range}, {MOST_SECONDS}], got {seconds}");
    Ok(())
}

fn points(field: &str, points: &[Point]) -> Result<()> {
    if points.is_empty() {
        bail!("{field} must list at least one step");
    }
    for (i, Point { rows, context_tokens, seconds }) in points.iter().enumerate() {
        ensure!((1..=MOST_TOKENS).contains(rows), "{field}[{i}].rows must be in [1, {MOST_TOKENS}], got {rows}");
        ensure!(
            *context_tokens <= MOST_TOKENS,
            "{field}[{i}].context_tokens must be at most {MOST_TOKENS}, got {context_tokens}"
        );
        time(&format!("{field}[{i}].seconds"), *seconds, false)?;
    }
    Ok(())
}

impl ModelProfile {
    /// Curves of prefill and decode steps. A checked profile has points for both.
    pub fn curves(&self) -> Option<(StepCurve, StepCurve)> {
        Some((StepCurve::fit(&self.prefill)?, StepCurve::fit(&self.decode)?))
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A machine whose steps take round figures: prefill 1 ms + 0.1 ms per token; decode 10 ms + 1 ms per sequence for
    /// the full model and half of both for the pruned one.
    pub fn round() -> Profile {
        let model = |name: &str, factor: f64| ModelProfile {
            name: name.into(),
            start_seconds: 30.0 * factor,
            prefill: [1, 64, 512]
                .map(|rows| Point { rows, context_tokens: 0, seconds: factor * (1e-3 + 1e-4 * rows as f64) })
                .into(),
            decode: [1, 8, 32]
                .map(|rows| Point { rows, context_tokens: 0, seconds: factor * (1e-2 + 1e-3 * rows as f64) })
                .into(),
        };
        Profile {
            format: FORMAT,
            machine: "none".into(),
            software: String::new(),
            device: "cpu".into(),
            weights: "bf16".into(),
            kv_dtype: "bf16".into(),
            kv_pool_tokens: 65_536,
            kv_bytes_per_token: 1000.0,
            transfer_bytes_per_second: 1e9,
            full: model("full", 1.0),
            pruned: Some(model("pruned", 0.5)),
            overhead: Overhead::default(),
            prefill_spread: Vec::new(),
            decode_spread: Vec::new(),
        }
    }

    fn fault(change: impl FnOnce(&mut Profile)) -> String {
        let mut profile = round();
        change(&mut profile);
        format!("{:#}", profile.check().unwrap_err())
    }

    #[test]
    fn faults_name_field_limit_and_value() {
        assert_eq!(fault(|p| p.format = 2), "format must be 1, got 2");
        assert_eq!(fault(|p| p.kv_pool_tokens = 3), "kv_pool_tokens must be in [16, 1073741824], got 3");
        assert_eq!(fault(|p| p.kv_bytes_per_token = 0.0), "kv_bytes_per_token must be above 0, got 0");
        let slow = fault(|p| p.full.decode[1].seconds = -1.0);
        assert_eq!(slow, "full.decode[1].seconds must be in (0, 3600], got -1");
        assert_eq!(fault(|p| p.full.prefill.clear()), "full.prefill must list at least one step");
        assert_eq!(fault(|p| p.decode_spread = vec![0.0]), "decode_spread[0] must be in [0.000001, 1000000], got 0");
        let late = fault(|p| p.overhead.request_seconds = vec![0.0, f64::NAN]);
        assert!(late.starts_with("overhead.request_seconds[1] must be in [0, 3600]"), "{late}");
        let step = Point { rows: 0, context_tokens: 0, seconds: 0.0 };
        assert_eq!(fault(|p| p.overhead.steps = vec![step]), "overhead.steps[0].rows must be at least 1, got 0");
    }

    #[test]
    fn a_profile_survives_a_round_trip_and_unknown_fields_do_not() {
        let text = serde_json::to_string_pretty(&round()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("p.json");
        std::fs::write(&file, &text).unwrap();
        assert_eq!(Profile::read(&file).unwrap(), round());
        std::fs::write(&file, text.replace("\"machine\"", "\"maschine\"")).unwrap();
        let error = format!("{:#}", Profile::read(&file).unwrap_err());
        assert!(error.contains("p.json") && error.contains("maschine"), "{error}");
    }
}
