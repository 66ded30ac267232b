//! Measures exact match and cross-entropy of each arm by fine-tuning budget.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufRead, BufReader, Write},
    path::Path,
};

use anyhow::{Context, Result};
use overfill_model::LoadOptions;
use serde::{Deserialize, Serialize};

use super::{data, recipe, report};
use crate::{
    data::{Example, load},
    eval::{Score, Stages, Texts, Way},
    prune::prune,
    train::{TrainConfig, load_text, train},
};

/// Fine-tuning budgets in steps.
pub const BUDGETS: [usize; 4] = [50, 100, 200, 400];
/// Additional budget of the model trained from scratch, in steps: seven times the largest.
pub const LONG: usize = 7 * BUDGETS[3];

/// Way to get a small decode model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ArmKind {
    /// The full model runs both stages, without fine-tuning.
    Full,
    /// The full model prefills. The pruned model decodes over its KV and is fine-tuned over it.
    Overfill,
    /// The pruned model runs both stages. It is fine-tuned alone on the same data.
    PrunedOnly,
    /// A model of the pruned size runs both stages. It is trained from random weights on the same data.
    Scratch,
}

impl ArmKind {
    /// Name in tables and plots.
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Overfill => "OverFill",
            Self::PrunedOnly => "pruned-only",
            Self::Scratch => "from scratch",
        }
    }
}

/// One measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Arm that was measured.
    pub arm: ArmKind,
    /// Number of fine-tuning steps.
    pub steps: usize,
    /// Seed of the fine-tuning data, its order, and random weights.
    pub seed: u64,
    /// Scores on the held-out prompts, which are the same for all cells.
    #[serde(flatten)]
    pub score: Score,
    /// Duration of fine-tuning in seconds.
    pub seconds: f64,
}

/// Measures the cells missing in `out/cells.jsonl`, then writes `table.json`, `table.md` and `exact-match.svg`.
///
/// `full` is the demo's full model. `work` holds intermediate files and may be removed afterwards.
pub fn measure(full: &Path, out: &Path, work: &Path, seeds: &[u64], only_render: bool) -> Result<()> {
    fs::create_dir_all(out).with_context(|| format!("creating {}", out.display()))?;
    let file = out.join("cells.jsonl");
    if !only_render {
        for seed in seeds {
            measure_seed(full, &file, &work.join(format!("seed-{seed}")), *seed)?;
        }
    }
    report::write(out, &read(&file)?)
}

fn measure_seed(full: &Path, file: &Path, work: &Path, seed: u64) -> Result<()> {
    // A rule on the records decides which prompts are held out, so training data of other seeds never contain one.
    let shared = work.join("shared");
    data::write(
        &shared,
        &data::DataConfig { seed: 0, conversations: 0, more_conversations: 0, pairs: 512, held_out: recipe::HELD_OUT },
    )?;
    let pruned = work.join("pruned");
    let mut pruning = recipe::pruning(full, &shared, &pruned);
    pruning.progress = false;
    prune(&pruning)?;
    let (held_out, _) = load(&shared.join("held-out.jsonl"), &load_text(full)?, usize::MAX)?;

    let run = Run { full, pruned: &pruned, work, seed, held_out: &held_out };
    let mut plan = vec![(ArmKind::Full, 0)];
    for steps in BUDGETS {
        plan.extend([ArmKind::Overfill, ArmKind::PrunedOnly, ArmKind::Scratch].map(|arm| (arm, steps)));
    }
    plan.push((ArmKind::Scratch, LONG));
    for (arm, steps) in plan {
        let known = read(file)?.iter().any(|c| (c.arm, c.steps, c.seed) == (arm, steps, seed));
        if !known {
            let cell = run.cell(arm, steps)?;
            let mut out = OpenOptions::new().create(true).append(true).open(file).context("opening the cells")?;
            let line = serde_json::to_string(&cell)?;
            println!("{line}");
            writeln!(out, "{line}").context("writing a cell")?;
        }
    }
    Ok(())
}

struct Run<'a> {
    full: &'a Path,
    pruned: &'a Path,
    work: &'a Path,
    seed: u64,
    held_out: &'a [Example],
}

impl Run<'_> {
    fn cell(&self, arm: ArmKind, steps: usize) -> Result<Cell> {
        let out = self.work.join("trained");
        let over = (arm == ArmKind::Overfill).then_some(self.full);
        // The data of a larger budget extend those of a smaller one. No pair is used twice. The seeds differ from the
        // demo pair's.
        let (seed, pairs) = (1000 + self.seed, steps * recipe::BATCH);
        data::write(
            self.work,
            &data::DataConfig { seed, conversations: 0, more_conversations: 0, pairs, held_out: 0 },
        )?;
        let pairs = self.work.join("pairs.jsonl");
        let settings = recipe::training(self.pruned, over, &pairs, &out, steps.max(1), self.seed);
        let settings = TrainConfig { random_init: arm == ArmKind::Scratch, progress: false, ..settings };
        let (models, way, seconds) = match (arm, over) {
            (ArmKind::Full, _) => ((self.full, None), Way::Alone, 0.0),
            (_, Some(full)) => ((full, Some(out.as_path())), Way::Draft, train(&settings)?.seconds),
            (_, None) => ((out.as_path(), None), Way::Alone, train(&settings)?.seconds),
        };
        let texts = Texts::new(self.held_out, 50, None)?;
        let mut stages = Stages::load(models.0, models.1, &LoadOptions::default(), texts.kv_blocks())?;
        let score = texts.score(&mut stages, way)?;
        Ok(Cell { arm, steps, seed: self.seed, score, seconds: (seconds * 10.0).round() / 10.0 })
    }
}

/// Reads all measurements so far. A missing file has none.
fn read(file: &Path) -> Result<Vec<Cell>> {
    let Ok(opened) = File::open(file) else { return Ok(Vec::new()) };
    let mut cells = Vec::new();
    for line in BufReader::new(opened).lines() {
        let line = line.with_context(|| format!("reading {}", file.display()))?;
        cells.push(serde_json::from_str(&line).with_context(|| format!("reading {}", file.display()))?);
    }
    Ok(cells)
}
