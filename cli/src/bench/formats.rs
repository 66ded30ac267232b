//! The quality of each weight format: prompts and responses run through both stages of the serving engine.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use overfill_distill::{Example, demo, eval::hand_over};
use overfill_kv::{BlockId, KvDtype, blocks_for};
use overfill_model::{
    LoadOptions, Logits, Model, Outputs, Rows, SequenceSlice, Want, WeightFormat, no_layers, report, resolve,
};
use serde_json::json;

use crate::{text, up};

const AFTER_HELP: &str = "\
Examples:
  overfill bench formats
  overfill bench formats --weights bf16,int8 --kv-dtype f32 --json";

/// What is scored.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct FormatsArgs {
    /// Full model: a folder, a .gguf file or a hub id [default: the demo pair]
    #[arg(long, requires = "data", value_name = "MODEL", help_heading = "Models")]
    full: Option<String>,
    /// Pruned model of the --full model [default: the full model]
    #[arg(long, requires = "full", value_name = "MODEL", help_heading = "Models")]
    decode: Option<String>,
    /// Weight formats, comma-separated. Each is used for both models.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "f32,bf16,f16,int8,int8-channel,int4",
        value_name = "FORMAT",
        help_heading = "Models"
    )]
    weights: Vec<WeightFormat>,
    /// Type of the KV cache: f32, bf16 or f16.
    #[arg(long, default_value = "bf16", value_name = "TYPE", help_heading = "Models")]
    kv_dtype: KvDtype,
    /// JSONL file of {"messages": [..]} or {"prompt": .., "response": ..} [default: the demo's held-out prompts]
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    data: Option<PathBuf>,
    /// Print JSON.
    #[arg(long, help_heading = "Output")]
    json: bool,
}

/// Scores of one format.
struct Score {
    weights: WeightFormat,
    examples: usize,
    exact: usize,
    /// Mean cross-entropy over all response tokens, in nats.
    cross_entropy: f64,
}

/// Scores each format, and prints one line for each.
pub fn run(args: &FormatsArgs) -> Result<()> {
    let work = tempfile::tempdir().context("making a folder for the demo's data")?;
    let (full, decode) = match &args.full {
        Some(full) => {
            let full = resolve(full)?;
            let decode = args.decode.as_deref().map(resolve).transpose()?;
            (full.clone(), decode.unwrap_or(full))
        }
        None => up::demo::unpack()?,
    };
    let data = match &args.data {
        Some(data) => data.clone(),
        None => {
            demo::data::write(work.path(), &demo::recipe::data_config(0))?;
            work.path().join("held-out.jsonl")
        }
    };
    let examples = overfill_distill::examples(&data, &full, usize::MAX)?;
    let scores = args
        .weights
        .iter()
        .map(|weights| score(&full, &decode, *weights, args.kv_dtype, &examples))
        .collect::<Result<Vec<_>>>()?;
    if args.json {
        let lines: Vec<_> = scores
            .iter()
            .map(|s| {
                json!({"weights": s.weights.to_string(), "kv_dtype": args.kv_dtype.to_string(), "examples": s.examples,
                       "exact_match": s.exact as f64 / s.examples as f64, "cross_entropy": s.cross_entropy})
            })
            .collect();
        println!("{}", json!(lines));
        return Ok(());
    }
    let lines: Vec<_> = scores
        .iter()
        .map(|s| {
            let exact = s.exact as f64 / s.examples as f64;
            [s.weights.to_string(), format!("{exact:.3}"), format!("{:.5}", s.cross_entropy), s.examples.to_string()]
        })
        .collect();
    print!("{}", text::table(["WEIGHTS", "EXACT MATCH", "CROSS-ENTROPY", "RESPONSES"], &lines));
    Ok(())
}

fn score(full: &Path, decode: &Path, weights: WeightFormat, kv_dtype: KvDtype, examples: &[Example]) -> Result<Score> {
    let options = |rows| LoadOptions { weights, kv_dtype, rows, ..LoadOptions::default() };
    let longest = examples.iter().map(|e| e.tokens.len()).max().context("no examples")?;
    let blocks: Vec<BlockId> = (0..blocks_for(longest) as u32).map(BlockId).collect();
    let mut full = Model::load(full, &options(Rows::Many), blocks.len())?;
    let mut decode = Model::load(decode, &options(Rows::Few), blocks.len())?;
    full.producer_schema().check_consumer(&decode.kv_schema())?;
    let (layers, mut outputs) = (no_layers(), Outputs::default());
    let (mut exact, mut tokens, mut sum) = (0, 0, 0.0);
    for example in examples {
        let (prompt, response) = example.last_response();
        ensure!(!prompt.is_empty() && !response.is_empty(), "an example without a prompt or response");
        let slice = SequenceSlice { tokens: prompt, start: 0, blocks: &blocks, want: Want::LastLogits };
        full.engine().run(&[slice], &layers, &mut outputs)?;
        let mut right = follows(outputs.logits(), 0, response[0], &mut sum);
        if response.len() > 1 {
            hand_over(&full, &decode, &blocks[..blocks_for(prompt.len())])?;
            // Decoding one token at a time would give the same bits.
            let tokens = &response[..response.len() - 1];
            let slice = SequenceSlice { tokens, start: prompt.len(), blocks: &blocks, want: Want::AllLogits };
            decode.engine().run(&[slice], &layers, &mut outputs)?;
            for (row, token) in response[1..].iter().enumerate() {
                right &= follows(outputs.logits(), row, *token, &mut sum);
            }
        }
        tokens += response.len();
        exact += usize::from(right);
    }
    Ok(Score { weights, examples: examples.len(), exact, cross_entropy: sum / tokens as f64 })
}

/// Returns whether `token` is the most likely one in this row. Adds its cross-entropy to `sum`.
fn follows(logits: &Logits, row: usize, token: u32, sum: &mut f64) -> bool {
    let scored = report(logits.row(row), token, 1);
    *sum -= f64::from(scored.logprob);
    scored.top.first().is_some_and(|(best, _)| *best == token)
}
