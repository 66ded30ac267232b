//! Tokens per second of a model alone, without any service.

use std::time::Instant;

use anyhow::{Context, Result};
use overfill_kv::{BlockId, blocks_for};
use overfill_model::{KvCache, Logits, Model, SequenceSlice, Want};

use super::report::{Report, median};

/// Prompt tokens per forward pass, as a prefill node computes them by default.
const CHUNK: usize = 512;
/// Decode batches.
const BATCHES: [usize; 3] = [1, 8, 32];
/// Tokens of each sequence before decoding is measured.
const CONTEXT: usize = 128;
/// Steps of one decode measurement.
const STEPS: usize = 16;

/// Measures one model.
pub fn measure(name: &str, model: &Model, prompt_tokens: usize, runs: usize, report: &mut Report) -> Result<()> {
    let seconds = (0..runs).map(|_| prefill(model, prompt_tokens)).collect::<Result<Vec<_>>>()?;
    let rate = prompt_tokens as f64 / median(seconds);
    report.add(format!("prefill, {name}"), rate, "tok/s", format!("{prompt_tokens} tokens in chunks of {CHUNK}"));
    for batch in BATCHES {
        let seconds = (0..runs).map(|_| decode(model, batch)).collect::<Result<Vec<_>>>()?;
        let rate = (batch * STEPS) as f64 / median(seconds);
        report.add(format!("decode, {name}, batch {batch}"), rate, "tok/s", format!("{CONTEXT} tokens of context"));
    }
    Ok(())
}

fn tokens(model: &Model, count: usize) -> Vec<u32> {
    (0..count).map(|i| (i * 7919 % model.config().vocab_size) as u32).collect()
}

fn blocks(sequence: usize, each: usize) -> Vec<BlockId> {
    (sequence * each..(sequence + 1) * each).map(|block| BlockId(block as u32)).collect()
}

/// Seconds to prefill one prompt.
fn prefill(model: &Model, prompt_tokens: usize) -> Result<f64> {
    let each = blocks_for(prompt_tokens);
    let cache = model.new_cache(each)?;
    let (tokens, blocks) = (tokens(model, prompt_tokens), blocks(0, each));
    let start = Instant::now();
    run_prompt(model, &cache, &tokens, &blocks)?;
    Ok(start.elapsed().as_secs_f64())
}

fn run_prompt(model: &Model, cache: &KvCache, tokens: &[u32], blocks: &[BlockId]) -> Result<()> {
    let mut logits = Logits::default();
    for (i, chunk) in tokens.chunks(CHUNK).enumerate() {
        let start = i * CHUNK;
        let want = if start + chunk.len() == tokens.len() { Want::Last } else { Want::Nothing };
        let slice = SequenceSlice { tokens: chunk, start, blocks, want };
        model.forward(cache, &[slice], &mut |_| {}, &mut logits)?;
    }
    Ok(())
}

/// Seconds for [`STEPS`] tokens of each of `batch` sequences.
fn decode(model: &Model, batch: usize) -> Result<f64> {
    let each = blocks_for(CONTEXT + STEPS);
    let cache = model.new_cache(each * batch)?;
    let prompt = tokens(model, CONTEXT);
    let sequences: Vec<Vec<BlockId>> = (0..batch).map(|sequence| blocks(sequence, each)).collect();
    for blocks in &sequences {
        run_prompt(model, &cache, &prompt, blocks)?;
    }
    let mut logits = Logits::default();
    let mut next = vec![1_u32; batch];
    let start = Instant::now();
    for step in 0..STEPS {
        let slices: Vec<SequenceSlice<'_>> = sequences
            .iter()
            .zip(&next)
            .map(|(blocks, token)| SequenceSlice {
                tokens: std::slice::from_ref(token),
                start: CONTEXT + step,
                blocks,
                want: Want::Last,
            })
            .collect();
        model.forward(&cache, &slices, &mut |_| {}, &mut logits)?;
        let chosen = (0..batch).map(|row| best(logits.row(row)).context("no logits")).collect::<Result<_>>()?;
        next = chosen;
    }
    Ok(start.elapsed().as_secs_f64())
}

fn best(logits: &[f32]) -> Option<u32> {
    logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(token, _)| token as u32)
}
