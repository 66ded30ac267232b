//! The engine's side of a check: the serving engine, loaded as nodes load it.

use std::path::Path;

use anyhow::Result;
use overfill_kv::{BlockId, KvDtype, blocks_for};
use overfill_model::{
    DeviceSpec, Engine as ModelEngine, LoadOptions, Model, ModelError, Outputs, Rows, SequenceSlice, Want,
    WeightFormat, no_layers,
};

use super::{continuation::Continuation, distance::Distance};

/// Maximum number of prompt tokens per step: the default of a prefill node.
const CHUNK: usize = 512;

/// A loaded model with KV blocks for one sequence.
pub struct Engine {
    engine: Box<dyn ModelEngine>,
    blocks: Vec<BlockId>,
    outputs: Outputs,
}

/// Distances between the engine and the reference for one prompt.
pub struct Compared {
    /// Distance after the prompt, computed as on prefill nodes.
    pub prefill: Distance,
    /// Distances after the tokens of the continuation, computed one at a time as on decode nodes.
    pub decode: Distance,
}

impl Engine {
    /// Loads a model for sequences of up to `tokens` tokens.
    pub fn load(path: &Path, weights: WeightFormat, kv_dtype: KvDtype, tokens: usize) -> Result<Self, ModelError> {
        let options =
            LoadOptions { device: DeviceSpec::Cpu, weights, kv_dtype, rows: Rows::Many, ..LoadOptions::default() };
        let count = blocks_for(tokens);
        let engine = Model::load(path, &options, count)?.into_engine();
        // Reversed, since the order of a block table must not matter.
        let blocks = (0..count as u32).rev().map(BlockId).collect();
        Ok(Self { engine, blocks, outputs: Outputs::default() })
    }

    /// Computes a prompt and the reference's continuation, and compares the logits.
    pub fn compare(&mut self, prompt: &[u32], expected: &Continuation) -> Result<Compared, ModelError> {
        let mut compared = Compared { prefill: Distance::default(), decode: Distance::default() };
        self.engine.set_rows(Rows::Many);
        for (n, chunk) in prompt.chunks(CHUNK).enumerate() {
            let start = n * CHUNK;
            let last = start + chunk.len() == prompt.len();
            self.forward(chunk, start, if last { Want::LastLogits } else { Want::Nothing })?;
        }
        compared.prefill.add(&expected.logits[0], self.outputs.logits().row(0));
        self.engine.set_rows(Rows::Few);
        for (step, (token, logits)) in expected.tokens.iter().zip(&expected.logits[1..]).enumerate() {
            self.forward(&[*token], prompt.len() + step, Want::LastLogits)?;
            compared.decode.add(logits, self.outputs.logits().row(0));
        }
        Ok(compared)
    }

    fn forward(&mut self, tokens: &[u32], start: usize, want: Want<'_>) -> Result<(), ModelError> {
        let slice = SequenceSlice { tokens, start, blocks: &self.blocks, want };
        self.engine.run(&[slice], &no_layers(), &mut self.outputs)
    }
}
