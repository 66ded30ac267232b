//! Training on files: resuming, both modes, and evaluation of the result.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use std::{collections::HashMap, path::Path};

use candle_core::{Device, Tensor};
use overfill_distill::{
    demo::{data, recipe},
    eval::{Score, Stages, Texts, Way},
    examples,
    prune::{Width, prune},
    train::{TrainConfig, train},
};
use overfill_model::{LoadOptions, Provenance, WeightFormat, Weights};
use tempfile::TempDir;

/// Writes data and trains a full model for a few steps: still inaccurate, but with clear preferences between tokens.
fn world() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let sizes = data::DataConfig { seed: 5, conversations: 64, more_conversations: 0, pairs: 64, held_out: 12 };
    data::write(dir.path(), &sizes).unwrap();
    let config = quick(recipe::full_training(dir.path(), &dir.path().join("trained"), 5), 4);
    train(&config).unwrap();
    dir
}

fn quick(config: TrainConfig, steps: usize) -> TrainConfig {
    let mut config = TrainConfig { batch: 4, progress: false, ..config };
    config.optim.total_steps = steps;
    config.optim.warmup_steps = 1;
    config
}

fn tensors(folder: &Path) -> HashMap<String, Vec<u32>> {
    let bits = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect();
    let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
    tensors.iter().map(|(name, t)| (name.clone(), bits(t))).collect()
}

#[test]
fn a_resumed_run_equals_an_unbroken_one_bit_for_bit() {
    let dir = world();
    let (full, pairs) = (dir.path().join("trained"), dir.path().join("pairs.jsonl"));
    let at = |name: &str| dir.path().join(name);
    for over in [None, Some(full.as_path())] {
        let run = |out: &Path| TrainConfig {
            accumulate: 2,
            checkpoint_every: 3,
            ..quick(recipe::training(&full, over, &pairs, out, 7, 1), 7)
        };
        let mode = if over.is_some() { "over" } else { "alone" };
        let (whole, parts) = (at(&format!("whole-{mode}")), at(&format!("parts-{mode}")));
        train(&run(&whole)).unwrap();
        // Stops at step 4, one after the checkpoint. Step 4 is repeated.
        train(&TrainConfig { stop_after: Some(4), ..run(&parts) }).unwrap();
        // Cached KV of prompts changes nothing.
        train(&TrainConfig { resume: true, prompt_cache_bytes: 1 << 20, ..run(&parts) }).unwrap();
        assert_eq!(tensors(&whole), tensors(&parts));
        let log = |out: &Path| {
            let text = std::fs::read_to_string(out.join("loss.jsonl")).unwrap();
            let line = |l: &str| serde_json::from_str::<serde_json::Value>(l).unwrap();
            text.lines().map(line).map(|l| (l["step"].clone(), l["loss"].clone())).collect::<Vec<_>>()
        };
        assert_eq!(log(&whole), log(&parts));
        assert_eq!(log(&whole).len(), 7);

        let mut other = TrainConfig { resume: true, ..run(&parts) };
        other.optim.learning_rate *= 2.0;
        let refusal = train(&other).unwrap_err().to_string();
        assert!(refusal.contains("optimizer was"), "{refusal}");
        let narrow = TrainConfig { resume: true, full_weights: Some(WeightFormat::Bf16), ..run(&parts) };
        let refusal = train(&narrow).unwrap_err().to_string();
        let expected = if over.is_some() { "full_weights was \"f32\"" } else { "there is no full model" };
        assert!(refusal.contains(expected), "{refusal}");
    }
}

/// Two stages with the same model equal one stage.
#[test]
fn the_full_model_as_its_own_decoder_equals_the_full_model_token_for_token() {
    let dir = world();
    let full = dir.path().join("trained");
    let examples = examples(&dir.path().join("held-out.jsonl"), &full, 2048).unwrap();
    let texts = Texts::new(&examples, 12, None).unwrap();
    let mut stages = Stages::load(&full, Some(&full), &LoadOptions::default(), texts.kv_blocks()).unwrap();
    let answers = texts.answers(&mut stages).unwrap();
    let ways = [Way::Alone, Way::Draft, Way::Refresh, Way::Exact { drafts: 3 }];
    let measured = texts.measure(&mut stages, &ways, Some(&answers)).unwrap();
    for of_way in &measured {
        assert_eq!(of_way.agreement.as_ref().unwrap().common_prefix_share, 1.0);
        assert_eq!(of_way.score.exact_match, measured[0].score.exact_match);
        assert!((of_way.score.cross_entropy - measured[0].score.cross_entropy).abs() < 1e-4);
    }
    let drafting = measured[3].drafting.unwrap();
    assert!(drafting.accepted_tokens == drafting.drafted_tokens && drafting.drafted_tokens > drafting.verdicts);
}

