//! `overfill bench profile`: measures what `overfill plan` needs to know about a machine and a pair of models.
//!
//! Steps are those of the real engine, one at a time. What serving adds to them is measured with a cluster of real
//! processes on this machine, as `overfill up` starts it: the difference between what a client sees and what the engine's
//! steps take.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use futures::future::join_all;
use overfill_kv::{BLOCK_TOKENS, BlockId, SamplingParams, blocks_for};
use overfill_model::{Choice, LoadOptions, Model, Outputs, Rows, SamplingContext, SequenceSlice, Want, no_layers};
use overfill_transport::bench::{HandoffOptions, Shape, handoffs};
use tokio::io::{AsyncBufReadExt as _, BufReader};

use super::models::{ModelArgs, Models};
use super::report::median;
use super::serve::client::{Api, Failure, Prompts};
use super::serve::load::Request;
use crate::plan::curve::Point;
use crate::plan::profile::{FORMAT, ModelProfile, Overhead, Profile};

/// Length of the requests through the router.
const PROMPT: usize = 64;
const ANSWER: usize = 96;
/// Time between requests through the router, and the longest time until it has found its nodes.
const PAUSE: Duration = Duration::from_millis(50);
const FOUND_WITHIN: Duration = Duration::from_secs(20);
/// Size of the handoff whose speed is measured.
const HANDOFF_BYTES: usize = 64 << 20;
/// Factors of the spread of steps.
const FACTORS: usize = 40;
/// Time that the steps of one size are repeated for, and the fewest and most repetitions.
const STEP_TIME: Duration = Duration::from_millis(300);
const STEPS: (usize, usize) = (5, 60);

const AFTER_HELP: &str = "\
A profile is one JSON file. Measure on the machines that will serve, with the models that they will run.

Examples:
  overfill bench profile --full DIR --decode DIR --out profile.json
  overfill bench profile --full demo/full --decode demo/decode --weights f32 --kv-dtype f32 --out demo.json
  overfill bench profile --geometry llama-3.2-3b,llama-3.2-3b-overfill --models-dir ~/random-models --out 3b.json";

/// What to measure, and where the profile goes.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct ProfileArgs {
    #[command(flatten)]
    models: ModelArgs,
    /// Numbers of prompt tokens in a step, comma-separated.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "16,64,128,256,512",
        value_parser = super::count,
        value_name = "TOKENS",
        help_heading = "Sizes"
    )]
    step_tokens: Vec<usize>,
    /// Lengths of the context before a step, comma-separated. Longer ones than the model's are cut.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "128,1024",
        value_parser = super::count,
        value_name = "TOKENS",
        help_heading = "Sizes"
    )]
    context_tokens: Vec<usize>,
    /// Batch sizes of a decode step, comma-separated.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1,2,4,8,16,32",
        value_parser = super::count,
        value_name = "SEQUENCES",
        help_heading = "Sizes"
    )]
    batch: Vec<usize>,
    /// Capacity of the KV cache of a node, in tokens. It is written down, not measured.
    #[arg(long, default_value_t = 65536, value_parser = super::count, value_name = "TOKENS", help_heading = "Sizes")]
    kv_pool_tokens: usize,
    /// Description of the machine [default: its processor and number of cores]
    #[arg(long, value_name = "TEXT", help_heading = "Output")]
    machine: Option<String>,
    /// File to write. Without it, the profile goes to standard output.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    out: Option<PathBuf>,
}

