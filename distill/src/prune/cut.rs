//! Writes the kept channels of each tensor, one tensor at a time.

use std::{borrow::Cow, path::Path, sync::Mutex};

use anyhow::{Context, Result, anyhow};
use candle_core::{Device, Tensor};
use indicatif::ProgressBar;
use overfill_model::{Axis, Kind, ModelConfig, TensorSpec, Weights};
use safetensors::{Dtype, View};

use crate::folder::publish;

/// Layers and channels that pruning keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Kept layers, ascending.
    pub layers: Vec<u32>,
    /// Kept hidden channels, ascending. The list applies to the whole model.
    pub hidden: Vec<u32>,
    /// Kept intermediate channels of each kept layer, ascending.
    pub intermediate: Vec<Vec<u32>>,
}

impl Kept {
    /// Returns the configuration of the pruned model.
    pub fn config(&self, full: &ModelConfig) -> ModelConfig {
        full.cut(self.hidden.len(), self.intermediate[0].len(), &self.layers)
    }

    /// Channels to keep along an axis. `None` keeps all. `layer` is an index in the pruned model.
    fn channels(&self, axis: Axis, layer: Option<usize>) -> Option<&[u32]> {
        match axis {
            Axis::Hidden => Some(&self.hidden),
            Axis::Intermediate => layer.map(|layer| self.intermediate[layer].as_slice()),
            Axis::Vocabulary | Axis::QueryHeads | Axis::KvHeads | Axis::HeadDim => None,
        }
    }

    /// Rows of the full model's tensor to keep. `None` keeps all. Parts of a fused tensor keep their order.
    fn rows(&self, full: &ModelConfig, tensor: &TensorSpec) -> Option<Vec<u32>> {
        let parts = tensor.module.parts;
        if parts.iter().all(|(_, axis)| self.channels(*axis, tensor.layer).is_none()) {
            return None;
        }
        let (mut rows, mut first) = (Vec::new(), 0);
        for (_, axis) in parts {
            let end = first + full.size_of(*axis) as u32;
            match self.channels(*axis, tensor.layer) {
                Some(kept) => rows.extend(kept.iter().map(|channel| first + channel)),
                None => rows.extend(first..end),
            }
            first = end;
        }
        Some(rows)
    }

    /// Columns of a tensor to keep. `None` keeps all.
    fn columns(&self, tensor: &TensorSpec) -> Option<&[u32]> {
        let axis = tensor.module.columns.filter(|_| tensor.kind == Kind::Weight)?;
        self.channels(axis, tensor.layer)
    }

    /// Returns the full model's tensor from which a tensor of the pruned model is cut.
    fn source(&self, full: &ModelConfig, tensor: &TensorSpec) -> TensorSpec {
        full.tensor(tensor.module, tensor.kind, tensor.layer.map(|layer| self.layers[layer] as usize))
    }
}

/// One tensor of the pruned model. Its data are read from the full model's file only when they are written.
struct Cut<'a> {
    weights: &'a Weights,
    full: &'a ModelConfig,
    kept: &'a Kept,
    /// Tensor of the pruned model. `source` is the full model's.
    tensor: TensorSpec,
    source: TensorSpec,
    dtype: Dtype,
    bar: &'a ProgressBar,
    /// First read error. It is kept here because `View::data` can't return one.
    fault: &'a Mutex<Option<anyhow::Error>>,
}

impl Cut<'_> {
    fn tensor(&self) -> Result<Tensor> {
        let mut tensor = self.weights.load(&self.source.name, &self.source.shape, &Device::Cpu)?;
        let rows = self.kept.rows(self.full, &self.tensor);
        for (axis, kept) in [rows.as_deref(), self.kept.columns(&self.tensor)].into_iter().enumerate() {
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
        &self.tensor.shape
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
        self.tensor.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Writes `model.safetensors` of the pruned model into `out`. The element types are those of the full model's file.
pub fn write(weights: &Weights, full: &ModelConfig, kept: &Kept, out: &Path, bar: &ProgressBar) -> Result<()> {
    let pruned = kept.config(full);
    let fault = Mutex::new(None);
    let mut cuts = Vec::new();
    for tensor in pruned.tensors() {
        let source = kept.source(full, &tensor);
        let info = weights.info(&source.name).ok_or_else(|| anyhow!("tensor {} is missing", source.name))?;
        let name = tensor.name.clone();
        cuts.push((name, Cut { weights, full, kept, tensor, source, dtype: info.dtype, bar, fault: &fault }));
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

#[cfg(test)]
mod tests {
    use overfill_model::{Module, Parameter, When};
    use serde_json::json;

    use super::*;

    /// Phi-3's gate_up_proj, in every layer.
    static GATE_UP: Module = Module {
        name: "mlp.gate_up_proj",
        gguf: "ffn_up",
        in_layer: true,
        parts: &[(Parameter::Gate, Axis::Intermediate), (Parameter::Up, Axis::Intermediate)],
        columns: Some(Axis::Hidden),
        weight: When::Always,
        bias: When::Always,
    };

    #[test]
    fn every_part_of_a_fused_tensor_is_cut() {
        let full = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 6, "intermediate_size": 10, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2, "vocab_size": 7
        });
        let full = ModelConfig::from_json(Path::new("config.json"), full).unwrap();
        let kept = Kept { layers: vec![0, 2], hidden: vec![1, 2, 5], intermediate: vec![vec![0, 1, 3], vec![2, 8, 9]] };
        let pruned = kept.config(&full);
        let weight = pruned.tensor(&GATE_UP, Kind::Weight, Some(1));
        assert_eq!((weight.name.as_str(), &weight.shape), ("model.layers.1.mlp.gate_up_proj.weight", &vec![6, 3]));
        assert_eq!(kept.rows(&full, &weight), Some(vec![2, 8, 9, 12, 18, 19]));
        assert_eq!(kept.columns(&weight), Some(&[1, 2, 5][..]));
        let source = kept.source(&full, &weight);
        assert_eq!((source.name.as_str(), source.shape), ("model.layers.2.mlp.gate_up_proj.weight", vec![20, 6]));
        let bias = pruned.tensor(&GATE_UP, Kind::Bias, Some(0));
        assert_eq!((kept.rows(&full, &bias), kept.columns(&bias)), (Some(vec![0, 1, 3, 10, 11, 13]), None));
    }
}
