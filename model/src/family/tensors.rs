//! The table of parameters applied to one model: names and shapes of its tensors, and the rows of each parameter.

use std::ops::Range;

use super::{Axis, Family, Kind, Module, Parameter, When};
use crate::ModelConfig;

/// Prefix of the layer number in a name.
const LAYERS: &str = "model.layers.";
const GGUF_LAYERS: &str = "blk.";

/// A tensor that a configuration requires.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    /// Hugging Face name.
    pub name: String,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Entry in the table of parameters.
    pub module: &'static Module,
    /// Weight or bias.
    pub kind: Kind,
    /// Layer; `None` if the tensor belongs to no layer.
    pub layer: Option<usize>,
}

/// The rows of a tensor that hold a parameter.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TensorRows {
    /// The tensor's Hugging Face name.
    pub(crate) name: String,
    /// The whole tensor's dimensions.
    pub(crate) shape: Vec<usize>,
    /// The parameter's rows.
    pub(crate) rows: Range<usize>,
}

impl ModelConfig {
    /// Number of elements along an axis.
    pub fn size_of(&self, axis: Axis) -> usize {
        match axis {
            Axis::Vocabulary => self.vocab_size,
            Axis::Hidden => self.hidden_size,
            Axis::Intermediate => self.intermediate_size,
            Axis::QueryHeads => self.num_attention_heads * self.head_dim,
            Axis::KvHeads => self.num_key_value_heads * self.head_dim,
            Axis::HeadDim => self.head_dim,
        }
    }

    /// All tensors of the model's files, in model order.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let mut out = Vec::new();
        // A layer's entries are adjacent in the table and repeat for every layer.
        for modules in self.family.modules.chunk_by(|a, b| a.in_layer == b.in_layer) {
            let of_layers = modules.first().is_some_and(|module| module.in_layer);
            for layer in 0..if of_layers { self.num_hidden_layers } else { 1 } {
                let tensors = modules.iter().flat_map(|module| [(module, Kind::Weight), (module, Kind::Bias)]);
                let tensors = tensors.filter(|(module, kind)| self.has(module, *kind));
                out.extend(tensors.map(|(module, kind)| self.tensor(module, kind, of_layers.then_some(layer))));
            }
        }
        out
    }

    /// Hugging Face name and shape of every tensor, in the order of [`ModelConfig::tensors`].
    pub fn tensor_shapes(&self) -> Vec<(String, Vec<usize>)> {
        self.tensors().into_iter().map(|tensor| (tensor.name, tensor.shape)).collect()
    }

    /// The weight or bias of a module.
    pub fn tensor(&self, module: &'static Module, kind: Kind, layer: Option<usize>) -> TensorSpec {
        let rows = module.parts.iter().map(|(_, axis)| self.size_of(*axis)).sum();
        let shape = match (kind, module.columns) {
            (Kind::Weight, Some(columns)) => vec![rows, self.size_of(columns)],
            _ => vec![rows],
        };
        let layer = layer.filter(|_| module.in_layer);
        TensorSpec { name: module.tensor_name(kind, layer), shape, module, kind, layer }
    }

    fn has(&self, module: &Module, kind: Kind) -> bool {
        let when = match kind {
            Kind::Weight => module.weight,
            Kind::Bias => module.bias,
        };
        match when {
            When::Always => true,
            When::Never => false,
            When::AttentionBias => self.attention_bias,
            When::MlpBias => self.mlp_bias,
            When::Untied => !self.tie_word_embeddings,
        }
    }

    /// What the output and input channels of a parameter count; `None` if the family has no such parameter. A norm has
    /// the same axis for both.
    pub fn axes_of(&self, parameter: Parameter) -> Option<[Axis; 2]> {
        let (module, _, rows) = self.family.part(parameter)?;
        Some([rows, module.columns.unwrap_or(rows)])
    }

    /// The rows that hold a parameter's weight or bias; `None` if this model has none.
    pub(crate) fn rows_of(&self, parameter: Parameter, kind: Kind, layer: Option<usize>) -> Option<TensorRows> {
        let (module, before, axis) = self.family.part(parameter)?;
        if !self.has(module, kind) {
            return None;
        }
        let first: usize = before.iter().map(|(_, axis)| self.size_of(*axis)).sum();
        let TensorSpec { name, shape, .. } = self.tensor(module, kind, layer);
        Some(TensorRows { name, shape, rows: first..first + self.size_of(axis) })
    }
}

