//! Which models are measured, and how they are loaded.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use overfill_kv::KvDtype;
use overfill_model::{DeviceSpec, LoadOptions, WeightFormat, resolve};

use super::geometry::Geometry;

/// Models and how they lie in memory.
#[derive(Args)]
pub struct ModelArgs {
    /// Models of random weights, the full one first.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "NAME", default_values = ["small", "small-overfill"])]
    geometry: Vec<Geometry>,
    /// Where models of random weights are written, and found again; a temporary folder if left out.
    #[arg(long)]
    models_dir: Option<PathBuf>,
    /// Full model instead of one of random weights: a folder or hub id.
    #[arg(long, conflicts_with = "geometry")]
    full: Option<String>,
    /// Pruned model.
    #[arg(long, requires = "full")]
    decode: Option<String>,
    /// Where the models run: cpu or cuda:N.
    #[arg(long, default_value = "cpu")]
    pub device: DeviceSpec,
    /// Weights in memory: f32, bf16, f16, int8, int8-channel or int4.
    #[arg(long, alias = "dtype", default_value = "bf16")]
    pub weights: WeightFormat,
    /// KV cache: f32, bf16 or f16.
    #[arg(long, default_value = "bf16")]
    pub kv_dtype: KvDtype,
}

/// Models that are there. A temporary folder is removed with it.
pub struct Models {
    /// Name and folder; at least one, the full model first.
    pub list: Vec<(String, PathBuf)>,
    _temporary: Option<tempfile::TempDir>,
}

impl ModelArgs {
    /// Finds them, or writes them.
    pub fn prepare(&self) -> Result<Models> {
        let Some(full) = &self.full else {
            let temporary = match &self.models_dir {
                Some(_) => None,
                None => Some(tempfile::tempdir().context("making a folder for random models")?),
            };
            let folder = self.models_dir.as_deref().or(temporary.as_ref().map(|t| t.path()));
            let folder = folder.context("no folder for random models")?;
            let list = self.geometry.iter().map(|g| Ok((g.name(), g.folder(folder)?))).collect::<Result<_>>()?;
            return Ok(Models { list, _temporary: temporary });
        };
        let mut list = vec![("full".to_owned(), resolve(full)?)];
        if let Some(decode) = &self.decode {
            list.push(("pruned".to_owned(), resolve(decode)?));
        }
        Ok(Models { list, _temporary: None })
    }

    /// How each is loaded.
    pub fn options(&self) -> LoadOptions {
        LoadOptions { device: self.device, weights: self.weights, kv_dtype: self.kv_dtype, ..LoadOptions::default() }
    }
}
