//! The models to measure, and how they are loaded.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use overfill_kv::KvDtype;
use overfill_model::{DeviceSpec, LoadOptions, WeightFormat, resolve};

use super::geometry::Geometry;

/// The models to measure, and how they are loaded.
#[derive(Args)]
#[command(next_help_heading = "Models")]
pub struct ModelArgs {
    /// Shapes of models with random weights, comma-separated, the full model first.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "NAME", default_values = ["small", "small-overfill"])]
    pub geometry: Vec<Geometry>,
    /// Folder in which models with random weights are kept for later runs [default: a temporary folder]
    #[arg(long, value_name = "DIR")]
    pub models_dir: Option<PathBuf>,
    /// Full model, in place of random weights: a folder, a .gguf file or a hub id.
    #[arg(long, conflicts_with = "geometry", value_name = "MODEL")]
    pub full: Option<String>,
    /// Pruned model of the --full model.
    #[arg(long, requires = "full", value_name = "MODEL")]
    pub decode: Option<String>,
    /// Device of the models: cpu or cuda:N.
    #[arg(long, default_value = "cpu")]
    pub device: DeviceSpec,
    /// Weight format in memory: f32, bf16, f16, int8, int8-channel or int4.
    #[arg(long, alias = "dtype", default_value = "bf16", value_name = "FORMAT")]
    pub weights: WeightFormat,
    /// Type of the KV cache: f32, bf16 or f16.
    #[arg(long, default_value = "bf16", value_name = "TYPE")]
    pub kv_dtype: KvDtype,
}

/// Models on disk. Dropping it removes the temporary folder.
pub struct Models {
    /// Name and folder of at least one model, the full model first.
    pub list: Vec<(String, PathBuf)>,
    _temporary: Option<tempfile::TempDir>,
}

impl ModelArgs {
    /// Finds the models, or writes them.
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

    /// Returns the load options of each model.
    pub fn options(&self) -> LoadOptions {
        LoadOptions { device: self.device, weights: self.weights, kv_dtype: self.kv_dtype, ..LoadOptions::default() }
    }
}