/// Runs the subcommand.
pub fn run(args: &ProfileArgs) -> Result<()> {
    ensure!(args.kv_pool_tokens >= BLOCK_TOKENS, "--kv-pool-tokens must be at least {BLOCK_TOKENS}");
    let models = args.models.prepare()?;
    let mut spread = Vec::new();
    let [full, pruned] = [0, 1].map(|i| models.list.get(i));
    let mut measured = Vec::new();
    let mut kv_bytes_per_token = 0.0;
    for (name, folder) in [full, pruned].into_iter().flatten() {
        let (model, block_bytes) = args.model(name, folder, &mut spread)?;
        measured.push(model);
        kv_bytes_per_token = block_bytes as f64 / BLOCK_TOKENS as f64;
    }
    let mut measured = measured.into_iter();
    let (full, pruned) = (measured.next().context("no model")?, measured.next());
    let runtime = super::runtime()?;
    let (shape, options) = (Shape::of(HANDOFF_BYTES), HandoffOptions::default());
    let handoff = runtime.block_on(handoffs(shape, shape.host_store(), shape.host_store(), &options))?;
    let mut profile = Profile {
        format: FORMAT,
        machine: args.machine.clone().unwrap_or_else(machine),
        software: format!("overfill {}", env!("CARGO_PKG_VERSION")),
        device: args.models.device.to_string(),
        weights: args.models.weights.to_string(),
        kv_dtype: args.models.kv_dtype.to_string(),
        kv_pool_tokens: args.kv_pool_tokens,
        kv_bytes_per_token,
        transfer_bytes_per_second: handoff.handoff.bytes_per_second,
        full,
        pruned,
        overhead: Overhead::default(),
        prefill_spread: factors(spread),
        decode_spread: Vec::new(),
    };
    (profile.overhead, profile.decode_spread) = runtime.block_on(serving(&models, &args.models, &profile))?;
    profile.check()?;
    let text = serde_json::to_string_pretty(&profile)?;
    match &args.out {
        Some(file) => std::fs::write(file, text + "\n").with_context(|| format!("writing {}", file.display())),
        None => {
            println!("{text}");
            Ok(())
        }
    }
}

impl ProfileArgs {
    /// Measures one model. Also returns the bytes of a KV block.
    fn model(&self, name: &str, folder: &Path, spread: &mut Vec<f64>) -> Result<(ModelProfile, usize)> {
        let most_rows = self.step_tokens.iter().copied().max().unwrap_or(1);
        let most_context = self.context_tokens.iter().copied().max().unwrap_or(1);
        let batch = self.batch.iter().copied().max().unwrap_or(1);
        let each = blocks_for(most_context + STEPS.1 + 1);
        let blocks = (batch * each).max(blocks_for(most_rows + most_context));
        let room = self.models.options();
        let options = LoadOptions { rows: Rows::Many, max_rows: most_rows.max(batch), max_sequences: batch, ..room };
        let began = Instant::now();
        let mut model = Model::load(folder, &options, blocks)?;
        let start_seconds = began.elapsed().as_secs_f64();
        let longest = model.config().max_position_embeddings;
        let mut prefill = Vec::new();
        for &rows in &self.step_tokens {
            let contexts = std::iter::once(&0).chain(&self.context_tokens);
            let mut contexts: Vec<usize> = contexts.map(|c| (*c).min(longest.saturating_sub(rows))).collect();
            contexts.dedup();
            for context_tokens in contexts {
                let batch = Batch { sequences: 1, rows, context: context_tokens / BLOCK_TOKENS * BLOCK_TOKENS, each };
                let seconds = batch.measure(&mut model, blocks, spread)?;
                tracing::info!(model = name, rows, context_tokens = batch.context, seconds, "measured a prefill step");
                prefill.push(Point { rows, context_tokens: batch.context, seconds });
            }
        }
        model.engine().set_rows(Rows::Few);
        let mut decode = Vec::new();
        for &sequences in &self.batch {
            let mut contexts: Vec<usize> = self.context_tokens.iter().map(|c| (*c).min(longest - 1)).collect();
            contexts.dedup();
            for context in contexts {
                let batch = Batch { sequences, rows: 1, context, each };
                // The spread of decode steps is measured where clients see it.
                let seconds = batch.measure(&mut model, blocks, &mut Vec::new())?;
                tracing::info!(model = name, sequences, context_tokens = context, seconds, "measured a decode step");
                decode.push(Point { rows: sequences, context_tokens: context, seconds });
            }
        }
        Ok((ModelProfile { name: name.into(), start_seconds, prefill, decode }, model.block_bytes()))
    }
}

