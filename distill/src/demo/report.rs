//! Renders the measurements as tables and a plot.

use std::{collections::BTreeMap, fmt::Write, fs, path::Path};

use anyhow::{Context, Result, anyhow};
use plotters::prelude::*;
use serde_json::json;

use super::quality::{ArmKind, BUDGETS, Cell, LONG};
use crate::folder::write_json;

/// Mean and range of one table cell over its seeds.
struct Spread {
    mean: f64,
    low: f64,
    high: f64,
}

fn spread(values: impl Iterator<Item = f64>) -> Option<Spread> {
    let values: Vec<f64> = values.collect();
    let low = values.iter().copied().reduce(f64::min)?;
    let high = values.iter().copied().reduce(f64::max)?;
    Some(Spread { mean: values.iter().sum::<f64>() / values.len() as f64, low, high })
}

/// Selects a number of a cell.
type Measure = fn(&Cell) -> f64;

type Groups<'a> = BTreeMap<(ArmKind, usize), Vec<&'a Cell>>;

/// Writes `table.json`, `table.md` and `exact-match.svg` into `out`.
pub fn write(out: &Path, cells: &[Cell]) -> Result<()> {
    let mut groups = Groups::new();
    for cell in cells {
        groups.entry((cell.arm, cell.steps)).or_default().push(cell);
    }
    let rows: Vec<_> = groups
        .iter()
        .filter_map(|((arm, steps), cells)| {
            let exact = spread(cells.iter().map(|c| c.score.exact_match))?;
            let entropy = spread(cells.iter().map(|c| c.score.cross_entropy))?;
            Some(json!({"arm": arm, "steps": steps, "seeds": cells.iter().map(|c| c.seed).collect::<Vec<_>>(),
                        "exact_match": {"mean": exact.mean, "min": exact.low, "max": exact.high},
                        "cross_entropy": {"mean": entropy.mean, "min": entropy.low, "max": entropy.high}}))
        })
        .collect();
    write_json(&out.join("table.json"), &rows)?;
    let path = out.join("table.md");
    fs::write(&path, markdown(&groups)).with_context(|| format!("writing {}", path.display()))?;
    plot(&out.join("exact-match.svg"), &groups).map_err(|e| anyhow!("plotting: {e}"))
}

fn markdown(groups: &Groups<'_>) -> String {
    let mut text = String::new();
    let measures: [(&str, Measure, usize); 2] = [
        ("Exact match, mean over seeds (lowest to highest)", |c| c.score.exact_match, 3),
        ("Cross-entropy in nats per token, mean over seeds (lowest to highest)", |c| c.score.cross_entropy, 3),
    ];
    for (title, value, digits) in measures {
        // Writing to a String can't fail.
        let _ = writeln!(text, "{title}:\n\n| steps | pruned-only | OverFill | from scratch |\n|---|---|---|---|");
        for steps in BUDGETS.into_iter().chain([LONG]) {
            let column = |arm| match groups.get(&(arm, steps)).and_then(|cells| spread(cells.iter().map(|c| value(c))))
            {
                None => "-".to_string(),
                Some(Spread { mean, low, high }) => format!("{mean:.digits$} ({low:.digits$} to {high:.digits$})"),
            };
            let columns = [ArmKind::PrunedOnly, ArmKind::Overfill, ArmKind::Scratch].map(column);
            let _ = writeln!(text, "| {steps} | {} |", columns.join(" | "));
        }
        if let Some(full) = groups.get(&(ArmKind::Full, 0)).and_then(|cells| cells.first()) {
            let _ = writeln!(text, "\nThe full model by itself: {:.digits$}.\n", value(full));
        }
    }
    text
}

/// Plots mean exact match over fine-tuning steps (logarithmic), one line per arm. Small dots are single seeds.
fn plot(path: &Path, groups: &Groups<'_>) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::new(path, (720, 440)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption("Exact match on held-out prompts", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(48)
        .build_cartesian_2d((40f64..3600f64).log_scale(), 0f64..1.05f64)?;
    chart
        .configure_mesh()
        .x_desc("fine-tuning steps of 16 prompts (logarithmic)")
        .y_desc("exact match")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .draw()?;
    let arms = [
        (ArmKind::Overfill, RGBColor(0, 114, 178)),
        (ArmKind::PrunedOnly, RGBColor(213, 94, 0)),
        (ArmKind::Scratch, RGBColor(110, 110, 110)),
    ];
    for (arm, color) in arms {
        let of_arm = || groups.iter().filter(|((a, _), _)| *a == arm);
        let means = of_arm().filter_map(|((_, steps), cells)| {
            Some((*steps as f64, spread(cells.iter().map(|c| c.score.exact_match))?.mean))
        });
        chart
            .draw_series(LineSeries::new(means, color.stroke_width(2)))?
            .label(arm.name())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        let seeds = of_arm().flat_map(|(_, cells)| cells.iter().map(|c| (c.steps as f64, c.score.exact_match)));
        chart.draw_series(seeds.map(|at| Circle::new(at, 3, color.filled())))?;
    }
    if let Some(full) = groups.get(&(ArmKind::Full, 0)).and_then(|cells| cells.first()) {
        let level = full.score.exact_match;
        chart
            .draw_series(LineSeries::new([(40.0, level), (3600.0, level)], BLACK.stroke_width(1)))?
            .label(ArmKind::Full.name())
            .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], BLACK.stroke_width(1)));
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.3)).draw()?;
    root.present()?;
    Ok(())
}
