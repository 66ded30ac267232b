//! A model without any service: tokens per second, memory, and two stages against one.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;
use overfill_distill::eval::hand_over;
use overfill_kv::{BLOCK_TOKENS, BlockId, SamplingParams, blocks_for};
use overfill_model::{
    Choice, DeviceSpec, Engine, LoadOptions, Model, Outputs, Rows, SamplingContext, SequenceSlice, Want,
    bench::MemoryProbe, no_layers,
};

use super::report::{Report, median};
use crate::text;

/// Prompt tokens per forward pass: the default of a prefill node.
const CHUNK: usize = 512;

/// How much is computed.
#[derive(Args)]
#[command(next_help_heading = "Sizes")]
pub struct Sizes {
    /// Prompt length for the prefill measurement.
    #[arg(long, default_value_t = 512, value_parser = super::count, value_name = "TOKENS")]
    prefill_tokens: usize,
    /// Context length of each sequence when its decoding starts.
    #[arg(long, default_value_t = 128, value_parser = super::count, value_name = "TOKENS")]
    context_tokens: usize,
    /// Number of tokens that each sequence decodes.
    #[arg(long, default_value_t = 64, value_parser = super::count, value_name = "TOKENS")]
    decode_tokens: usize,
    /// Batch sizes of the decode measurement, comma-separated.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1,4,8,16",
        value_parser = super::count,
        value_name = "SEQUENCES"
    )]
    batch: Vec<usize>,
    /// Answer length for the comparison of two stages with one.
    #[arg(long, default_value_t = 256, value_parser = super::count, value_name = "TOKENS")]
    answer_tokens: usize,
}

impl Sizes {
    /// Length of a sequence at the end of the decode measurement.
    fn decode_sequence_tokens(&self) -> usize {
        self.context_tokens + self.decode_tokens
    }

    /// The largest batch.
    fn most_sequences(&self) -> usize {
        self.batch.iter().copied().max().unwrap_or(1)
    }

    /// KV blocks that the largest measurement needs.
    fn kv_blocks(&self) -> usize {
        let decode = self.most_sequences() * blocks_for(self.decode_sequence_tokens());
        decode.max(blocks_for(self.prefill_tokens + self.answer_tokens))
    }
}

/// Measures each model. The first one is the full model of all later ones with KV of the same shape.
pub fn measure(
    models: &[(String, PathBuf)],
    options: &LoadOptions,
    sizes: &Sizes,
    runs: usize,
    report: &mut Report,
) -> Result<()> {
    // The bandwidth of another device is measured by `bench gpu`.
    let memory = (options.device == DeviceSpec::Cpu).then(MemoryProbe::new).transpose()?;
    let mut full: Option<(&str, Model)> = None;
    for (name, folder) in models {
        let before = resident_bytes()?;
        let (max_rows, max_sequences) = (CHUNK.max(sizes.most_sequences()), sizes.most_sequences());
        let options = LoadOptions { rows: Rows::Few, max_rows, max_sequences, ..*options };
        let mut model = Model::load(folder, &options, sizes.kv_blocks())?;
        measure_decode(name, &mut model, sizes, runs, memory.as_ref(), before, report)?;
        model.engine().set_rows(Rows::Many);
        measure_prefill(name, &mut model, sizes, runs, report)?;
        model.engine().set_rows(Rows::Few);
        match &mut full {
            Some((full_name, full)) if same_kv(full, &model) => {
                two_stages([full_name, name], full, &mut model, sizes, runs, report)?;
            }
            Some((full_name, _)) => {
                tracing::info!("the KV shapes of {name} and {full_name} differ, so they are not measured as a pair")
            }
            None => full = Some((name, model)),
        }
    }
    Ok(())
}

fn same_kv(full: &Model, decode: &Model) -> bool {
    let (mut a, mut b) = (full.kv_schema(), decode.kv_schema());
    // The model that computes the KV is not part of its shape.
    (a.full_model, b.full_model) = (None, None);
    a == b
}

