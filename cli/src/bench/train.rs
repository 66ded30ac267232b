//! Training of a pruned model under its full model: tokens per second of each part of a step, and of calibration, against
//! this machine's matrix products in f32.

use anyhow::{Result, ensure};
use clap::Args;
use overfill_distill::measure::{Part, Step, StepSize, Training, calibration};
use overfill_model::{WeightFormat, bench};

use super::{
    models::ModelArgs,
    report::{Report, median},
};

/// What a step trains on.
#[derive(Args)]
#[command(next_help_heading = "Sizes")]
pub struct TrainSize {
    /// Examples per step.
    #[arg(long, default_value_t = 8, value_parser = super::count, value_name = "EXAMPLES")]
    examples: usize,
    /// Mean length of a prompt. Lengths vary from half to one and a half times as much.
    #[arg(long, default_value_t = 256, value_parser = super::count, value_name = "TOKENS")]
    prompt_tokens: usize,
    /// Mean length of a response. Lengths vary as those of prompts.
    #[arg(long, default_value_t = 128, value_parser = super::count, value_name = "TOKENS")]
    response_tokens: usize,
    /// Samples of one pass of calibration.
    #[arg(long, default_value_t = 4, value_parser = super::count, value_name = "COUNT")]
    samples: usize,
    /// Length of a sample.
    #[arg(long, default_value_t = 512, value_parser = super::count, value_name = "TOKENS")]
    sample_tokens: usize,
}

/// Measures training steps of the second model under the first one, and calibration of the first.
pub fn measure(models: &ModelArgs, size: &TrainSize, runs: usize, report: &mut Report) -> Result<()> {
    ensure!(models.device == overfill_model::DeviceSpec::Cpu, "--device is {}, supported: cpu", models.device);
    let supported = [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::F16];
    ensure!(supported.contains(&models.weights), "--weights is {}, supported: f32, bf16, f16", models.weights);
    let prepared = models.prepare()?;
    let [(_, full), (_, student)] = prepared.list.as_slice() else {
        anyhow::bail!("training needs a full model and a pruned one, got {} models", prepared.list.len());
    };
    let step_size =
        StepSize { examples: size.examples, prompt_tokens: size.prompt_tokens, response_tokens: size.response_tokens };
    let mut training = Training::load(full, student, models.weights, step_size)?;
    // The first step allocates.
    let tokens = training.step()?.forward.tokens;
    let (mut steps, mut products) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        // In turns, since other programs may change the machine's speed.
        products.push(bench::training_products(training.student(), tokens)?);
        steps.push(training.step()?);
    }
    drop(training);
    let calibrations = calibration(full, size.samples, size.sample_tokens, runs)?;

    let machine = median(products);
    let note = format!("products of f32 matrices of the student's shapes, {} threads", bench::threads());
    report.add("matrix products", machine / 1e9, "GFLOP/s", note);
    let whole = median(steps.iter().map(|step| parts(step).iter().map(|(_, part)| part.seconds).sum()).collect());
    let tokens = steps.first().map_or(0, |step| step.forward.tokens);
    let note =
        format!("response tokens, {} examples per step, prompts of {} tokens", size.examples, size.prompt_tokens);
    report.add("training", tokens as f64 / whole, "tok/s", note);
    let student: Vec<Part> = steps
        .iter()
        .map(|step| {
            let all = [step.forward, step.backward, step.optimizer];
            Part {
                seconds: all.iter().map(|part| part.seconds).sum(),
                tokens,
                operations: all.iter().map(|part| part.operations).sum(),
            }
        })
        .collect();
    add(report, "student", &student, machine, Some(whole));
    for i in 0..4 {
        let name = steps.first().map_or("", |step| parts(step)[i].0);
        let part: Vec<Part> = steps.iter().map(|step| parts(step)[i].1).collect();
        add(report, name, &part, machine, Some(whole));
    }
    add(report, "calibration", &calibrations, machine, None);
    Ok(())
}

fn parts(step: &Step) -> [(&'static str, Part); 4] {
    [
        ("frozen prefill", step.prefill),
        ("forward", step.forward),
        ("backward", step.backward),
        ("optimizer", step.optimizer),
    ]
}

/// Adds the speed of a part, the median of its runs.
fn add(report: &mut Report, name: &str, runs: &[Part], machine: f64, step: Option<f64>) {
    let seconds = median(runs.iter().map(|part| part.seconds).collect());
    let Some(part) = runs.first() else { return };
    let share = step.map_or_else(String::new, |step| format!("{:.0} % of a step, ", 100.0 * seconds / step));
    report.add(name, part.tokens as f64 / seconds, "tok/s", format!("{share}{:.0} ms", seconds * 1e3));
    if part.operations > 0.0 {
        let rate = part.operations / seconds;
        let note = format!("{:.0} % of the matrix products", 100.0 * rate / machine);
        report.add(format!("{name}, arithmetic"), rate / 1e9, "GFLOP/s", note);
    }
}
