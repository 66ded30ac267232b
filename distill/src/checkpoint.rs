//! Training checkpoints and the loss log. A resumed run equals an uninterrupted one bit for bit.
//!
//! `out/checkpoint/step-N/` holds `params.safetensors` and `optimizer.safetensors` in f32, and `state.json` with the
//! step and the settings of the run. The settings determine the order of examples, so nothing else is stored.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor};
use serde_json::{Value, json};

use crate::{
    folder::{write_json, write_tensors},
    optim::{AdamW, Params},
};

fn root(out: &Path) -> PathBuf {
    out.join("checkpoint")
}

/// Lists complete checkpoints, oldest first. Incomplete ones are in the folder `part`.
fn list(out: &Path) -> Result<Vec<(usize, PathBuf)>> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(root(out)) else { return Ok(found) };
    for entry in entries {
        let path = entry.with_context(|| format!("reading {}", root(out).display()))?.path();
        let step = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_prefix("step-")?.parse().ok());
        found.extend(step.map(|step| (step, path)));
    }
    found.sort_unstable();
    Ok(found)
}

/// Writes a checkpoint, then removes older ones.
pub fn save(out: &Path, settings: &Value, params: &Params, adam: &AdamW) -> Result<()> {
    let old = list(out)?;
    let part = root(out).join("part");
    let whole = root(out).join(format!("step-{}", adam.step()));
    let context = || format!("writing {}", whole.display());
    fs::create_dir_all(&part).with_context(context)?;
    let tensors = params.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect();
    write_tensors(&part.join("params.safetensors"), &tensors)?;
    write_tensors(&part.join("optimizer.safetensors"), &adam.state())?;
    write_json(&part.join("state.json"), &json!({"step": adam.step(), "settings": settings}))?;
    if whole.exists() {
        fs::remove_dir_all(&whole).with_context(context)?;
    }
    fs::rename(&part, &whole).with_context(context)?;
    for (_, path) in old.iter().filter(|(_, path)| *path != whole) {
        fs::remove_dir_all(path).with_context(|| format!("removing {}", path.display()))?;
    }
    Ok(())
}

/// Loads the newest checkpoint. Fails if there is none, or if its settings differ from `settings`.
pub fn restore(out: &Path, settings: &Value, params: &Params, adam: &mut AdamW, device: &Device) -> Result<()> {
    let Some((step, path)) = list(out)?.pop() else {
        bail!("{}: no checkpoint to resume from", root(out).display());
    };
    let state_file = path.join("state.json");
    let text = fs::read(&state_file).with_context(|| format!("reading {}", state_file.display()))?;
    let state: Value = serde_json::from_slice(&text).with_context(|| format!("reading {}", state_file.display()))?;
    if let Some(asked) = settings.as_object() {
        for (field, value) in asked {
            let was = &state["settings"][field];
            if was != value {
                bail!("{}: {field} was {was}, this run asks for {value}", state_file.display());
            }
        }
    }
    let load = |name: &str| -> Result<HashMap<String, Tensor>> {
        let file = path.join(name);
        candle_core::safetensors::load(&file, device).with_context(|| format!("reading {}", file.display()))
    };
    let tensors = load("params.safetensors")?;
    for (name, var) in params {
        let tensor = tensors.get(name).with_context(|| format!("{}: tensor {name} is missing", path.display()))?;
        var.set(tensor).with_context(|| format!("{}: tensor {name}", path.display()))?;
    }
    adam.restore(load("optimizer.safetensors")?, step, device)?;
    Ok(())
}

/// Log of the training loss: one JSON line per step.
pub struct LossLog(File);

impl LossLog {
    /// Opens the log of a run that has done `step` steps. Later lines, written by an interrupted run, are dropped.
    pub fn open(path: &Path, step: usize) -> Result<Self> {
        let context = || format!("writing {}", path.display());
        let kept: Vec<String> = match File::open(path) {
            Ok(file) => BufReader::new(file).lines().take(step).collect::<Result<_, _>>().with_context(context)?,
            Err(_) => Vec::new(),
        };
        let mut file = File::create(path).with_context(context)?;
        for line in kept {
            writeln!(file, "{line}").with_context(context)?;
        }
        Ok(Self(file))
    }

    /// Appends a line.
    pub fn write(&mut self, line: &Value) -> Result<()> {
        writeln!(self.0, "{line}").context("writing the loss log")
    }
}
