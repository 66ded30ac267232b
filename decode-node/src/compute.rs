//! The computation of one decode step: by the models' engines, or simulated in tests.

use std::{ops::Range, sync::Arc};

use overfill_kv::OutputToken;
use overfill_model::{
    Choice, Engine as ModelEngine, LayerSink, ModelError, Outputs, SamplingContext, SequenceSlice, Want, no_layers,
};
use overfill_node::Constraint;

use crate::sequence::Sequence;

/// The computation of tokens: by the models' engines, or simulated in tests.
pub trait Compute {
    /// Computes the KV of tokens of each sequence, and returns the next token of each whose last token it has computed.
    ///
    /// # Errors
    /// The computation failed. Then all sequences of the batch have failed.
    fn step(&mut self, sequences: &[Stepping<'_>]) -> Result<Vec<Option<OutputToken>>, ModelError>;
}

/// A sequence in a step.
pub struct Stepping<'a> {
    /// The sequence.
    pub sequence: &'a Sequence,
    /// Positions of the tokens to compute, at least one. Nearly always, this is the last token alone.
    pub tokens: Range<usize>,
}

impl Stepping<'_> {
    /// Whether the next token of the sequence is to be chosen.
    pub fn is_last(&self) -> bool {
        self.tokens.end == self.sequence.flow.tokens.len()
    }
}

/// The computation by the engines of the node's models, which share their KV.
pub struct ModelCompute {
    /// The engine of the node's model, then those of its variants.
    engines: Vec<Box<dyn ModelEngine>>,
    layers: Arc<dyn LayerSink>,
    outputs: Outputs,
}

impl ModelCompute {
    pub(crate) fn new(engines: Vec<Box<dyn ModelEngine>>) -> Self {
        Self { engines, layers: no_layers(), outputs: Outputs::default() }
    }
}

impl Compute for ModelCompute {
    /// Each model runs over its sequences, one model after the other.
    fn step(&mut self, sequences: &[Stepping<'_>]) -> Result<Vec<Option<OutputToken>>, ModelError> {
        let mut tokens = vec![None; sequences.len()];
        for (variant, engine) in self.engines.iter_mut().enumerate() {
            let of_variant = |(_, stepping): &(usize, &Stepping<'_>)| stepping.sequence.flow.request.variant == variant;
            let own: Vec<(usize, &Stepping<'_>)> = sequences.iter().enumerate().filter(of_variant).collect();
            if own.is_empty() {
                continue;
            }
            let slices: Vec<_> = own.iter().map(|(_, stepping)| slice(stepping)).collect();
            engine.run(&slices, &self.layers, &mut self.outputs)?;
            for (place, (i, _)) in own.iter().enumerate().filter(|(_, (_, stepping))| stepping.is_last()) {
                tokens[*i] = Some(self.outputs.take_next(place)?);
            }
        }
        Ok(tokens)
    }
}

fn slice<'a>(stepping: &Stepping<'a>) -> SequenceSlice<'a> {
    let (Sequence { flow, blocks, .. }, positions) = (stepping.sequence, &stepping.tokens);
    let (prompt, output) = flow.prompt_and_output();
    let allowed = flow.request.constraint.as_ref().map(Constraint::mask);
    let context = SamplingContext { allowed, ..SamplingContext::following(prompt, output) };
    let want = match stepping.is_last() {
        true => Want::Next(Choice { params: &flow.request.sampling, context }),
        false => Want::Nothing,
    };
    SequenceSlice { tokens: &flow.tokens[positions.clone()], start: positions.start, blocks, want }
}