impl Module {
    /// The Hugging Face name of the module's weight or bias.
    fn tensor_name(&self, kind: Kind, layer: Option<usize>) -> String {
        match layer {
            Some(layer) => format!("{LAYERS}{layer}.{}.{}", self.name, kind.name()),
            None => format!("{}.{}", self.name, kind.name()),
        }
    }
}

impl Family {
    /// The Hugging Face name of the tensor that holds a parameter, in the first layer if it is per layer; `None` if the
    /// family has no such parameter.
    pub(crate) fn first_name(&self, parameter: Parameter, kind: Kind) -> Option<String> {
        let (module, ..) = self.part(parameter)?;
        Some(module.tensor_name(kind, module.in_layer.then_some(0)))
    }

    /// The module that holds a parameter, the module's parts before it, and what its rows count.
    #[allow(clippy::type_complexity, reason = "it is taken apart where it is called")]
    fn part(&self, parameter: Parameter) -> Option<(&'static Module, &'static [(Parameter, Axis)], Axis)> {
        self.modules.iter().find_map(|module| {
            let at = module.parts.iter().position(|(part, _)| *part == parameter)?;
            Some((module, &module.parts[..at], module.parts[at].1))
        })
    }

    /// Translates a GGUF tensor name to Hugging Face's; names outside the table stay as they are.
    pub(crate) fn name_of_gguf(&self, name: &str) -> String {
        self.translate(name, GGUF_LAYERS, |module| module.gguf, LAYERS, |module| module.name)
    }

    /// Translates a Hugging Face tensor name to GGUF's; names outside the table stay as they are.
    pub(crate) fn name_in_gguf(&self, name: &str) -> String {
        self.translate(name, LAYERS, |module| module.name, GGUF_LAYERS, |module| module.gguf)
    }

    /// Whether rotation pairs the rows of a GGUF tensor.
    pub(crate) fn is_rotated_in_gguf(&self, name: &str) -> bool {
        let found = self.find(name, GGUF_LAYERS, |module| module.gguf);
        found.is_some_and(|(_, module, _)| module.parts.iter().any(|(parameter, _)| parameter.is_rotated()))
    }

    /// Whether a GGUF tensor has the weights of a norm.
    pub(crate) fn is_norm_in_gguf(&self, name: &str) -> bool {
        let found = self.find(name, GGUF_LAYERS, |module| module.gguf);
        found.is_some_and(|(_, module, kind)| module.columns.is_none() && kind == Kind::Weight.name())
    }

    /// Splits a name into layer number, module, and `weight` or `bias`.
    fn find<'a>(
        &self,
        name: &'a str,
        layers: &str,
        of: fn(&Module) -> &'static str,
    ) -> Option<(Option<&'a str>, &'static Module, &'a str)> {
        let (layer, rest) = match name.strip_prefix(layers) {
            Some(rest) => rest.split_once('.').map(|(layer, rest)| (Some(layer), rest))?,
            None => (None, name),
        };
        let (module, kind) = rest.rsplit_once('.')?;
        let named = |entry: &&Module| entry.in_layer == layer.is_some() && of(entry) == module;
        Some((layer, self.modules.iter().find(named)?, kind))
    }

    fn translate(
        &self,
        name: &str,
        from_layers: &str,
        from: fn(&Module) -> &'static str,
        to_layers: &str,
        to: fn(&Module) -> &'static str,
    ) -> String {
        match self.find(name, from_layers, from) {
            Some((Some(layer), module, kind)) => format!("{to_layers}{layer}.{}.{kind}", to(module)),
            Some((None, module, kind)) => format!("{}.{kind}", to(module)),
            None => name.into(),
        }
    }
}
