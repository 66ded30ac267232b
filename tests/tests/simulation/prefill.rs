//! Engine of a simulated prefill node: the real engine, with a model that only takes time.

use std::{ops::Range, sync::Arc, time::Duration};

use overfill_kv::{BLOCK_TOKENS, BlockId, BlockLease, KvStore as _, OutputToken};
use overfill_model::{LayerSink, ModelError};
use overfill_node::Turn;
use overfill_prefill_node::{
    compute::{ChunkOutput, Compute, PromptChunk},
    engine::Engine,
    score::{ScoreChunk, Scored},
};
use parking_lot::Mutex;
use rand::Rng as _;

use crate::{
    content::{BLOCK_BYTES, Content, FULL, LAYERS, next_token},
    guard::Guard,
    pace::Pace,
};

/// Polling interval of the real engine.
const POLL: Duration = Duration::from_millis(5);

/// Simulated model that computes prompts. Like a GPU, it returns the tokens of a step before all its layers are done.
pub struct Prefiller {
    /// KV memory of the node.
    pub guard: Arc<Guard>,
    /// Layers that are not done yet.
    pub late: LateLayers,
}

/// Layers of the last step that finish after the step returns.
#[derive(Clone, Default)]
pub struct LateLayers(Arc<Mutex<Option<Late>>>);

struct Late {
    from: usize,
    chunks: Vec<Written>,
    layers: Arc<dyn LayerSink>,
}

/// KV that a chunk writes to each layer.
struct Written {
    content: Arc<Content>,
    /// Index of the first block in the prompt.
    first: usize,
    blocks: Vec<BlockId>,
}

impl Compute for Prefiller {
    fn step(&mut self, chunks: &[PromptChunk<'_>], layers: Arc<dyn LayerSink>) -> Result<Vec<ChunkOutput>, ModelError> {
        let written: Vec<Written> = chunks.iter().map(|chunk| self.written(chunk)).collect();
        let early = rand::rng().random_range(0..=LAYERS as usize);
        for layer in 0..early {
            compute(&self.guard, layer, &written, &*layers);
        }
        *self.late.0.lock() = Some(Late { from: early, chunks: written, layers });
        let token = |tokens: &[u32]| OutputToken { token: next_token(tokens), logprob: f32::NAN, top: Vec::new() };
        let output = |chunk: &PromptChunk<'_>| {
            let tokens = &chunk.job.request.tokens;
            let places = chunk.tokens.end + 1 - chunk.choices()..chunk.tokens.end + 1;
            ChunkOutput {
                logprobs: Vec::new(),
                first_token: chunk.is_last().then(|| token(tokens)),
                choices: places.map(|end| token(&tokens[..end])).collect(),
            }
        };
        Ok(chunks.iter().map(output).collect())
    }

    fn score(&mut self, chunk: &ScoreChunk<'_>, _: &Arc<BlockLease>) -> Result<Scored, ModelError> {
        // Its KV stays on the node, so none is written.
        let tokens = &chunk.request.tokens;
        let token = |token| OutputToken { token, logprob: -1.0, top: Vec::new() };
        Ok(Scored {
            choices: chunk.scored().map(|at| token(next_token(&tokens[..at]))).collect(),
            logprobs: chunk.scored().map(|at| token(tokens[at])).collect(),
        })
    }
}

impl Prefiller {
    fn written(&self, chunk: &PromptChunk<'_>) -> Written {
        let content = Arc::new(Content::new(&chunk.job.request.tokens, FULL));
        self.guard.will_send(&chunk.job.blocks, &content);
        // Blocks are written to the end of the last block.
        let touched: Range<usize> = chunk.tokens.start / BLOCK_TOKENS..chunk.tokens.end.div_ceil(BLOCK_TOKENS);
        Written { content, first: touched.start, blocks: chunk.job.blocks[touched].to_vec() }
    }
}

fn compute(guard: &Guard, layer: usize, chunks: &[Written], layers: &dyn LayerSink) {
    for chunk in chunks {
        let write = &mut |i: usize, bytes: &mut [u8]| {
            let block: [u8; BLOCK_BYTES] = chunk.content.block(layer as u32, chunk.first + i);
            bytes.copy_from_slice(&block);
        };
        guard.memory.write(layer, &chunk.blocks, write).expect("a job's blocks are the node's");
    }
    layers.layer_ready(layer);
}

/// Runs the engine until no work is left and no more can arrive.
pub async fn run(mut engine: Engine<Prefiller>, guard: Arc<Guard>, late: LateLayers, pace: Pace) {
    loop {
        let turn = engine.begin();
        if turn == Turn::Computed {
            // So that steps have a duration, and extensions wait for others.
            pace.step().await;
        }
        engine.finish();
        match turn {
            Turn::Computed => {}
            Turn::Idle => tokio::time::sleep(POLL).await,
            Turn::Over => return,
        }
        let step = late.0.lock().take();
        let Some(step) = step else { continue };
        for layer in 0..LAYERS as usize {
            pace.step().await;
            if layer >= step.from {
                compute(&guard, layer, &step.chunks, &*step.layers);
            }
        }
    }
}
