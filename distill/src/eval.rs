//! Scores models on held-out prompts: greedy exact match and cross-entropy.

use std::path::Path;

use anyhow::{Result, bail};
use candle_core::{D, DType, Device};
use overfill_model::{Decoder, Provenance};
use serde::{Deserialize, Serialize};

use crate::{
    attention::RaggedAttention,
    batch::{Flat, prefill, respond},
    data::Example,
    train::{check_pair, load_frozen},
};

/// A configuration to score ("arm"): one model for both stages, or a full model that prefills and a decode model.
pub struct Arm {
    prefill: Decoder,
    /// `None` if the prefilling model also decodes.
    decode: Option<Decoder>,
    kept_layers: Option<Vec<u32>>,
}

/// Scores of one arm.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Fraction of responses that greedy decoding reproduces token for token, end-of-text token included.
    pub exact_match: f64,
    /// Mean cross-entropy in nats per response token. The first token of each response is excluded: prefill predicts
    /// it.
    pub cross_entropy: f64,
    /// Number of prompts.
    pub examples: usize,
}

impl Arm {
    /// Loads one model for both stages.
    pub fn alone(folder: &Path, dtype: DType, device: &Device) -> Result<Self> {
        Ok(Self { prefill: load_frozen(folder, dtype, device)?, decode: None, kept_layers: None })
    }

    /// Loads a pair: `full` prefills, `decode` decodes over its KV.
    pub fn two_stage(full: &Path, decode: &Path, dtype: DType, device: &Device) -> Result<Self> {
        let kept_layers = Provenance::from_folder(decode)?.and_then(|p| p.kept_layers);
        let (prefill, decode) = (load_frozen(full, dtype, device)?, load_frozen(decode, dtype, device)?);
        check_pair(prefill.config(), decode.config(), kept_layers.as_deref())?;
        Ok(Self { prefill, decode: Some(decode), kept_layers })
    }

    fn decoder(&self) -> &Decoder {
        self.decode.as_ref().unwrap_or(&self.prefill)
    }

    /// Decodes `steps[i]` tokens greedily after prompt `i`, all prompts at once. End-of-text tokens don't stop
    /// decoding.
    pub fn generate(&self, prompts: &[&[u32]], steps: &[usize]) -> Result<Vec<Vec<u32>>> {
        let prefilled = prefill(&self.prefill, prompts)?;
        let mut kv = prefilled.kv.select(self.kept_layers.as_deref())?;
        let mut next: Vec<u32> = prefilled.logits.argmax(D::Minus1)?.to_vec1()?;
        let mut outputs: Vec<Vec<u32>> = next.iter().map(|t| vec![*t]).collect();
        let model = self.decoder();
        for _ in 1..steps.iter().copied().max().unwrap_or(0) {
            let sequences: Vec<&[u32]> = next.chunks(1).collect();
            let batch = Flat::new(&sequences, &kv.lengths, model.device())?;
            let mut attention = RaggedAttention::new(&batch.lengths, Some(&kv)).keeping();
            let hidden = model.forward(&batch.tokens, &batch.positions, &mut attention, None)?;
            let more = attention.into_kv();
            kv.extend(&more)?;
            next = model.logits(&hidden)?.argmax(D::Minus1)?.to_vec1()?;
            outputs.iter_mut().zip(&next).for_each(|(output, token)| output.push(*token));
        }
        outputs.iter_mut().zip(steps).for_each(|(output, n)| output.truncate(*n));
        Ok(outputs)
    }

    /// Scores the arm on the last response of every example, `batch` at a time.
    pub fn score(&self, examples: &[Example], batch: usize) -> Result<Score> {
        let mut pairs: Vec<(&[u32], &[u32])> = examples.iter().map(Example::last_response).collect();
        if pairs.iter().any(|(prompt, response)| prompt.is_empty() || response.len() < 2) {
            bail!("every example needs a prompt and a response of two tokens or more");
        }
        pairs.sort_by_key(|(prompt, _)| prompt.len());
        let (mut exact, mut loss, mut tokens) = (0, 0.0, 0);
        for pairs in pairs.chunks(batch.max(1)) {
            let (prompts, responses): (Vec<&[u32]>, Vec<&[u32]>) = pairs.iter().copied().unzip();
            let lengths: Vec<usize> = responses.iter().map(|r| r.len()).collect();
            let outputs = self.generate(&prompts, &lengths)?;
            exact += outputs.iter().zip(&responses).filter(|(output, response)| output == *response).count();
            let kv = prefill(&self.prefill, &prompts)?.kv.select(self.kept_layers.as_deref())?;
            let (sum, count) = respond(self.decoder(), &kv, &responses)?;
            tokens += count;
            loss += f64::from(sum.to_scalar::<f32>()?);
        }
        Ok(Score {
            exact_match: exact as f64 / examples.len() as f64,
            cross_entropy: loss / tokens as f64,
            examples: examples.len(),
        })
    }
}
