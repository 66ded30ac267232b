//! The subcommand `eval`: its arguments, its table and its JSON.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use overfill_kv::KvDtype;
use overfill_model::{DeviceSpec, LoadOptions, WeightFormat, resolve};
use serde_json::{Map, Value, json};

use super::{Agreement, Drafting, Measured, Score, Stages, Texts, Way};
use crate::{data::load, folder, train::load_text};

const EVAL_HELP: &str = "\
Each arm is one row of the table:
  full         the --full model alone
  draft        mode draft: the --decode model over the full model's KV
  refresh      mode refresh
  exact        mode exact, with --drafts drafts for each verdict
  pruned-only  the --pruned model alone
  scratch      the --scratch model alone

With --full, the full model first writes its own greedy answer to each prompt. Agreement is the share of the answers' tokens
that an arm chooses as well, by position in the answer.

Examples, from the root of the repository, after `overfill demo-data --out target/demo-data`:
  overfill eval --full demo/full --decode demo/decode --data target/demo-data/held-out.jsonl
  overfill eval --full demo/full --decode demo/decode --arms draft,refresh --answer-tokens 512 --data target/demo-data/held-out.jsonl";

/// A way of answering that is scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Arm {
    /// The full model alone.
    Full,
    /// Mode draft.
    Draft,
    /// Mode refresh.
    Refresh,
    /// Mode exact.
    Exact,
    /// The pruned model alone.
    PrunedOnly,
    /// A model that was trained from scratch.
    Scratch,
}

impl Arm {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// Score models on held-out prompts: greedy exact match, cross-entropy, and agreement with the full model.
#[derive(Args, Clone, Debug)]
#[command(after_help = EVAL_HELP)]
pub struct EvalArgs {
    /// Full model, for the arms `full`, `draft`, `refresh` and `exact`: a Hugging Face folder, a .gguf file or a hub id.
    #[arg(long, value_name = "MODEL", help_heading = "Models")]
    pub full: Option<String>,
    /// Decode model over the full model's KV, for the arms `draft`, `refresh` and `exact`.
    #[arg(long, requires = "full", value_name = "MODEL", help_heading = "Models")]
    pub decode: Option<String>,
    /// Pruned model that was fine-tuned alone, for the arm `pruned-only`.
    #[arg(long, value_name = "MODEL", help_heading = "Models")]
    pub pruned: Option<String>,
    /// Model that was trained from scratch, for the arm `scratch`.
    #[arg(long, value_name = "MODEL", help_heading = "Models")]
    pub scratch: Option<String>,
    /// Arms to score, comma-separated [default: all that the given models allow]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "ARM", help_heading = "Models")]
    pub arms: Option<Vec<Arm>>,
    /// JSONL file of {"messages": [..]} or {"prompt": .., "response": ..}. The last response of each line is scored.
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    pub data: PathBuf,
    /// Maximum number of examples.
    #[arg(long, default_value_t = 1000, value_name = "COUNT", help_heading = "Data")]
    pub limit: usize,
    /// Maximum length of an example in tokens. Longer ones are cut.
    #[arg(long, default_value_t = 2048, value_name = "TOKENS", help_heading = "Data")]
    pub max_tokens: usize,
    /// Maximum length of the full model's own answers [default: the length of each response]
    #[arg(long, value_parser = clap::value_parser!(u32).range(2..), value_name = "TOKENS", help_heading = "Data")]
    pub answer_tokens: Option<u32>,
    /// Drafts for each verdict in the arm `exact`.
    #[arg(
        long,
        default_value_t = 4,
        value_parser = clap::value_parser!(u8).range(0..=64),
        value_name = "COUNT",
        help_heading = "Computation"
    )]
    pub drafts: u8,
    /// Prompts per batch.
    #[arg(long, default_value_t = 32, value_name = "PROMPTS", help_heading = "Computation")]
    pub batch: usize,
    /// Weight format in memory: f32, bf16, f16, int8, int8-channel, int4 or fp8.
    #[arg(long, alias = "dtype", default_value = "f32", value_name = "FORMAT", help_heading = "Computation")]
    pub weights: WeightFormat,
    /// Type of the KV cache: f32, bf16, f16 or fp8.
    #[arg(long, default_value = "f32", value_name = "TYPE", help_heading = "Computation")]
    pub kv_dtype: KvDtype,
    /// Device: cpu or cuda:N.
    #[arg(long, default_value = "cpu", help_heading = "Computation")]
    pub device: DeviceSpec,
    /// Also write the scores to this JSON file.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub json: Option<PathBuf>,
}

/// The models, as folders or files.
struct Models {
    full: Option<PathBuf>,
    decode: Option<PathBuf>,
    pruned: Option<PathBuf>,
    scratch: Option<PathBuf>,
}