/// Measures prefill as a prefill node runs it.
fn measure_prefill(name: &str, model: &mut Model, sizes: &Sizes, runs: usize, report: &mut Report) -> Result<()> {
    let tokens = sizes.prefill_tokens;
    let mut one = Sequences::new(model, 1, tokens);
    let seconds = (0..runs).map(|_| one.prefill(model.engine(), tokens)).collect::<Result<Vec<_>>>()?;
    let rate = tokens as f64 / median(seconds);
    report.add(format!("prefill, {name}"), rate, "tok/s", format!("{tokens} tokens in chunks of {CHUNK}"));
    Ok(())
}

/// Measures decode as a decode node runs it, and resident memory.
fn measure_decode(
    name: &str,
    model: &mut Model,
    sizes: &Sizes,
    runs: usize,
    memory: Option<&MemoryProbe>,
    resident_before: usize,
    report: &mut Report,
) -> Result<()> {
    let most = sizes.most_sequences();
    let start = sizes.context_tokens;
    let each = sizes.decode_sequence_tokens();
    let blocks = most * blocks_for(each);
    let mut sequences = Sequences::new(model, most, each);
    sequences.prefill(model.engine(), start)?;
    for &batch in &sizes.batch {
        // Memory reads are measured before and after each run, since the bandwidth may change.
        let (mut seconds, mut shares) = (Vec::new(), Vec::new());
        let context = start + sizes.decode_tokens / 2;
        let kv_bytes = batch * context * model.block_bytes() / BLOCK_TOKENS;
        for _ in 0..runs {
            let before = memory.map(MemoryProbe::read_bytes_per_second);
            let run = sequences.decode(model.engine(), batch, start, sizes.decode_tokens)?;
            seconds.push(run);
            if let (Some(memory), Some(before), Some(weights)) = (memory, before, model.step_weight_bytes()) {
                let read = (before + memory.read_bytes_per_second()) / 2.0;
                shares.push(100.0 * ((weights + kv_bytes) * sizes.decode_tokens) as f64 / run / read);
            }
        }
        let rate = (batch * sizes.decode_tokens) as f64 / median(seconds);
        let note = format!("{start} tokens of context, {} more each", sizes.decode_tokens);
        report.add(format!("decode, {name}, batch {batch}"), rate, "tok/s", note);
        if !shares.is_empty() {
            let note = "bytes of weights and KV read per second, divided by raw read bandwidth";
            report.add(format!("share of memory bandwidth, {name}, batch {batch}"), median(shares), "%", note);
        }
    }
    if let (Some(_), Some(weights)) = (memory, model.weight_bytes()) {
        let resident = resident_bytes()?.saturating_sub(resident_before);
        let kv = blocks * model.block_bytes();
        let of = |bytes: usize| text::bytes(bytes as u64);
        let note = format!("{} of weights + {} of KV = {}", of(weights), of(kv), of(weights + kv));
        report.add(format!("resident memory, {name}"), resident as f64 / f64::from(1 << 20), "MiB", note);
    }
    Ok(())
}

/// Measures the same prompt and answer length with the full model alone and with both models, alternating.
fn two_stages(
    names: [&str; 2],
    full: &mut Model,
    decode: &mut Model,
    sizes: &Sizes,
    runs: usize,
    report: &mut Report,
) -> Result<()> {
    let (prompt, answer) = (sizes.prefill_tokens, sizes.answer_tokens);
    let mut sequence = Sequences::new(full, 1, prompt + answer);
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..runs {
        for (times, two_stage) in times.iter_mut().zip([false, true]) {
            full.engine().set_rows(Rows::Many);
            // The last logits of the prompt give the first token of the answer.
            let mut seconds = sequence.prefill(full.engine(), prompt)?;
            full.engine().set_rows(Rows::Few);
            if two_stage {
                let begin = Instant::now();
                hand_over(full, decode, &sequence.blocks[0][..blocks_for(prompt)])?;
                seconds += begin.elapsed().as_secs_f64();
            }
            let decoder = if two_stage { &mut *decode } else { &mut *full };
            times.push(seconds + sequence.decode(decoder.engine(), 1, prompt, answer - 1)?);
        }
    }
    let [alone, both] = times.map(median);
    let note = format!("prompt of {prompt} tokens, answer of {answer} tokens");
    report.add(format!("one-stage, {}", names[0]), alone, "s", note);
    let note = format!("{:.2} times as fast as one stage; no handoff between processes", alone / both);
    report.add(format!("two-stage, {} and {}", names[0], names[1]), both, "s", note);
    Ok(())
}

