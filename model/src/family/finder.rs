//! Finds a decoder's parameters while it loads.

use std::{cell::RefCell, collections::HashSet};

use candle_core::{Result, bail};

use super::{Axis, Kind, Parameter, TensorRows};
use crate::ModelConfig;

/// Locates parameters in a model's tensors. Rejects a family's table if it does not match what decoders compute; such
/// an error is a bug in the table, not in the model.
pub(crate) struct Finder<'a> {
    config: &'a ModelConfig,
    /// Names of the tensors used so far.
    used: RefCell<HashSet<String>>,
}

impl<'a> Finder<'a> {
    pub(crate) fn new(config: &'a ModelConfig) -> Self {
        Self { config, used: RefCell::default() }
    }

    fn find(&self, parameter: Parameter, kind: Kind, layer: Option<usize>) -> Option<TensorRows> {
        let place = self.config.rows_of(parameter, kind, layer)?;
        self.used.borrow_mut().insert(place.name.clone());
        Some(place)
    }

    /// A weight that every model must have.
    pub(crate) fn weight(&self, parameter: Parameter, layer: Option<usize>) -> Result<TensorRows> {
        match self.find(parameter, Kind::Weight, layer) {
            Some(place) => Ok(place),
            None => bail!("{:?} has no {parameter:?}", self.config.family),
        }
    }

    /// A bias; `None` if the model has none.
    pub(crate) fn bias(&self, parameter: Parameter, layer: Option<usize>) -> Option<TensorRows> {
        self.find(parameter, Kind::Bias, layer)
    }

    /// A norm over the residual stream; `None` if the family has none there.
    pub(crate) fn norm(&self, parameter: Parameter, layer: Option<usize>) -> Result<Option<TensorRows>> {
        self.check_axis(parameter, &[Axis::Hidden])?;
        Ok(self.find(parameter, Kind::Weight, layer))
    }

    /// A norm over each head of queries or keys, or over all of them at once; `None` if the model has none.
    pub(crate) fn head_norm(&self, parameter: Parameter, layer: Option<usize>) -> Result<Option<TensorRows>> {
        let whole = if parameter == Parameter::QueryNorm { Axis::QueryHeads } else { Axis::KvHeads };
        self.check_axis(parameter, &[Axis::HeadDim, whole])?;
        Ok(self.find(parameter, Kind::Weight, layer))
    }

    /// What a norm's weights are added to before they multiply.
    pub(crate) fn norm_offset(&self) -> f32 {
        if self.config.family.norms_around_zero { 1.0 } else { 0.0 }
    }

    fn check_axis(&self, parameter: Parameter, supported: &[Axis]) -> Result<()> {
        match self.config.axes_of(parameter) {
            Some([found, _]) if !supported.contains(&found) => {
                bail!("{parameter:?} of {:?} is over {found:?}, supported: {supported:?}", self.config.family)
            }
            _ => Ok(()),
        }
    }

    /// Fails if the model has a tensor that was not used.
    pub(crate) fn all_used(&self) -> Result<()> {
        let used = self.used.borrow();
        match self.config.tensors().iter().find(|tensor| !used.contains(&tensor.name)) {
            Some(tensor) => bail!("{:?} has {}, which the decoder does not use", self.config.family, tensor.name),
            None => Ok(()),
        }
    }
}