impl Models {
    /// The models that an arm needs.
    fn of(&self, arm: Arm) -> (&'static str, [Option<&Path>; 2]) {
        let Self { full, decode, pruned, scratch } = self;
        match arm {
            Arm::Full => ("--full", [full.as_deref(); 2]),
            Arm::Draft | Arm::Refresh | Arm::Exact => ("--full and --decode", [full.as_deref(), decode.as_deref()]),
            Arm::PrunedOnly => ("--pruned", [pruned.as_deref(); 2]),
            Arm::Scratch => ("--scratch", [scratch.as_deref(); 2]),
        }
    }
}

impl EvalArgs {
    /// Runs the subcommand.
    pub fn run(self) -> Result<()> {
        let found = |model: &Option<String>| model.as_deref().map(resolve).transpose();
        let models = Models {
            full: found(&self.full)?,
            decode: found(&self.decode)?,
            pruned: found(&self.pruned)?,
            scratch: found(&self.scratch)?,
        };
        let arms = self.chosen(&models)?;
        let any = [&models.full, &models.pruned, &models.scratch].into_iter().flatten().next();
        let any = any.context("name at least one model: --full, --pruned or --scratch")?;
        let (mut examples, left_out) = load(&self.data, &load_text(any)?, self.max_tokens)?;
        examples.truncate(self.limit);
        if left_out > 0 {
            tracing::warn!(
                left_out,
                max_tokens = self.max_tokens,
                "skipped examples that have no response token within max_tokens"
            );
        }
        let texts = Texts::new(&examples, self.batch, self.answer_tokens.map(|tokens| tokens as usize))?;
        let measured = self.measure(&models, &arms, &texts)?;
        print!("{}", table(&measured));
        let json: Map<String, Value> = measured.iter().map(|(arm, measured)| (arm.name(), as_json(measured))).collect();
        println!("{}", serde_json::to_string(&json)?);
        match &self.json {
            Some(path) => folder::write_json(path, &json),
            None => Ok(()),
        }
    }

    /// The arms to score, each once.
    fn chosen(&self, models: &Models) -> Result<Vec<Arm>> {
        let has = |arm: &Arm| models.of(*arm).1.iter().all(Option::is_some);
        let asked = self.arms.as_deref();
        if let Some(arm) = asked.unwrap_or_default().iter().find(|arm| !has(arm)) {
            anyhow::bail!("--arms: {} needs {}", arm.name(), models.of(*arm).0);
        }
        let wanted = |arm: &Arm| asked.map_or_else(|| has(arm), |asked| asked.contains(arm));
        let arms: Vec<Arm> = Arm::value_variants().iter().copied().filter(wanted).collect();
        ensure!(!arms.is_empty(), "name at least one model: --full, --pruned or --scratch");
        Ok(arms)
    }

    fn measure(&self, models: &Models, arms: &[Arm], texts: &Texts<'_>) -> Result<Vec<(Arm, Measured)>> {
        let Self { weights, kv_dtype, device, .. } = *self;
        let options = LoadOptions { weights, kv_dtype, device, ..LoadOptions::default() };
        let drafts = usize::from(self.drafts);
        let way = |arm: Arm| match arm {
            Arm::Full | Arm::PrunedOnly | Arm::Scratch => Way::Alone,
            Arm::Draft => Way::Draft,
            Arm::Refresh => Way::Refresh,
            Arm::Exact => Way::Exact { drafts },
        };
        let is_of_full = |arm: &Arm| !matches!(arm, Arm::PrunedOnly | Arm::Scratch);
        let (of_full, others): (Vec<Arm>, Vec<Arm>) = arms.iter().copied().partition(is_of_full);
        let (mut measured, mut answers) = (Vec::new(), None);
        let compares = arms.iter().any(|arm| *arm != Arm::Full);
        if let Some(full) = models.full.as_deref().filter(|_| compares || !of_full.is_empty()) {
            let decodes = of_full.iter().any(|arm| way(*arm) != Way::Alone);
            let decode = models.decode.as_deref().filter(|_| decodes);
            let mut stages = Stages::load(full, decode, &options, texts.kv_blocks())?;
            answers = compares.then(|| texts.answers(&mut stages)).transpose()?;
            let ways: Vec<Way> = of_full.iter().map(|arm| way(*arm)).collect();
            measured.extend(of_full.into_iter().zip(texts.measure(&mut stages, &ways, answers.as_deref())?));
        }
        for arm in others {
            let [model, _] = models.of(arm).1;
            let mut stages = Stages::load(model.context("no model")?, None, &options, texts.kv_blocks())?;
            let of_arm = texts.measure(&mut stages, &[Way::Alone], answers.as_deref())?;
            measured.extend(of_arm.into_iter().map(|measured| (arm, measured)));
        }
        Ok(measured)
    }
}

