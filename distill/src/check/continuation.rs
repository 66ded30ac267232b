//! A loaded reference, and the logits that it gives for prompts and their continuations.

use anyhow::Result;
use candle_core::{Device, Tensor};
use candle_transformers::models::{gemma2, gemma3, llama, mistral, olmo2, phi3, qwen2, qwen3, smol::smollm3};
use overfill_model::ModelError;

/// Maximum number of tokens per forward pass. The reference allocates scores of CHUNK by context tokens for every head.
const CHUNK: usize = 256;

/// A loaded model with the KV of the tokens it has read. Clones share the weights and the KV so far, and continue
/// independently.
#[derive(Clone)]
pub enum Reference {
    /// Llama and its cache.
    Llama(llama::Llama, llama::Cache),
    /// Mistral.
    Mistral(mistral::Model),
    /// Qwen2.
    Qwen2(qwen2::ModelForCausalLM),
    /// Qwen3.
    Qwen3(qwen3::ModelForCausalLM),
    /// Gemma 2.
    Gemma2(gemma2::Model),
    /// Gemma 3.
    Gemma3(gemma3::Model),
    /// Phi-3.
    Phi3(phi3::Model),
    /// OLMo 2.
    Olmo2(olmo2::Model),
    /// SmolLM3.
    SmolLm3(smollm3::ModelForCausalLM),
}

/// Logits of the reference for a prompt and its greedy continuation.
pub struct Continuation {
    /// Length of the prompt in tokens.
    pub prompt_tokens: usize,
    /// Greedy tokens after the prompt.
    pub tokens: Vec<u32>,
    /// Logits after the prompt, then after each of `tokens`, each `[vocab]`.
    pub logits: Vec<Vec<f32>>,
}

impl Reference {
    /// Computes `decode` greedy steps after each prompt. The prompts are the first `length` tokens for each of
    /// `lengths`, which must be ascending.
    pub fn continuations(mut self, tokens: &[u32], lengths: &[usize], decode: usize) -> Result<Vec<Continuation>> {
        let mut read = 0;
        let mut out = Vec::new();
        for &length in lengths {
            let mut last = Vec::new();
            while read < length {
                let end = length.min(read + CHUNK);
                last = self.forward(&tokens[read..end], read)?;
                read = end;
            }
            let mut fork = self.clone();
            let mut continuation = Continuation { prompt_tokens: length, tokens: Vec::new(), logits: vec![last] };
            for step in 0..decode {
                let token = super::distance::greedy(&continuation.logits[step]);
                continuation.tokens.push(token);
                continuation.logits.push(fork.forward(&[token], length + step)?);
            }
            tracing::info!(prompt_tokens = length, "reference computed a prompt and its continuation");
            out.push(continuation);
        }
        Ok(out)
    }

    /// Reads `tokens` at position `start` and returns the logits of the last one.
    fn forward(&mut self, tokens: &[u32], start: usize) -> Result<Vec<f32>, ModelError> {
        let tokens = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
        let logits = match self {
            Self::Llama(model, cache) => model.forward(&tokens, start, cache),
            Self::Mistral(model) => model.forward(&tokens, start),
            Self::Qwen2(model) => model.forward(&tokens, start),
            Self::Qwen3(model) => model.forward(&tokens, start),
            Self::Gemma2(model) => model.forward(&tokens, start),
            Self::Gemma3(model) => model.forward(&tokens, start),
            Self::Phi3(model) => model.forward(&tokens, start),
            Self::Olmo2(model) => model.forward(&tokens, start),
            Self::SmolLm3(model) => model.forward(&tokens, start),
        };
        Ok(logits?.flatten_all()?.to_vec1()?)
    }
}
