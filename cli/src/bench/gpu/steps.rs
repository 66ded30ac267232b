//! Decode and prefill steps of one model.

use std::path::Path;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Args;
use overfill_kv::{BLOCK_TOKENS, BlockId, SamplingParams, blocks_for};
use overfill_model::bench::gpu::Gpu;
use overfill_model::{
    Choice, LoadOptions, Model, ModelConfig, Outputs, SamplingContext, SequenceSlice, Want, no_layers,
};

use crate::bench::engine::Sequences;
use crate::bench::report::{Report, median};

/// How much is computed.
#[derive(Args)]
#[command(next_help_heading = "Sizes")]
pub struct Sizes {
    /// Batch sizes, comma-separated.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1,8,32,128",
        value_parser = crate::bench::count,
        value_name = "SEQUENCES"
    )]
    batch: Vec<usize>,
    /// Length of each prompt of the prefill measurement.
    #[arg(long, default_value_t = 512, value_parser = crate::bench::count, value_name = "TOKENS")]
    prefill_tokens: usize,
    /// Most prompt tokens in a step.
    #[arg(long, default_value_t = 4096, value_parser = crate::bench::count, value_name = "TOKENS")]
    step_tokens: usize,
    /// Context length of each sequence when its decoding starts.
    #[arg(long, default_value_t = 512, value_parser = crate::bench::count, value_name = "TOKENS")]
    context_tokens: usize,
    /// Number of tokens that each sequence decodes in a run.
    #[arg(long, default_value_t = 64, value_parser = crate::bench::count, value_name = "TOKENS")]
    decode_tokens: usize,
}

impl Sizes {
    fn most_sequences(&self) -> usize {
        self.batch.iter().copied().max().unwrap_or(1)
    }

    /// Tokens of a sequence at the end of its longest measurement.
    fn sequence_tokens(&self) -> usize {
        self.prefill_tokens.max(self.context_tokens + self.decode_tokens)
    }

    fn check(&self, config: &ModelConfig) -> Result<()> {
        let (longest, limit) = (self.sequence_tokens(), config.max_position_embeddings);
        ensure!(longest <= limit, "sequences must have at most the model's {limit} tokens, got {longest}");
        let (step, prompt) = (self.step_tokens, self.prefill_tokens);
        ensure!(step >= prompt, "--step-tokens must be at least --prefill-tokens ({prompt}), got {step}");
        Ok(())
    }
}

/// Measures one model.
pub fn measure(
    name: &str,
    folder: &Path,
    options: &LoadOptions,
    sizes: &Sizes,
    runs: usize,
    gpu: &Gpu,
    report: &mut Report,
) -> Result<()> {
    sizes.check(&ModelConfig::from_folder(folder)?)?;
    let most = sizes.most_sequences();
    // The context of a decode step is computed in chunks.
    let rows = sizes.step_tokens.max(Sequences::CHUNK);
    let options = LoadOptions { max_rows: rows.max(most), max_sequences: most, ..*options };
    let mut model = Model::load(folder, &options, most * blocks_for(sizes.sequence_tokens()))?;
    decode(name, &mut model, sizes, runs, gpu, report)?;
    prefill(name, &mut model, sizes, runs, gpu, report)
}

/// Measures decode with graphs and without, in turns.
fn decode(name: &str, model: &mut Model, sizes: &Sizes, runs: usize, gpu: &Gpu, report: &mut Report) -> Result<()> {
    let (start, steps) = (sizes.context_tokens, sizes.decode_tokens);
    let mut sequences = Sequences::new(model, sizes.most_sequences(), sizes.sequence_tokens());
    sequences.prefill(model.engine(), start)?;
    for &batch in &sizes.batch {
        let mut seconds = [Vec::new(), Vec::new()];
        for run in 0..=runs {
            for (graphs, seconds) in [true, false].into_iter().zip(&mut seconds) {
                model.engine().set_graphs(graphs);
                let took = sequences.decode(model.engine(), batch, start, steps)?;
                // The first run captures the graph.
                if run > 0 {
                    seconds.push(took);
                }
            }
        }
        model.engine().set_graphs(true);
        let [with, without] = seconds.map(median);
        let rate = |seconds: f64| (batch * steps) as f64 / seconds;
        let note = format!("{start} tokens of context, {steps} more each");
        report.add(format!("decode, {name}, batch {batch}"), rate(with), "tok/s", note);
        let note = format!("graphs make it {:.2} times as fast", without / with);
        report.add(format!("decode without graphs, {name}, batch {batch}"), rate(without), "tok/s", note);
        if let Some(weights) = model.step_weight_bytes() {
            let kv = batch * (start + steps / 2) * model.block_bytes() / BLOCK_TOKENS;
            let read = ((weights + kv) * steps) as f64 / with;
            let note = "bytes of weights and KV read per second, divided by the GPU's memory bandwidth";
            let share = 100.0 * read / gpu.copy_bytes_per_second;
            report.add(format!("share of memory bandwidth, {name}, batch {batch}"), share, "%", note);
        }
    }
    Ok(())
}

