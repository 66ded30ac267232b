//! Gives candle-transformers a model's stored weights: in f32, by their Hugging Face names.

use std::{collections::HashMap, sync::OnceLock};

use candle_core::{DType, Device, Error, Result, Shape, Tensor};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use overfill_model::{ModelConfig, Weights};

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Reads each tensor on demand. Files are memory-mapped, so only one f32 copy is in memory.
struct Stored {
    weights: Weights,
    shapes: HashMap<String, Vec<usize>>,
    tied: bool,
    /// Factor for norm weights that compensates for added zero channels.
    norm_scale: f64,
    /// Kept if the output head is tied to it.
    embedding: OnceLock<Tensor>,
}

/// Returns a source of the model's weights. If `hidden_size` exceeds the model's own, the added channels of the
/// residual stream are zeros.
pub fn var_builder(config: &ModelConfig, weights: Weights, hidden_size: usize) -> VarBuilder<'static> {
    let stored = Stored {
        weights,
        shapes: config.tensor_shapes().into_iter().collect(),
        tied: config.tie_word_embeddings,
        norm_scale: (config.hidden_size as f64 / hidden_size as f64).sqrt(),
        embedding: OnceLock::new(),
    };
    VarBuilder::from_backend(Box::new(stored), DType::F32, Device::Cpu)
}

impl Stored {
    fn load(&self, name: &str) -> Result<Tensor> {
        let shape = self.shapes.get(name).ok_or_else(|| Error::msg(format!("the model has no tensor {name}")))?;
        self.weights.load(name, shape, &Device::Cpu).map_err(Error::msg)?.to_dtype(DType::F32)
    }
}

impl SimpleBackend for Stored {
    fn get(&self, shape: Shape, name: &str, _: Init, _: DType, _: &Device) -> Result<Tensor> {
        // Some implementations load lm_head even if it is tied.
        let name = if self.tied && name == HEAD { EMBEDDING } else { name };
        if name == EMBEDDING
            && let Some(embedding) = self.embedding.get()
        {
            return Ok(embedding.clone());
        }
        let mut tensor = self.load(name)?;
        let widened = tensor.dims() != shape.dims();
        for (dim, wanted) in shape.dims().iter().enumerate().take(tensor.rank()) {
            let zeros = wanted.saturating_sub(tensor.dim(dim)?);
            if zeros > 0 {
                tensor = tensor.pad_with_zeros(dim, 0, zeros)?;
            }
        }
        if widened && name.ends_with("norm.weight") {
            tensor = tensor.affine(self.norm_scale, 0.0)?;
        }
        if tensor.dims() != shape.dims() {
            let stored = tensor.dims();
            return Err(Error::msg(format!(
                "tensor {name} has shape {stored:?}, candle-transformers asks for {shape:?}"
            )));
        }
        if name == EMBEDDING && self.tied {
            let _ = self.embedding.set(tensor.clone());
        }
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        self.load(name)
    }

    /// Follows the configuration, since a file may contain a head that the configuration ties.
    fn contains_tensor(&self, name: &str) -> bool {
        self.shapes.contains_key(name)
    }
}
