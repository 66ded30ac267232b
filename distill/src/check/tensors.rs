//! A model's stored weights as candle-transformers asks for them: in f32, by their Hugging Face names.

use std::{collections::HashMap, sync::OnceLock};

use candle_core::{DType, Device, Error, Result, Shape, Tensor};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use overfill_model::{ModelConfig, Weights};

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Reads each tensor when it is asked for, so that one copy is in memory: what stands in a file is mapped.
struct Stored {
    weights: Weights,
    shapes: HashMap<String, Vec<usize>>,
    tied: bool,
    /// What norms are multiplied by, so that channels of zeros beside the real ones change nothing.
    norm_scale: f64,
    /// Kept where the head is the same tensor.
    embedding: OnceLock<Tensor>,
}

/// The weights of a model of `config`. Where candle-transformers asks for a wider residual stream, `hidden_size`, the
/// channels beyond the model's own are zeros.
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
        let shape = self.shapes.get(name).ok_or_else(|| Error::msg(format!("tensor {name} is not the model's")))?;
        self.weights.load(name, shape, &Device::Cpu).map_err(Error::msg)?.to_dtype(DType::F32)
    }
}

impl SimpleBackend for Stored {
    fn get(&self, shape: Shape, name: &str, _: Init, _: DType, _: &Device) -> Result<Tensor> {
        // Some families' code asks for a head of its own even where there is none.
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

    /// By the configuration: a file may hold a head that its configuration ties.
    fn contains_tensor(&self, name: &str) -> bool {
        self.shapes.contains_key(name)
    }
}
