//! Reads parameters from a model's files, as f32. Engines pack them in their own layouts.

use std::ops::Range;

use crate::{
    ModelConfig, ModelError, Parameter, Weights,
    family::{Finder, TensorRows},
};

/// A parameter in a model's files: `[out, in]`, or `[out]`.
pub(crate) struct Source<'a> {
    place: TensorRows,
    weights: &'a Weights,
}

impl Source<'_> {
    /// Number of outputs, which are rows.
    pub(crate) fn outputs(&self) -> usize {
        self.place.rows.len()
    }

    /// Number of inputs: elements per row.
    pub(crate) fn inputs(&self) -> usize {
        self.place.shape.iter().skip(1).product()
    }

    /// Reads rows into the beginning of `out`. Rows past the end are skipped, so `out` may be larger than the rows
    /// read.
    pub(crate) fn read(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), ModelError> {
        let TensorRows { name, shape, rows: all } = &self.place;
        let row = |row: usize| all.end.min(all.start + row);
        let rows = row(rows.start)..row(rows.end);
        let count = rows.len() * self.inputs();
        self.weights.read_rows(name, shape, rows, &mut out[..count])
    }

    fn values(&self) -> Result<Vec<f32>, ModelError> {
        let mut out = vec![0.0; self.outputs() * self.inputs()];
        self.read(0..self.outputs(), &mut out)?;
        Ok(out)
    }
}

/// Finds and reads a model's parameters.
pub(crate) struct Sources<'a> {
    find: Finder<'a>,
    weights: &'a Weights,
}

impl<'a> Sources<'a> {
    /// The model's tensors must have been checked against `config`.
    pub(crate) fn new(config: &'a ModelConfig, weights: &'a Weights) -> Self {
        Self { find: Finder::new(config), weights }
    }

    fn at(&self, place: TensorRows) -> Source<'a> {
        Source { place, weights: self.weights }
    }

    /// The factors of a norm over the residual stream, `[hidden]`; `None` if the family has none there.
    pub(crate) fn norm(&self, parameter: Parameter, layer: Option<usize>) -> Result<Option<Vec<f32>>, ModelError> {
        self.factors(self.find.norm(parameter, layer)?)
    }

    /// The factors of the norm before the head, `[hidden]`, each multiplied by `logit_scale`.
    pub(crate) fn final_norm(&self, logit_scale: f64) -> Result<Vec<f32>, ModelError> {
        self.find.weight(Parameter::FinalNorm, None)?;
        let mut norm = self.norm(Parameter::FinalNorm, None)?.unwrap_or_default();
        norm.iter_mut().for_each(|factor| *factor *= logit_scale as f32);
        Ok(norm)
    }

    /// The factors of a norm over each head, `[head_dim]`, or over all heads at once, `[heads * head_dim]`; `None` if the
    /// model has none.
    pub(crate) fn head_norm(&self, parameter: Parameter, layer: Option<usize>) -> Result<Option<Vec<f32>>, ModelError> {
        self.factors(self.find.head_norm(parameter, layer)?)
    }

    fn factors(&self, place: Option<TensorRows>) -> Result<Option<Vec<f32>>, ModelError> {
        let Some(place) = place else { return Ok(None) };
        let mut factors = self.at(place).values()?;
        factors.iter_mut().for_each(|factor| *factor += self.find.norm_offset());
        Ok(Some(factors))
    }

    /// Fails if the model has a tensor that was not used.
    pub(crate) fn all_used(&self) -> Result<(), ModelError> {
        Ok(self.find.all_used()?)
    }

    /// The weights of parameters that are computed as one product.
    pub(crate) fn weights_of(
        &self,
        parameters: &[Parameter],
        layer: Option<usize>,
    ) -> Result<Vec<Source<'a>>, ModelError> {
        parameters.iter().map(|parameter| Ok(self.at(self.find.weight(*parameter, layer)?))).collect()
    }

    /// Biases of parameters that are computed as one product. A parameter without a bias gets zeros; `None` if none has
    /// one.
    pub(crate) fn biases(
        &self,
        parameters: &[Parameter],
        sources: &[Source<'_>],
        layer: Option<usize>,
    ) -> Result<Option<Vec<Vec<f32>>>, ModelError> {
        let found: Vec<_> = parameters.iter().map(|parameter| self.find.bias(*parameter, layer)).collect();
        if found.iter().all(Option::is_none) {
            return Ok(None);
        }
        let bias = |(place, source): (Option<TensorRows>, &Source<'_>)| match place {
            Some(place) => self.at(place).values(),
            None => Ok(vec![0.0; source.outputs()]),
        };
        found.into_iter().zip(sources).map(bias).collect::<Result<_, _>>().map(Some)
    }
}
