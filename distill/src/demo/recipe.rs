//! Recipe of the demo pair: the settings of every stage, and a function that runs them all.

use std::{fs, path::Path, time::Instant};

use anyhow::{Context, Result};
use overfill_model::{DeviceSpec, LoadOptions, WeightDtype};
use serde_json::json;

use super::data::{self, DataConfig};
use crate::{
    data::load,
    eval::{Score, Stages, Texts, Way},
    folder,
    optim::OptimConfig,
    prune::{Norm, PruneConfig, Width, prune},
    train::{TrainConfig, load_text, train},
};

/// Examples per step, in all stages.
pub const BATCH: usize = 16;
/// Training steps of the full model: a curriculum, then full difficulty with a fresh schedule.
pub const FULL_STEPS: (usize, usize) = (1100, 700);
/// Number of chats of full difficulty, read in random order by the second stage.
pub const MORE_CONVERSATIONS: usize = 16_000;
/// Fine-tuning steps of the decode model.
pub const DECODE_STEPS: usize = 400;
/// Hidden and intermediate width of the decode model. The full model's are 64 and 192.
pub const DECODE_WIDTHS: (usize, usize) = (36, 108);
/// Number of held-out prompts.
pub const HELD_OUT: usize = 200;

/// Settings of a training run of the demo. With `full`, the student is trained over the KV of that frozen model.
pub fn training(student: &Path, full: Option<&Path>, data: &Path, out: &Path, steps: usize, seed: u64) -> TrainConfig {
    TrainConfig {
        student: student.into(),
        random_init: false,
        full: full.map(Into::into),
        full_weights: None,
        prompt_cache_bytes: 0,
        data: data.into(),
        out: out.into(),
        batch: BATCH,
        accumulate: 1,
        max_tokens: 2048,
        seed,
        shuffle: true,
        dtype: WeightDtype::F32,
        save_dtype: WeightDtype::F32,
        device: DeviceSpec::Cpu,
        optim: OptimConfig {
            learning_rate: 3e-3,
            beta1: 0.9,
            beta2: 0.98,
            eps: 1e-8,
            weight_decay: 0.01,
            clip: 1.0,
            warmup_steps: (steps as f64 * 0.06).ceil() as usize,
            total_steps: steps,
            final_share: 0.05,
        },
        checkpoint_every: 0,
        resume: false,
        stop_after: None,
        progress: true,
    }
}

/// Settings of the full model's first stage: from random weights, over `work/conversations.jsonl` in its order.
pub fn full_training(work: &Path, out: &Path, seed: u64) -> TrainConfig {
    let config = training(&work.join("full"), None, &work.join("conversations.jsonl"), out, FULL_STEPS.0, seed);
    TrainConfig { random_init: true, shuffle: false, ..config }
}

/// Settings of the full model's second stage, over `work/more-conversations.jsonl`.
pub fn full_training_goes_on(begun: &Path, work: &Path, out: &Path, seed: u64) -> TrainConfig {
    let mut config = training(begun, None, &work.join("more-conversations.jsonl"), out, FULL_STEPS.1, seed);
    config.optim.learning_rate = 2e-3;
    config
}

/// Settings that prune the full model to the decode model.
pub fn pruning(full: &Path, work: &Path, out: &Path) -> PruneConfig {
    PruneConfig {
        model: full.into(),
        out: out.into(),
        calibration: work.join("pairs.jsonl"),
        samples: 512,
        sample_tokens: 512,
        hidden: Width::Channels(DECODE_WIDTHS.0),
        intermediate: Width::Channels(DECODE_WIDTHS.1),
        multiple_of: 1,
        norm: Norm::L2,
        layers: None,
        device: DeviceSpec::Cpu,
        progress: true,
    }
}

/// Amount of data that the stages read.
pub fn data_config(seed: u64) -> DataConfig {
    DataConfig {
        seed,
        conversations: FULL_STEPS.0 * BATCH,
        more_conversations: MORE_CONVERSATIONS,
        pairs: DECODE_STEPS * BATCH,
        held_out: HELD_OUT,
    }
}

/// Scores a pair on the held-out prompts. Returns the scores of the full model alone and of the two stages.
pub fn score(full: &Path, decode: &Path, held_out: &Path) -> Result<(Score, Score)> {
    let (examples, _) = load(held_out, &load_text(full)?, usize::MAX)?;
    let texts = Texts::new(&examples, 50, None)?;
    let mut stages = Stages::load(full, Some(decode), &LoadOptions::default(), texts.kv_blocks())?;
    Ok((texts.score(&mut stages, Way::Alone)?, texts.score(&mut stages, Way::Draft)?))
}

/// Makes the demo pair: `out/full`, `out/decode`, and `out/scores.json` with both scores and the seconds of each stage.
pub fn make_pair(out: &Path, seed: u64) -> Result<()> {
    let (full, decode, work) = (out.join("full"), out.join("decode"), out.join("work"));
    let (begun, pruned) = (work.join("begun"), work.join("pruned"));
    data::write(&work, &data_config(seed))?;
    let started = Instant::now();
    train(&full_training(&work, &begun, seed)).context("training the full model")?;
    train(&full_training_goes_on(&begun, &work, &full, seed)).context("training the full model")?;
    let of_full = started.elapsed().as_secs_f64();
    prune(&pruning(&full, &work, &pruned)).context("cutting the decode model")?;
    let pairs = work.join("pairs.jsonl");
    train(&training(&pruned, Some(&full), &pairs, &decode, DECODE_STEPS, seed)).context("training the decode model")?;
    let of_decode = started.elapsed().as_secs_f64() - of_full;

    let (alone, draft) = score(&full, &decode, &work.join("held-out.jsonl"))?;
    let scores = json!({"full": alone, "draft": draft,
                        "seconds": {"full": of_full.round(), "decode": of_decode.round()}});
    println!("{scores:#}");
    folder::write_json(&out.join("scores.json"), &scores)?;
    for folder in [&full, &decode] {
        fs::remove_file(folder.join("loss.jsonl")).context("removing a loss log")?;
    }
    fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))
}
