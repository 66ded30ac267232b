//! The computation of one step: by the model's engine, or simulated in tests.

use std::{ops::Range, sync::Arc};

use overfill_kv::{BlockLease, BlockPool, OutputToken};
use overfill_model::{
    Choice, Engine as ModelEngine, LayerSink, ModelError, Outputs, SamplingContext, SequenceSlice, Want,
};
use overfill_node::Constraint;

use crate::{
    job::{ChunkLayers, Running},
    score::{ScoreChunk, Scored},
};

/// The part of a prompt that a step computes.
pub struct PromptChunk<'a> {
    /// The prompt and its blocks.
    pub job: &'a Running,
    /// Token positions in the prompt.
    pub tokens: Range<usize>,
}

impl PromptChunk<'_> {
    /// Whether the first token of the output follows this chunk.
    pub fn is_last(&self) -> bool {
        self.job.extending.is_none() && self.tokens.end == self.job.request.tokens.len()
    }

    /// Number of tokens to choose: after each of the last tokens of the chunk.
    pub fn choices(&self) -> usize {
        let wanting = self.job.extending.as_ref().filter(|extending| extending.choose);
        wanting
            .map_or(0, |extending| (self.tokens.end + 1).saturating_sub(extending.standing_end).min(self.tokens.len()))
    }
}

/// Result of computing a chunk.
#[derive(Debug, Default)]
pub struct ChunkOutput {
    /// Log-probabilities of the prompt tokens one position after each chunk token, if the request wants them.
    pub logprobs: Vec<OutputToken>,
    /// First token of the output, if this was the last chunk of the prompt.
    pub first_token: Option<OutputToken>,
    /// Tokens chosen after each of the last tokens of the chunk, if this is part of an extension that wants them. There are
    /// [`PromptChunk::choices`].
    pub choices: Vec<OutputToken>,
}

/// The computation of prompts: by the model's engine, or simulated in tests.
pub trait Compute {
    /// Computes `chunks` in one batch and returns one output per chunk. Announces each computed layer to `layers`,
    /// possibly after it has returned.
    ///
    /// # Errors
    /// The computation failed. Then all chunks of the batch have failed.
    fn step(&mut self, chunks: &[PromptChunk<'_>], layers: Arc<dyn LayerSink>) -> Result<Vec<ChunkOutput>, ModelError>;

    /// Computes a part of a score, whose blocks `lease` holds: returns a choice and a log-probability for each position in
    /// [`ScoreChunk::scored`].
    ///
    /// # Errors
    /// The computation failed.
    fn score(&mut self, chunk: &ScoreChunk<'_>, lease: &Arc<BlockLease>) -> Result<Scored, ModelError>;
}

/// The computation by the model's engine.
pub(crate) struct ModelCompute {
    engine: Box<dyn ModelEngine>,
    outputs: Outputs,
}

impl ModelCompute {
    pub(crate) fn new(engine: Box<dyn ModelEngine>) -> Self {
        Self { engine, outputs: Outputs::default() }
    }
}

impl Compute for ModelCompute {
    fn step(&mut self, chunks: &[PromptChunk<'_>], layers: Arc<dyn LayerSink>) -> Result<Vec<ChunkOutput>, ModelError> {
        let slices: Vec<_> = chunks.iter().map(slice).collect();
        self.engine.run(&slices, &layers, &mut self.outputs)?;
        let outputs = chunks.iter().enumerate().map(|(i, chunk)| {
            let first_token = chunk.is_last().then(|| self.outputs.take_next(i)).transpose()?;
            let (logprobs, choices) = (self.outputs.take_scores(i), self.outputs.take_each(i));
            Ok(ChunkOutput { logprobs, first_token, choices })
        });
        outputs.collect()
    }

    fn score(&mut self, chunk: &ScoreChunk<'_>, lease: &Arc<BlockLease>) -> Result<Scored, ModelError> {
        let ScoreChunk { request, blocks, tokens } = chunk;
        let slice =
            SequenceSlice { tokens: &request.tokens[tokens.clone()], start: tokens.start, blocks, want: chunk.want() };
        // Nobody waits for the layers, but the device may still write them when the step has returned (KV-1).
        let lease = lease.clone();
        let layers: Arc<dyn LayerSink> = Arc::new(move |_| _ = &lease);
        self.engine.run(&[slice], &layers, &mut self.outputs)?;
        Ok(Scored { choices: self.outputs.take_each(0), logprobs: self.outputs.take_scores(0) })
    }
}

fn slice<'a>(chunk: &'a PromptChunk<'_>) -> SequenceSlice<'a> {
    let (request, tokens) = (&chunk.job.request, &chunk.tokens);
    if let Some(extending) = &chunk.job.extending {
        let (count, output) = (chunk.choices(), tokens.end - request.prompt().len());
        let begin = (tokens.end + 1).saturating_sub(extending.standing_end + count);
        let want = Want::Each {
            params: &request.sampling,
            prompt: request.prompt(),
            output: &request.output()[..output],
            count,
            allowed: extending.allowed.get(begin..begin + count).unwrap_or_default(),
            following: &[],
        };
        let want = if count > 0 { want } else { Want::Nothing };
        let tokens_of = &request.tokens[tokens.clone()];
        return SequenceSlice { tokens: tokens_of, start: tokens.start, blocks: &chunk.job.blocks, want };
    }
    let context = SamplingContext {
        allowed: request.constraint.as_ref().map(Constraint::mask),
        ..SamplingContext::following(request.prompt(), request.output())
    };
    let next = Choice { params: &request.sampling, context };
    let next = chunk.is_last().then_some(next);
    let want = match (request.prompt_logprobs, next) {
        (true, next) => Want::Scores {
            following: &request.tokens[tokens.start + 1..request.tokens.len().min(tokens.end + 1)],
            top: request.sampling.logprobs.unwrap_or(0),
            next,
        },
        (false, Some(next)) => Want::Next(next),
        (false, None) => Want::Nothing,
    };
    SequenceSlice { tokens: &request.tokens[tokens.clone()], start: tokens.start, blocks: &chunk.job.blocks, want }
}

/// The [`LayerSink`] of one step: forwards each computed layer to all chunks of the step.
pub(crate) struct StepLayers {
    pub chunks: Vec<ChunkLayers>,
    pub pool: BlockPool,
    pub last_layer: usize,
}

impl LayerSink for StepLayers {
    fn layer_ready(&self, layer: usize) {
        for chunk in &self.chunks {
            chunk.ready(layer);
            if layer == self.last_layer {
                chunk.publish(&self.pool);
            }
        }
    }
}
