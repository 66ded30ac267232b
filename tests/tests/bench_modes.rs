//! `overfill bench modes` with the demo pair: its forced agreement is what becomes of the drafts, and its counts add up.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use overfill_tests::cluster::binary;
use serde_json::{Value, json};

fn demo(model: &str) -> String {
    format!("{}/../demo/{model}", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn rows_show_what_was_forced() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let plot = folder.path().join("modes.svg");
    let args = "--batch 1,3 --prompt-tokens 40 --answer-tokens 60 --agreement 0,1 --runs 1 --weights f32 --kv-dtype f32 --json";
    let mut command = Command::new(binary()?);
    command.args(["bench", "modes", "--full", &demo("full"), "--decode", &demo("decode")]);
    let output = command.args(args.split_whitespace()).arg("--svg").arg(&plot).output().context("running the bench")?;
    // It fails if mode exact gives other tokens than the full model.
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let rows: Vec<Value> = serde_json::from_slice(&output.stdout).context("the rows are not JSON")?;
    let names: Vec<(Value, Value, Value)> =
        rows.iter().map(|row| (row["batch"].clone(), row["mode"].clone(), row["forced_agreement"].clone())).collect();
    let of_batch = |batch: u32| {
        let own = ["full alone", "draft", "refresh", "exact"].map(|mode| (json!(batch), json!(mode), Value::Null));
        let forced = [0.0, 1.0].map(|rate| (json!(batch), json!("exact"), json!(rate)));
        own.into_iter().chain(forced)
    };
    ensure!(names == of_batch(1).chain(of_batch(3)).collect::<Vec<_>>(), "{names:?}");
    for rows in rows.chunks(6) {
        let number = |row: usize, field: &str| rows[row][field].as_f64().with_context(|| format!("{field}: {rows:?}"));
        let batch = number(0, "batch")?;
        ensure!(
            number(0, "pruned_passes_per_token")? == 0.0 && number(1, "pruned_passes_per_token")? > 0.0,
            "{rows:?}"
        );
        // Each token but the first is a step of the batch, and the sequences may begin one after the other.
        ensure!((59.0 / 60.0 / batch..=1.1).contains(&number(0, "full_passes_per_token")?), "{rows:?}");
        ensure!(number(1, "full_passes_per_token")? < 0.1, "{rows:?}");
        ensure!(number(4, "accepted_share")? == 0.0 && number(5, "accepted_share")? == 1.0, "{rows:?}");
        // At one sequence, every verdict is a pass of the full model. The first drafts are made before it is known what they cost.
        let passes = [number(4, "full_passes_per_token")?, number(5, "full_passes_per_token")?];
        ensure!(batch > 1.0 || (passes[0] > 0.95 && passes[1] < passes[0]), "{rows:?}");
    }
    ensure!(std::fs::read_to_string(&plot)?.contains("batch 3"), "the plot has no line for batch 3");
    Ok(())
}

#[test]
fn impossible_settings_are_named() -> Result<()> {
    for (args, expected) in [
        ("--agreement 1.5", "must be in [0, 1], got 1.5"),
        ("--answer-tokens 1", "--answer-tokens must be at least 2, got 1"),
        ("--geometry small", "two models are needed, the full one and its pruned one; there are 1"),
    ] {
        let mut command = Command::new(binary()?);
        let output = command.args(["bench", "modes"]).args(args.split_whitespace()).output()?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success() && error.contains(expected), "{args}: {error}");
    }
    Ok(())
}
