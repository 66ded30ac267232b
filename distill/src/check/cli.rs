//! The subcommand `check`: its arguments and its implementation.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, ValueEnum};
use overfill_kv::KvDtype;
use overfill_model::{WeightFormat, resolve};

use super::{CLOSE_CALL, CheckConfig, Distance, Report, Verdict, check};

// Lists of subcommands show the description in one line, so the verdicts are explained here.
const AFTER_HELP: &str = "\
The reference is the implementation in candle-transformers. It runs in f32 over the same stored weights. Prompts are
computed as on prefill nodes, and their continuations token by token as on decode nodes.

PASS means that no log-probability at any compared position differs from the reference by more than the bound. In f32 the
two differ only by rounding, and the bound is 0.002 nats. Other formats round more, by an amount that depends on the
model. They get a verdict only if --bound is set.

Exit code: 0 if passed or not judged, 1 if failed, 2 if the check could not run.

Examples, from the root of the repository:
  overfill check demo/full
  overfill check demo/decode --weights int8 --kv-dtype bf16
  overfill check demo/full --prompt-tokens 1,100,1000 --text README.md --print json";

/// Compares our engine's log-probabilities with those of candle-transformers.
#[derive(Args, Clone, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct CheckArgs {
    /// Model: a Hugging Face folder, a .gguf file or a hub id.
    pub model: String,
    /// Another model for the reference, for example the folder that a .gguf file was made from. Needs --bound for a verdict.
    #[arg(long, value_name = "MODEL", help_heading = "Engine and reference")]
    pub reference: Option<String>,
    /// Weight format of the engine: f32, bf16, f16, int8, int8-channel or int4.
    #[arg(long, default_value = "f32", value_name = "FORMAT", help_heading = "Engine and reference")]
    pub weights: WeightFormat,
    /// Type of the engine's KV cache: f32, bf16 or f16.
    #[arg(long, default_value = "f32", value_name = "TYPE", help_heading = "Engine and reference")]
    pub kv_dtype: KvDtype,
    /// Prompt lengths, comma-separated [default: 1, 16, 128, 512, 1024 and 2048, up to the model's context]
    #[arg(long, value_delimiter = ',', value_name = "TOKENS", help_heading = "Prompts")]
    pub prompt_tokens: Option<Vec<usize>>,
    /// Number of greedy decode steps after each prompt.
    #[arg(long, default_value_t = 16, value_name = "TOKENS", help_heading = "Prompts")]
    pub decode_tokens: usize,
    /// Text file. Each prompt is the beginning of its text [default: random tokens]
    #[arg(long, value_name = "FILE", help_heading = "Prompts")]
    pub text: Option<PathBuf>,
    /// Seed of the random tokens.
    #[arg(long, default_value_t = 0, help_heading = "Prompts")]
    pub seed: u64,
    /// Largest allowed difference of a log-probability, in nats [default: 0.002 if everything is f32]
    #[arg(long, value_name = "NATS", help_heading = "Result")]
    pub bound: Option<f64>,
    /// Format of the result.
    #[arg(long, value_enum, default_value_t = Print::Text, value_name = "FORMAT", help_heading = "Result")]
    pub print: Print,
}

/// Formats of a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Print {
    /// A table.
    Text,
    /// One line of JSON.
    Json,
}

impl CheckArgs {
    /// Runs the subcommand. `false` means that the check failed; an error means that it could not run.
    pub fn run(self) -> Result<bool> {
        let report = check(&CheckConfig {
            model: resolve(&self.model)?,
            reference: self.reference.as_deref().map(resolve).transpose()?,
            prompt_tokens: self.prompt_tokens,
            decode_tokens: self.decode_tokens,
            text: self.text,
            seed: self.seed,
            weights: self.weights,
            kv_dtype: self.kv_dtype,
            bound: self.bound,
        })?;
        match self.print {
            Print::Text => print!("{}", text(&report)),
            Print::Json => println!("{}", serde_json::to_string(&report)?),
        }
        Ok(report.verdict != Verdict::Fail)
    }
}

/// Formats a report as text: what was compared, one line per prompt, and the verdict.
pub fn text(report: &Report) -> String {
    let (model, reference) = (report.model.display(), report.reference.display());
    let mut out = format!("engine      {model}, weights {}, KV {}\n", report.weights, report.kv_dtype);
    out += &format!("reference   {reference}, candle-transformers' {}, f32\n", report.implementation);
    for note in &report.notes {
        out += &format!("note        {note}\n");
    }
    out += "distances   of log-probabilities, in nats, over the whole vocabulary\n\n";
    let line = |cells: [String; 7]| {
        let [prompt, greatest, mean, steps, decode_greatest, decode_mean, same] = cells;
        format!("{prompt:>6}  {greatest:>9} {mean:>9}  {steps:>6}  {decode_greatest:>9} {decode_mean:>9}  {same:>11}\n")
    };
    out += &line(["prompt", "greatest", "mean", "decode", "greatest", "mean", "same greedy"].map(String::from));
    for prompt in &report.prompts {
        let (prefill, decode) = (&prompt.prefill, &prompt.decode);
        let both = prefill.with(decode);
        let [decode_greatest, decode_mean] = match decode.positions {
            0 => ["-".into(), "-".into()],
            _ => [nats(decode.greatest), nats(decode.mean)],
        };
        out += &line([
            prompt.prompt_tokens.to_string(),
            nats(prefill.greatest),
            nats(prefill.mean),
            decode.positions.to_string(),
            decode_greatest,
            decode_mean,
            format!("{} of {}", both.same_greedy, both.positions),
        ]);
    }
    out + "\n" + &verdict(report) + "\n"
}

fn verdict(report: &Report) -> String {
    let Distance { positions, greatest, mean, same_greedy, close_calls, .. } = report.total;
    let judged = match (report.verdict, report.bound) {
        (Verdict::Pass, Some(bound)) => format!("PASS: greatest distance {}, bound {bound}", nats(greatest)),
        (Verdict::Fail, Some(bound)) => format!("FAIL: greatest distance {}, bound {bound}", nats(greatest)),
        _ => format!("NOT JUDGED: greatest distance {}, no --bound", nats(greatest)),
    };
    let mut out = format!("{judged}; mean {}; same greedy token at {same_greedy} of {positions} positions", nats(mean));
    if same_greedy < positions {
        let others = positions - same_greedy;
        out += &format!(
            ", {close_calls} of the other {others} close calls (the reference's first two within {CLOSE_CALL})"
        );
    }
    out
}

fn nats(distance: f64) -> String {
    if distance.is_finite() { format!("{distance:.2e}") } else { "not finite".into() }
}
