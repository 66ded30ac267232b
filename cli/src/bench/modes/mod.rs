//! What each mode is worth: whole requests through a router, a prefill node and a decode node in this process, in each mode,
//! beside the full model alone.
//!
//! How fast mode exact is depends on how often the full model accepts a draft. Models with random weights never agree. So the
//! decode model is also made to agree at given rates ([`forced`]).

mod cluster;
mod forced;
mod plot;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use overfill_kv::Mode;
use serde::Serialize;

use super::models::{ModelArgs, Models};
use super::report::median;
use super::{Output, Runs};
use crate::text;
use cluster::{Cluster, Counts, Decoder};

const AFTER_HELP: &str = "\
FULL ALONE is a decode node that has the full model itself, in mode draft: no pruned model takes part. It is what the other rows
are compared with. Each row sends as many requests at once as its batch has, all with the same lengths, after the prompts were
computed once. Tokens per second count all tokens of the answers, from the first request to the end of the last answer.

AGREEMENT is `own` where the decode model's own choices stand. A number means forced agreement: the decode model does all of its
work, and then this share of its tokens is replaced by the full model's own, and all others by wrong ones.

A pass is one forward pass of a model, over all sequences of a step. Each reads all weights once.

Examples:
  overfill bench modes
  overfill bench modes --geometry smollm2-135m,smollm2-135m-overfill --svg modes.svg
  overfill bench modes --full DIR --decode DIR --data FILE --batch 1 --agreement 0.8";

/// Measures each mode against the full model alone.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct ModesArgs {
    #[command(flatten)]
    models: ModelArgs,
    /// Numbers of concurrent requests, comma-separated.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1,8,32",
        value_parser = super::count,
        value_name = "SEQUENCES",
        help_heading = "Sizes"
    )]
    batch: Vec<usize>,
    /// Length of each prompt of random tokens.
    #[arg(long, default_value_t = 64, value_parser = super::count, value_name = "TOKENS", help_heading = "Sizes")]
    prompt_tokens: usize,
    /// Prompts from a JSONL file of {"messages": [..]} or {"prompt": .., "response": ..}, in place of random tokens.
    #[arg(long, conflicts_with = "prompt_tokens", value_name = "FILE", help_heading = "Sizes")]
    data: Option<PathBuf>,
    /// Length of each answer.
    #[arg(long, default_value_t = 128, value_parser = super::count, value_name = "TOKENS", help_heading = "Sizes")]
    answer_tokens: usize,
    /// Rates of forced agreement in mode exact, comma-separated.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "0.5,0.6,0.7,0.8,0.9,0.95",
        value_parser = share,
        value_name = "SHARE",
        help_heading = "Measurement"
    )]
    agreement: Vec<f64>,
    #[command(flatten)]
    runs: Runs,
    /// Also plot the speed of mode exact over agreement into this SVG file.
    #[arg(long, value_name = "FILE.svg", help_heading = "Output")]
    svg: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

/// Parses a share, in [0, 1].
fn share(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|e| format!("{e}"))?;
    if (0.0..=1.0).contains(&value) { Ok(value) } else { Err(format!("must be in [0, 1], got {value}")) }
}

/// How the answers of a row come about.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Way {
    decoder: Decoder,
    mode: Mode,
    /// Forced agreement; `None`: the decode model's own choices stand.
    agreement: Option<f64>,
}

impl Way {
    fn name(&self) -> &'static str {
        match self.decoder {
            Decoder::Full => "full alone",
            Decoder::Pruned => self.mode.as_str(),
        }
    }
}

/// A measured row.
#[derive(Clone, Debug, Serialize)]
struct Row {
    batch: usize,
    mode: &'static str,
    /// Rate of forced agreement.
    forced_agreement: Option<f64>,
    tokens_per_second: f64,
    /// As a multiple of the full model alone at the same batch size.
    relative_speed: f64,
    full_passes_per_token: f64,
    pruned_passes_per_token: f64,
    /// In mode exact: drafts per verdict.
    drafts_per_verdict: Option<f64>,
    /// Share of the drafts that stand.
    accepted_share: Option<f64>,
}

/// Measures, and prints the rows.
pub async fn run(args: &ModesArgs) -> Result<()> {
    ensure!(args.answer_tokens >= 2, "--answer-tokens must be at least 2, got {}", args.answer_tokens);
    let models = args.models.prepare()?;
    let most = args.batch.iter().copied().max().context("no batch size")?;
    let prompts = args.prompts(&models, most)?;
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let cluster = Cluster::start(&models, &args.models, most, longest + args.answer_tokens).await?;
    let measured = args.measure(&cluster, &prompts).await;
    let ended = cluster.end().await;
    let rows = measured?;
    ended?;
    if let Some(file) = &args.svg {
        plot::write(file, &rows).map_err(|e| anyhow::anyhow!("drawing {}: {e}", file.display()))?;
    }
    if args.output.json {
        println!("{}", serde_json::to_string(&rows)?);
    } else {
        print!("{}", table(&rows));
    }
    Ok(())
}