/// Measures prefill of several prompts, as many of them in a step as fit.
fn prefill(name: &str, model: &mut Model, sizes: &Sizes, runs: usize, gpu: &Gpu, report: &mut Report) -> Result<()> {
    let (tokens, per_step) = (sizes.prefill_tokens, (sizes.step_tokens / sizes.prefill_tokens).max(1));
    let each = blocks_for(sizes.sequence_tokens()) as u32;
    let prompt: Vec<u32> = (0..tokens).map(|i| (i * 7919 % model.config().vocab_size) as u32).collect();
    let (greedy, layers, mut outputs) = (SamplingParams::greedy(), no_layers(), Outputs::default());
    let next = Want::Next(Choice { params: &greedy, context: SamplingContext::following(&prompt, &[]) });
    for &batch in &sizes.batch {
        let tables: Vec<Vec<BlockId>> =
            (0..batch as u32).map(|i| (i * each..(i + 1) * each).map(BlockId).collect()).collect();
        let slice = |blocks| SequenceSlice { tokens: &prompt, start: 0, blocks, want: next };
        let slices: Vec<SequenceSlice<'_>> = tables.iter().map(|blocks| slice(&blocks[..])).collect();
        let mut seconds = Vec::new();
        for run in 0..=runs {
            let begin = Instant::now();
            for step in slices.chunks(per_step) {
                model.engine().run(step, &layers, &mut outputs)?;
            }
            // The first run chooses the algorithms of the products.
            if run > 0 {
                seconds.push(begin.elapsed().as_secs_f64());
            }
        }
        let seconds = median(seconds);
        let note = format!("prompts of {tokens} tokens, {} in a step", per_step.min(batch));
        let rate = (batch * tokens) as f64 / seconds;
        report.add(format!("prefill, {name}, batch {batch}"), rate, "tok/s", note);
        let share = 100.0 * operations(model.config(), batch, tokens) / seconds / gpu.product_operations_per_second;
        let note = "operations of products and attention per second, divided by those of the GPU's dense products";
        report.add(format!("share of dense products, {name}, batch {batch}"), share, "%", note);
    }
    Ok(())
}

/// Operations of a prefill of `prompts` prompts of `tokens` tokens each, whose last logits are wanted. A multiply-add counts
/// as two.
fn operations(config: &ModelConfig, prompts: usize, tokens: usize) -> f64 {
    let (hidden, inner, layers) = (config.hidden_size, config.intermediate_size, config.num_hidden_layers);
    let queries = config.num_attention_heads * config.head_dim;
    let keys = config.num_key_value_heads * config.head_dim;
    let layer = hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * inner;
    // Each token attends to itself and all earlier tokens.
    let pairs = tokens * (tokens + 1) / 2;
    let prompt = 2 * layers * layer * tokens + 4 * layers * queries * pairs + 2 * hidden * config.vocab_size;
    prompts as f64 * prompt as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::geometry::Geometry;

    #[test]
    fn a_token_takes_about_two_operations_per_parameter() {
        let config = Geometry::Llama3b.model_config().unwrap();
        let per_token = operations(&config, 3, 1024) / (3.0 * 1024.0);
        let parameters = 3_212_749_824.0 - 128_256.0 * 3072.0;
        assert!((per_token / (2.0 * parameters) - 1.0).abs() < 0.1, "{per_token}");
    }
}