/// One row for each arm, with the agreement by position, and one line for each arm with drafts.
fn table(measured: &[(Arm, Measured)]) -> String {
    let ranges =
        measured.iter().find_map(|(_, m)| m.agreement.as_ref()).map(|a| &a.by_position[..]).unwrap_or_default();
    let mut text = format!("{:<12} {:>11} {:>13}", "arm", "exact match", "cross-entropy");
    if !ranges.is_empty() {
        text += &format!(" {:>13}", "common prefix");
    }
    for range in ranges {
        text += &format!(" {:>9}", format!("{}-{}", range.first_position, range.last_position));
    }
    text.push('\n');
    for (arm, Measured { score, agreement, .. }) in measured {
        text += &format!("{:<12} {:>11.4} {:>13.4}", arm.name(), score.exact_match, score.cross_entropy);
        if let Some(agreement) = agreement {
            text += &format!(" {:>13.4}", agreement.common_prefix_share);
            agreement.by_position.iter().for_each(|range| text += &format!(" {:>9.4}", range.share));
        }
        text.push('\n');
    }
    let examples = measured.first().map_or(0, |(_, measured)| measured.score.examples);
    text += &format!("{examples} examples. Cross-entropy in nats per token.");
    if !ranges.is_empty() {
        text += " Agreement with the full model's answers: share of tokens in the common prefix, and by position.";
    }
    text.push('\n');
    for (arm, Measured { drafting, .. }) in measured {
        if let Some(Drafting { drafted_tokens, accepted_tokens, verdict_tokens, verdicts }) = drafting {
            let mean = *verdict_tokens as f64 / *verdicts as f64;
            text += &format!(
                "{}: {accepted_tokens} of {drafted_tokens} drafts accepted, {mean:.2} tokens per verdict\n",
                arm.name()
            );
        }
    }
    text
}

fn as_json(Measured { score, agreement, drafting }: &Measured) -> Value {
    let Score { exact_match, cross_entropy, examples } = score;
    let mut value =
        json!({"exact_match": exact_match, "cross_entropy_nats_per_token": cross_entropy, "examples": examples});
    if let Some(Agreement { by_position, answer_tokens, common_prefix_tokens, common_prefix_share }) = agreement {
        value["agreement_with_full"] = json!({
            "by_position": by_position, "mean_answer_tokens": answer_tokens,
            "mean_common_prefix_tokens": common_prefix_tokens, "common_prefix_share": common_prefix_share,
        });
    }
    if let Some(drafting) = drafting {
        value["drafting"] = json!(drafting);
    }
    value
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: EvalArgs,
    }

    fn chosen(flags: &[&str], pruned: bool) -> Result<Vec<Arm>> {
        let line = ["eval", "--data", "x.jsonl"].iter().chain(flags);
        let model = || Some(PathBuf::from("model"));
        let models = Models { full: model(), decode: None, pruned: pruned.then(model).flatten(), scratch: None };
        Line::try_parse_from(line)?.args.chosen(&models)
    }

    #[test]
    fn arms_are_those_that_the_models_allow() {
        assert_eq!(chosen(&[], false).unwrap(), [Arm::Full]);
        assert_eq!(chosen(&[], true).unwrap(), [Arm::Full, Arm::PrunedOnly]);
        assert_eq!(chosen(&["--arms", "pruned-only,pruned-only"], true).unwrap(), [Arm::PrunedOnly]);
        let refused = chosen(&["--arms", "full,refresh"], true).unwrap_err().to_string();
        assert_eq!(refused, "--arms: refresh needs --full and --decode");
        assert!(chosen(&["--arms", "overfill"], true).unwrap_err().to_string().contains("pruned-only"));
        assert!(chosen(&["--drafts", "65"], true).unwrap_err().to_string().contains("65"));
    }

    #[test]
    fn the_table_has_a_column_for_each_range() {
        let score = Score { exact_match: 0.5, cross_entropy: 0.25, examples: 2 };
        let of = |same: bool| Measured {
            score,
            agreement: Some(Agreement::of(&[vec![true, same, true], vec![true; 20]])),
            drafting: (!same).then_some(Drafting {
                drafted_tokens: 8,
                accepted_tokens: 6,
                verdict_tokens: 9,
                verdicts: 3,
            }),
        };
        let text = table(&[(Arm::Full, of(true)), (Arm::Exact, of(false))]);
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0][4..], ["common", "prefix", "2-16", "17-32"]);
        assert_eq!(lines[1], ["full", "0.5000", "0.2500", "1.0000", "1.0000", "1.0000"]);
        assert_eq!(lines[2], ["exact", "0.5000", "0.2500", "0.9130", "0.9412", "1.0000"]);
        assert!(text.ends_with("exact: 6 of 8 drafts accepted, 3.00 tokens per verdict\n"), "{text}");
        let value = as_json(&of(false));
        assert_eq!(value["agreement_with_full"]["by_position"][0]["tokens"], 17);
        assert_eq!(value["drafting"]["verdicts"], 3);
    }
}