impl ModesArgs {
    fn prompts(&self, models: &Models, count: usize) -> Result<Vec<Vec<u32>>> {
        let (_, full) = models.list.first().context("no model")?;
        let Some(data) = &self.data else {
            let vocabulary = overfill_model::ModelConfig::from_folder(full)?.vocab_size;
            let token = |i: usize, at: usize| ((i * 7919 + at * 104_729 + 13) % vocabulary) as u32;
            return Ok((0..count).map(|i| (0..self.prompt_tokens).map(|at| token(i, at)).collect()).collect());
        };
        let examples = overfill_distill::examples(data, full, usize::MAX)?;
        let mut prompts: Vec<Vec<u32>> = examples.iter().map(|example| example.last_response().0.to_vec()).collect();
        if prompts.len() < count {
            bail!("--data has {} prompts, the largest batch needs {count}", prompts.len());
        }
        prompts.truncate(count);
        Ok(prompts)
    }

    /// The rows of each batch size, the full model alone first.
    fn ways(&self) -> Vec<Way> {
        let of = |decoder, mode, agreement| Way { decoder, mode, agreement };
        let own = [
            of(Decoder::Full, Mode::Draft, None),
            of(Decoder::Pruned, Mode::Draft, None),
            of(Decoder::Pruned, Mode::Refresh, None),
            of(Decoder::Pruned, Mode::Exact, None),
        ];
        let forced = self.agreement.iter().map(|rate| of(Decoder::Pruned, Mode::Exact, Some(*rate)));
        own.into_iter().chain(forced).collect()
    }

    async fn measure(&self, cluster: &Cluster, prompts: &[Vec<u32>]) -> Result<Vec<Row>> {
        // The prefill node's own choices, as the verdicts on drafts will be. On a decode node, products round differently.
        let answers = cluster.answer(Decoder::Full, Mode::Exact, prompts, self.answer_tokens).await?;
        for (prompt, answer) in prompts.iter().zip(&answers) {
            cluster.agreement().learn(prompt.clone(), answer.clone());
        }
        // From here on, both decode nodes hold the KV of the prompts.
        cluster.answer(Decoder::Pruned, Mode::Draft, prompts, 2).await?;
        let mut rows = Vec::new();
        for &batch in &self.batch {
            let (prompts, answers) = (&prompts[..batch], &answers[..batch]);
            let ways = self.ways();
            let mut runs: Vec<Vec<(f64, Counts)>> = vec![Vec::new(); ways.len()];
            // One run of each row after the other, so that all have the same load of the machine.
            for _ in 0..self.runs.runs {
                for (way, runs) in ways.iter().zip(&mut runs) {
                    cluster.agreement().force(way.agreement);
                    if way.mode == Mode::Exact {
                        // The decode node learns what drafts are worth at this rate.
                        cluster.answer(way.decoder, way.mode, prompts, self.answer_tokens).await?;
                    }
                    let (before, began) = (cluster.counts().await?, Instant::now());
                    let found = cluster.answer(way.decoder, way.mode, prompts, self.answer_tokens).await?;
                    let seconds = began.elapsed().as_secs_f64();
                    if way.mode == Mode::Exact && found != answers {
                        bail!("mode exact has not given the full model's answers");
                    }
                    tracing::info!(batch, mode = way.name(), agreement = way.agreement, seconds, "measured");
                    runs.push((seconds, cluster.counts().await?.since(before)));
                }
            }
            let tokens = (batch * self.answer_tokens) as f64;
            let speed = |runs: &Vec<(f64, Counts)>| tokens / median(runs.iter().map(|run| run.0).collect());
            let alone = speed(&runs[0]);
            rows.extend(ways.iter().zip(&runs).map(|(way, runs)| row(way, batch, tokens, speed(runs), alone, runs)));
        }
        Ok(rows)
    }
}

fn row(way: &Way, batch: usize, tokens: f64, speed: f64, alone: f64, runs: &[(f64, Counts)]) -> Row {
    let total = |count: fn(&Counts) -> u64| runs.iter().map(|(_, counts)| count(counts)).sum::<u64>() as f64;
    let all_tokens = tokens * runs.len() as f64;
    let share = |part: f64, of: f64| (of > 0.0).then(|| part / of);
    let drafted = total(|counts| counts.drafted_tokens);
    Row {
        batch,
        mode: way.name(),
        forced_agreement: way.agreement,
        tokens_per_second: speed,
        relative_speed: speed / alone,
        full_passes_per_token: total(|counts| counts.full_passes) / all_tokens,
        pruned_passes_per_token: total(|counts| counts.pruned_passes) / all_tokens,
        drafts_per_verdict: share(drafted, total(|counts| counts.verdicts)),
        accepted_share: share(total(|counts| counts.accepted_tokens), drafted),
    }
}

fn table(rows: &[Row]) -> String {
    let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".into());
    let line = |row: &Row| {
        let is_exact = row.mode == Mode::Exact.as_str();
        let own = if is_exact { "own" } else { "-" };
        [
            row.batch.to_string(),
            row.mode.to_owned(),
            row.forced_agreement.map_or_else(|| own.to_owned(), |rate| rate.to_string()),
            format!("{:.1}", row.tokens_per_second),
            format!("{:.2}", row.relative_speed),
            format!("{:.3}", row.full_passes_per_token),
            format!("{:.3}", row.pruned_passes_per_token),
            or_dash(row.drafts_per_verdict.map(|drafts| format!("{drafts:.2}"))),
            or_dash(row.accepted_share.map(|share| format!("{share:.3}"))),
        ]
    };
    let header = [
        "BATCH",
        "MODE",
        "AGREEMENT",
        "TOK/S",
        "OF FULL ALONE",
        "FULL PASSES/TOK",
        "PRUNED PASSES/TOK",
        "DRAFTS/VERDICT",
        "ACCEPTED",
    ];
    text::table(header, &rows.iter().map(line).collect::<Vec<_>>())
}
