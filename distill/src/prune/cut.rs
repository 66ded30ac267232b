//! Writing the channels that are kept, one tensor at a time.

use std::{
    borrow::Cow,
    path::Path,
    sync::{Arc, Mutex},
};

use anyhow::{Context, Result, anyhow};
use candle_core::{Device, Tensor};
use indicatif::ProgressBar;
use overfill_model::{ModelConfig, Weights};
use safetensors::{Dtype, View};

use crate::folder::publish;

/// What is kept of a full model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Layers, ascending.
    pub layers: Vec<u32>,
    /// Hidden channels, ascending: one list for the whole model.
    pub hidden: Arc<Vec<u32>>,
    /// Intermediate channels of each kept layer, ascending.
    pub intermediate: Vec<Arc<Vec<u32>>>,
}

impl Kept {
    /// Geometry of the pruned model.
    pub fn config(&self, full: &ModelConfig) -> ModelConfig {
        ModelConfig {
            hidden_size: self.hidden.len(),
            intermediate_size: self.intermediate[0].len(),
            num_hidden_layers: self.layers.len(),
            ..full.clone()
        }
    }

    /// Channels to keep of a tensor's rows and columns; `None` keeps all. `layer` is the pruned model's.
    fn axes(&self, name: &str) -> [Option<Arc<Vec<u32>>>; 2] {
        let hidden = || Some(self.hidden.clone());
        let inner = || {
            let layer =
                name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
            layer.map(|layer| self.intermediate[layer].clone())
        };
        // Names end in `module.weight` or `module.bias`; a bias has rows only.
        match name.rsplit('.').nth(1).unwrap_or_default() {
            "embed_tokens" | "lm_head" => [None, hidden()],
            "input_layernorm" | "post_attention_layernorm" | "norm" => [hidden(), None],
            "q_proj" | "k_proj" | "v_proj" => [None, hidden()],
            "o_proj" => [hidden(), None],
            "gate_proj" | "up_proj" => [inner(), hidden()],
            "down_proj" => [hidden(), inner()],
            _ => [None, None],
        }
    }

    /// Name in the full model of a tensor of the pruned one.
    fn source(&self, name: &str) -> String {
        let Some((layer, rest)) = name.strip_prefix("model.layers.").and_then(|n| n.split_once('.')) else {
            return name.into();
        };
        match layer.parse::<usize>().ok().and_then(|l| self.layers.get(l)) {
            Some(layer) => format!("model.layers.{layer}.{rest}"),
            None => name.into(),
        }
    }
}

/// One tensor of the pruned model. Its data is read from the full model's file when it is written, and not before.
struct Cut<'a> {
    weights: &'a Weights,
    source: String,
    source_shape: Vec<usize>,
    shape: Vec<usize>,
    dtype: Dtype,
    axes: [Option<Arc<Vec<u32>>>; 2],
    bar: &'a ProgressBar,
    /// The writer's interface has no way to fail.
    fault: &'a Mutex<Option<anyhow::Error>>,
}

impl Cut<'_> {
    fn tensor(&self) -> Result<Tensor> {
        let mut tensor = self.weights.load(&self.source, &self.source_shape, &Device::Cpu)?;
        for (axis, kept) in self.axes.iter().enumerate().take(self.source_shape.len()) {
            if let Some(kept) = kept {
                let index = Tensor::from_slice(kept, kept.len(), &Device::Cpu)?;
                tensor = tensor.contiguous()?.index_select(&index, axis)?;
            }
        }
        Ok(tensor.contiguous()?)
    }
}

impl View for Cut<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.bar.inc(1);
        match self.tensor() {
            Ok(tensor) => Cow::Owned(tensor.data().into_owned()),
            Err(e) => {
                if let Ok(mut fault) = self.fault.lock() {
                    fault.get_or_insert(e);
                }
                Cow::Owned(vec![0; self.data_len()])
            }
        }
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Writes `model.safetensors` of the pruned model into `out`, in the stored types.
pub fn write(weights: &Weights, full: &ModelConfig, kept: &Kept, out: &Path, bar: &ProgressBar) -> Result<()> {
    let pruned = kept.config(full);
    let source_shapes: std::collections::HashMap<_, _> = full.tensor_shapes().into_iter().collect();
    let fault = Mutex::new(None);
    let mut cuts = Vec::new();
    for (name, shape) in pruned.tensor_shapes() {
        let source = kept.source(&name);
        let info = weights.info(&source).ok_or_else(|| anyhow!("tensor {source} is missing"))?;
        let source_shape = source_shapes.get(&source).cloned().unwrap_or_else(|| info.shape.clone());
        let axes = kept.axes(&name);
        cuts.push((name, Cut { weights, source, source_shape, shape, dtype: info.dtype, axes, bar, fault: &fault }));
    }
    bar.set_length(cuts.len() as u64);
    let path = out.join("model.safetensors");
    let part = path.with_extension("part");
    let context = || format!("writing {}", path.display());
    let metadata = std::collections::HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize_to_file(cuts, Some(metadata), &part).with_context(context)?;
    if let Some(fault) = fault.into_inner().ok().flatten() {
        return Err(fault).with_context(context);
    }
    publish(&part, &path)
}