/// A step to measure: `rows` tokens of each of `sequences` sequences, after `context` tokens.
#[derive(Clone, Copy)]
struct Batch {
    sequences: usize,
    rows: usize,
    context: usize,
    /// Blocks of a sequence, if there are several.
    each: usize,
}

impl Batch {
    /// Repeats the step. Returns the median in seconds, and adds the steps' durations divided by it to `spread`.
    fn measure(&self, model: &mut Model, blocks: usize, spread: &mut Vec<f64>) -> Result<f64> {
        let vocabulary = model.config().vocab_size;
        let each = if self.sequences == 1 { blocks } else { self.each };
        let owned: Vec<Vec<BlockId>> = (0..self.sequences)
            .map(|i| (i * each..(i + 1) * each).map(|block| BlockId(block as u32)).collect())
            .collect();
        let tokens: Vec<u32> = (0..self.rows).map(|i| (i * 7919 % vocabulary) as u32).collect();
        let (greedy, layers, mut outputs) = (SamplingParams::greedy(), no_layers(), Outputs::default());
        let choice = Choice { params: &greedy, context: SamplingContext::following(&tokens, &[]) };
        let needed = blocks_for(self.context + self.rows);
        let slices: Vec<SequenceSlice<'_>> = owned
            .iter()
            .map(|blocks| SequenceSlice {
                tokens: &tokens,
                start: self.context,
                blocks: &blocks[..needed],
                want: Want::Next(choice),
            })
            .collect();
        let (mut seconds, begin) = (Vec::new(), Instant::now());
        // The first step is not counted: it warms the caches up.
        while seconds.len() <= STEPS.0 || (begin.elapsed() < STEP_TIME && seconds.len() <= STEPS.1) {
            let step = Instant::now();
            model.engine().run(&slices, &layers, &mut outputs)?;
            seconds.push(step.elapsed().as_secs_f64());
        }
        let seconds = seconds.split_off(1);
        let middle = median(seconds.clone());
        spread.extend(seconds.iter().map(|seconds| seconds / middle));
        Ok(middle)
    }
}

/// Equally likely factors: the median of each of as many equally large parts of the sorted values. So a single step that
/// the operating system stopped for long does not count.
fn factors(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    let at = |i: usize| values.get((2 * i + 1) * values.len() / (2 * FACTORS)).copied();
    (0..FACTORS).filter_map(at).collect()
}

/// Measures what serving adds to the engines' steps, with a cluster of this program's own processes.
async fn serving(models: &Models, args: &ModelArgs, profile: &Profile) -> Result<(Overhead, Vec<f64>)> {
    let (_, full) = models.list.first().context("no model")?;
    let (_, decode) = models.list.get(1).or(models.list.first()).context("no model")?;
    let program = std::env::current_exe().context("finding this program's file")?;
    let mut command = tokio::process::Command::new(program);
    command.args(["up", "--print", "json", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]);
    command.arg("--full").arg(full).arg("--decode").arg(decode);
    for (flag, value) in [
        ("--device", args.device.to_string()),
        ("--weights", args.weights.to_string()),
        ("--kv-dtype", args.kv_dtype.to_string()),
        ("--kv-pool-tokens", profile.kv_pool_tokens.max(64 * (PROMPT + ANSWER)).to_string()),
    ] {
        command.args([flag, &value]);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
    let mut cluster = command.spawn().context("starting a cluster")?;
    let out = cluster.stdout.take().context("the cluster has no output")?;
    let line = BufReader::new(out).lines().next_line().await?.context("the cluster ended before it was ready")?;
    let ready: serde_json::Value = serde_json::from_str(&line).context("the cluster's first line is not JSON")?;
    let http = ready["http"].as_str().context("the cluster's first line has no \"http\"")?;
    let url = if http.contains("://") { http.to_owned() } else { format!("http://{http}") };
    let api = Api::new(&url, None, None, "", Prompts::Ids, Duration::from_secs(600))?;
    let measured = measure_serving(&api, profile).await;
    // The processes of the cluster end with it.
    cluster.kill().await.context("stopping the cluster")?;
    measured
}

/// Requests of a client, one or several at a time.
struct Client<'a> {
    api: &'a Api,
    sent: usize,
}