/// Sequences in a KV cache, each in its own blocks.
pub struct Sequences {
    prompt: Vec<u32>,
    blocks: Vec<Vec<BlockId>>,
    next: Vec<u32>,
    greedy: SamplingParams,
    outputs: Outputs,
}

impl Sequences {
    /// Prompt tokens per forward pass.
    pub const CHUNK: usize = CHUNK;

    /// Sequences of up to `tokens_each` tokens.
    pub fn new(model: &Model, count: usize, tokens_each: usize) -> Self {
        let each = blocks_for(tokens_each) as u32;
        Self {
            prompt: (0..tokens_each).map(|i| (i * 7919 % model.config().vocab_size) as u32).collect(),
            blocks: (0..count as u32).map(|i| (i * each..(i + 1) * each).map(BlockId).collect()).collect(),
            next: vec![1; count],
            greedy: SamplingParams::greedy(),
            outputs: Outputs::default(),
        }
    }

    /// Prefills `tokens` tokens of each sequence, one sequence after another. Returns seconds.
    pub fn prefill(&mut self, engine: &mut dyn Engine, tokens: usize) -> Result<f64> {
        let begin = Instant::now();
        let choice = Choice { params: &self.greedy, context: SamplingContext::following(&self.prompt[..tokens], &[]) };
        for (blocks, next) in self.blocks.iter().zip(&mut self.next) {
            for (i, chunk) in self.prompt[..tokens].chunks(CHUNK).enumerate() {
                let start = i * CHUNK;
                let want = if start + chunk.len() == tokens { Want::Next(choice) } else { Want::Nothing };
                let slice = SequenceSlice { tokens: chunk, start, blocks, want };
                engine.run(&[slice], &no_layers(), &mut self.outputs)?;
            }
            *next = self.outputs.take_next(0)?.token;
        }
        Ok(begin.elapsed().as_secs_f64())
    }

    /// Decodes `steps` tokens in each of the first `batch` sequences, which have `start` tokens. Returns seconds.
    pub fn decode(&mut self, engine: &mut dyn Engine, batch: usize, start: usize, steps: usize) -> Result<f64> {
        ensure!(batch <= self.blocks.len(), "a batch of {batch} of {} sequences", self.blocks.len());
        let layers = no_layers();
        let choice = Choice { params: &self.greedy, context: SamplingContext::following(&[], &[]) };
        let begin = Instant::now();
        for step in 0..steps {
            let sequences = self.blocks[..batch].iter().zip(&self.next);
            let slices: Vec<SequenceSlice<'_>> = sequences
                .map(|(blocks, token)| SequenceSlice {
                    tokens: std::slice::from_ref(token),
                    start: start + step,
                    blocks,
                    want: Want::Next(choice),
                })
                .collect();
            engine.run(&slices, &layers, &mut self.outputs)?;
            for (i, next) in self.next[..batch].iter_mut().enumerate() {
                *next = self.outputs.take_next(i)?.token;
            }
        }
        Ok(begin.elapsed().as_secs_f64())
    }
}

/// Resident memory of this process.
fn resident_bytes() -> Result<usize> {
    let file = "/proc/self/status";
    let status = std::fs::read_to_string(file).with_context(|| format!("reading {file}"))?;
    let line =
        status.lines().find_map(|line| line.strip_prefix("VmRSS:")).with_context(|| format!("no VmRSS in {file}"))?;
    let kib: usize =
        line.trim().trim_end_matches(" kB").parse().with_context(|| format!("VmRSS is {line:?} in {file}"))?;
    Ok(kib * 1024)
}