/// An unpruned student, as for a variant of a task: it learns, and names the full model whose KV it attends to.
#[test]
fn the_full_model_may_be_the_student() {
    let dir = world();
    let (full, out) = (dir.path().join("trained"), dir.path().join("variant"));
    let config = quick(recipe::training(&full, Some(&full), &dir.path().join("pairs.jsonl"), &out, 12, 0), 12);
    train(&config).unwrap();
    let provenance = Provenance::from_folder(&out).unwrap().unwrap();
    let named = provenance.full_model.unwrap();
    assert_eq!(named.fingerprint, Some(Weights::open(&full).unwrap().fingerprint().unwrap()));
    assert!(provenance.kept_layers.is_none() && tensors(&out) != tensors(&full));
    let examples = examples(&dir.path().join("held-out.jsonl"), &full, 2048).unwrap();
    let texts = Texts::new(&examples, 12, None).unwrap();
    let mut stages = Stages::load(&full, Some(&out), &LoadOptions::default(), texts.kv_blocks()).unwrap();
    let [before, after] = [Way::Alone, Way::Draft].map(|way| texts.score(&mut stages, way).unwrap());
    assert!(after.cross_entropy < before.cross_entropy, "{before:?} {after:?}");
}

/// A pruned model that was fine-tuned over its own KV no longer goes with the full model that it was cut from.
#[test]
fn a_pruned_model_that_learns_alone_is_served_alone() {
    let dir = world();
    let (full, pruned, out) = (dir.path().join("trained"), dir.path().join("pruned"), dir.path().join("alone"));
    let mut pruning = recipe::pruning(&full, dir.path(), &pruned);
    (pruning.samples, pruning.progress, pruning.hidden) = (8, false, Width::Ratio(0.45));
    pruning.layers = Some(vec![0, 2]);
    prune(&pruning).unwrap();
    train(&quick(recipe::training(&pruned, None, &dir.path().join("pairs.jsonl"), &out, 3, 0), 3)).unwrap();
    let refused = |folder: &Path| Stages::load(folder, Some(folder), &LoadOptions::default(), 16).err();
    assert!(refused(&pruned).unwrap().to_string().contains("kv schema mismatch"));
    assert!(refused(&out).is_none());
}

#[test]
fn a_pruned_model_learns_under_the_full_models_kv() {
    let dir = world();
    let (full, pruned, out) = (dir.path().join("trained"), dir.path().join("pruned"), dir.path().join("decode"));
    let mut pruning = recipe::pruning(&full, dir.path(), &pruned);
    (pruning.samples, pruning.progress, pruning.hidden) = (8, false, Width::Ratio(0.45));
    pruning.layers = Some(vec![0, 2]);
    let kept = prune(&pruning).unwrap();
    assert_eq!((kept.hidden.len(), kept.layers.as_slice()), (35, [0, 2].as_slice()));
    let config = quick(recipe::training(&pruned, Some(&full), &dir.path().join("pairs.jsonl"), &out, 12, 0), 12);
    let examples = examples(&dir.path().join("held-out.jsonl"), &full, 2048).unwrap();
    let score = |decode: &Path| -> Score {
        let texts = Texts::new(&examples, 12, None).unwrap();
        let blocks = texts.kv_blocks();
        let mut stages = Stages::load(&full, Some(decode), &LoadOptions::default(), blocks).unwrap();
        texts.score(&mut stages, Way::Draft).unwrap()
    };
    let before = score(&pruned);
    train(&config).unwrap();
    let after = score(&out);
    assert!(after.cross_entropy < before.cross_entropy, "{before:?} {after:?}");
}

/// As nodes serve it: weights and KV in bf16.
#[test]
fn a_student_learns_under_a_full_model_in_bf16() {
    let dir = world();
    let (full, pairs) = (dir.path().join("trained"), dir.path().join("pairs.jsonl"));
    let loss = |weights| {
        let out = dir.path().join(format!("under-{weights}"));
        let config = TrainConfig {
            full_weights: Some(weights),
            prompt_cache_bytes: 1 << 20,
            ..quick(recipe::training(&full, Some(&full), &pairs, &out, 3, 1), 3)
        };
        train(&config).unwrap().loss
    };
    let (exact, narrow) = (loss(WeightFormat::F32), loss(WeightFormat::Bf16));
    assert!(exact != narrow && (exact - narrow).abs() < 0.05 * exact, "{exact} {narrow}");
    let config = recipe::training(&full, Some(&full), &pairs, &dir.path().join("refused"), 3, 1);
    let refusal = train(&TrainConfig { full_weights: Some(WeightFormat::Int8), ..config }).unwrap_err().to_string();
    assert!(refusal.contains("full_weights is int8, supported: f32, bf16, f16"), "{refusal}");
}

#[test]
fn bf16_trains_too() {
    let dir = world();
    let config = quick(recipe::full_training(dir.path(), &dir.path().join("bf16"), 1), 2);
    let config = TrainConfig {
        dtype: overfill_model::WeightDtype::Bf16,
        save_dtype: overfill_model::WeightDtype::Bf16,
        ..config
    };
    assert!(train(&config).unwrap().loss.is_finite());
}