impl Client<'_> {
    /// Sends requests together and returns when each was sent and when its tokens came.
    async fn send(&mut self, together: usize) -> Result<Vec<(tokio::time::Instant, Vec<tokio::time::Instant>)>> {
        let requests = (0..together).map(|_| {
            self.sent += 1;
            // Each request has a different prompt, so that nothing comes from a prefix cache.
            let prompt = (0..PROMPT).map(|i| 3 + ((i * 13 + self.sent * 101) % 199) as u32).collect();
            self.api.complete(Request { prompt, output_tokens: ANSWER })
        });
        let outcomes = join_all(requests.collect::<Vec<_>>()).await;
        let answered = outcomes.into_iter().map(|outcome| match outcome.result {
            Ok(arrivals) => Ok((outcome.sent, arrivals.times)),
            Err(Failure { kind, message }) => bail!("a request through the router failed: {kind}: {message}"),
        });
        answered.collect()
    }
}

fn between(earlier: tokio::time::Instant, later: tokio::time::Instant) -> f64 {
    later.duration_since(earlier).as_secs_f64()
}

async fn measure_serving(api: &Api, profile: &Profile) -> Result<(Overhead, Vec<f64>)> {
    let (prefill, _) = profile.full.curves().context("no steps")?;
    let (_, decode) = profile.decoder().curves().context("no steps")?;
    let mut client = Client { api, sent: 0 };
    let deadline = Instant::now() + FOUND_WITHIN;
    // The router needs a moment to find its nodes.
    while let Err(error) = client.send(1).await {
        if Instant::now() > deadline {
            return Err(error);
        }
        tokio::time::sleep(PAUSE).await;
    }
    let (mut ttft, mut first_gap, mut jitter, mut steps) = (Vec::new(), Vec::new(), Vec::new(), Vec::<Point>::new());
    for together in [1, 2, 4, 8, 16] {
        let mut paces = Vec::new();
        for _ in 0..(48 / together).max(4) {
            // Between requests, services fall asleep as they do under a moderate load.
            tokio::time::sleep(PAUSE).await;
            for (sent, tokens) in client.send(together).await? {
                if together == 1 {
                    ttft.push(between(sent, tokens[0]));
                    first_gap.push(between(tokens[0], tokens[1]));
                }
                // At the beginning and at the end, fewer sequences decode.
                let steady = &tokens[ANSWER / 4..3 * ANSWER / 4];
                let pace = between(steady[0], steady[steady.len() - 1]) / (steady.len() - 1) as f64;
                jitter.extend(steady.windows(2).map(|pair| (between(pair[0], pair[1]) / pace).max(1e-6)));
                paces.push(pace);
            }
        }
        let rows = together as f64;
        let (step, pace) = (decode.seconds(rows, rows * (PROMPT + ANSWER / 2) as f64), median(paces));
        // More sequences are never less work. What seems so is noise.
        let before = steps.last().map_or(0.0, |point| point.seconds);
        steps.push(Point { rows: together, context_tokens: 0, seconds: (pace - step).max(before) });
        tracing::info!(sequences = together, step, pace, "measured decode steps through the router");
    }
    let one = decode.seconds(1.0, PROMPT as f64) + steps[0].seconds;
    let above = |values: Vec<f64>, part: f64| factors(values.into_iter().map(|v| (v - part).max(0.0)).collect());
    let overhead = Overhead {
        request_seconds: above(ttft, prefill.seconds(PROMPT as f64, 0.0)),
        handoff_seconds: above(first_gap, one),
        steps,
    };
    Ok((overhead, factors(jitter)))
}

/// Processor and number of cores.
fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    format!("{}, {cores} cores", name.map_or(std::env::consts::ARCH, |(_, name)| name.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_equally_likely_and_leave_outliers_out() {
        let all = factors((0..400).rev().map(|i| if i == 399 { 1e6 } else { f64::from(i) }).collect());
        assert_eq!((all.len(), all[0], all[20], all[39]), (40, 5.0, 205.0, 395.0));
        assert!(factors(Vec::new()).is_empty());
    }
}
