//! Arguments of the subcommand `check`, and what runs it.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, ValueEnum};
use overfill_kv::KvDtype;
use overfill_model::{WeightFormat, resolve};

use super::{CLOSE_CALL, CheckConfig, Distance, Report, Verdict, check};

// The subcommand's own description is a line of a list, so what a verdict means stands here.
const AFTER_HELP: &str = "\
The reference is candle-transformers' own implementation, in f32, over the same stored weights. Prompts are computed as
prefill nodes do, and their continuations, token by token, as decode nodes do. PASS says that no log-probability of any
token at any position compared is further from the reference's than the bound. In f32 only rounding is left, and the bound
is 0.002 nats. Other formats round more, by how much depends on the model: they are judged only by a --bound of your own.

Examples:
  overfill check ./my-fine-tune
  overfill check ./my-fine-tune --weights int8 --kv-dtype bf16
  overfill check model.gguf --prompt-tokens 1,100,4000 --text book.txt --print json

Exit code: 0 passed, or no bound to judge by; 1 failed; 2 not checked, for a reason that is said.";

/// Compares our engine's log-probabilities with those of candle-transformers.
#[derive(Args, Clone, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct CheckArgs {
    /// Model: a Hugging Face folder, .gguf file or hub id.
    pub model: String,
    /// Model that the reference computes, if not the same: say the folder that a .gguf file was made from. Judged only by a
    /// --bound.
    #[arg(long)]
    pub reference: Option<String>,
    /// Lengths of the prompts, comma-separated; by default 1, 16, 128, 512, 1024 and 2048, as far as the context reaches.
    #[arg(long, value_delimiter = ',')]
    pub prompt_tokens: Option<Vec<usize>>,
    /// Greedy steps after each prompt.
    #[arg(long, default_value_t = 16)]
    pub decode_tokens: usize,
    /// Text file that the prompts are the beginning of; random tokens if left out.
    #[arg(long)]
    pub text: Option<PathBuf>,
    /// Seed of the random tokens.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// How our engine's weights lie in memory: f32, bf16, f16, int8, int8-channel or int4.
    #[arg(long, default_value = "f32")]
    pub weights: WeightFormat,
    /// Our engine's KV cache: f32, bf16 or f16.
    #[arg(long, default_value = "f32")]
    pub kv_dtype: KvDtype,
    /// Greatest distance of a log-probability that passes, in nats; 0.002 where all is f32.
    #[arg(long)]
    pub bound: Option<f64>,
    /// How the result is printed.
    #[arg(long, value_enum, default_value_t = Print::Text)]
    pub print: Print,
}

/// Forms of a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Print {
    /// For people.
    Text,
    /// One line of JSON, for programs.
    Json,
}

impl CheckArgs {
    /// Runs the subcommand; `false` is a failed check, an error one that could not be made.
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

/// For people: what was compared, a line for each prompt, and the verdict.
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
