//! The golden pairs of all families in the tools: pruning and fine-tuning work, and training computes the loss that the
//! serving engine computes.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use std::path::{Path, PathBuf};

use overfill_distill::{
    demo::recipe,
    eval::{Stages, Texts, Way},
    examples,
    prune::{Width, prune},
    train::{TrainConfig, train},
};
use overfill_model::{LoadOptions, ModelConfig, WeightFormat, Weights};
use serde_json::json;

const PAIRS: [&str; 7] = ["mistral", "gemma2", "gemma3", "phi3", "smollm3", "olmo2", "granite"];

fn golden(pair: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(pair)
}

#[test]
fn every_family_is_pruned_and_fine_tuned() {
    for pair in PAIRS {
        let (full, dir) = (golden(pair).join("full"), tempfile::tempdir().unwrap());
        let at = |name: &str| dir.path().join(name);
        let text = "The river runs past the old mill and under three bridges before it meets the sea. ";
        let line = |i: usize| {
            let (prompt, response) = (text.repeat(1 + i % 2), format!("It meets {} bridges.", i * 7));
            json!({"prompt": prompt, "response": response}).to_string()
        };
        let data = (0..8).map(line).collect::<Vec<_>>().join("\n");
        std::fs::write(at("pairs.jsonl"), data).unwrap();
        let mut pruning = recipe::pruning(&full, dir.path(), &at("pruned"));
        pruning.calibration = at("pairs.jsonl");
        (pruning.samples, pruning.sample_tokens, pruning.progress) = (8, 64, false);
        (pruning.hidden, pruning.intermediate) = (Width::Ratio(0.4), Width::Ratio(0.4));
        let layers = ModelConfig::from_folder(&full).unwrap().num_hidden_layers as u32;
        pruning.layers = Some((0..layers).filter(|layer| *layer != 1).collect());
        let kept = prune(&pruning).unwrap();
        // Channels have different importance: the first ones are not kept.
        assert_ne!(kept.hidden, (0..kept.hidden.len() as u32).collect::<Vec<_>>(), "{pair}");
        let config = ModelConfig::from_folder(&at("pruned")).unwrap();
        let weights = Weights::open(&at("pruned")).unwrap();
        config.tensor_shapes().iter().for_each(|(name, shape)| weights.check(name, shape).unwrap());

        let mut training: TrainConfig =
            recipe::training(&at("pruned"), Some(&full), &at("pairs.jsonl"), &at("decode"), 12, 0);
        (training.batch, training.progress, training.optim.warmup_steps) = (8, false, 1);
        (training.optim.total_steps, training.optim.learning_rate, training.max_tokens) = (12, 3e-3, 512);
        // As the engine below. By default, the full model has the type of its checkpoint, which is bf16 for some.
        training.full_weights = Some(WeightFormat::F32);
        train(&training).unwrap();
        let log = std::fs::read_to_string(at("decode").join("loss.jsonl")).unwrap();
        let loss = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64().unwrap();
        let losses: Vec<f64> = log.lines().map(loss).collect();
        assert!(losses.len() == 12 && losses[11] < losses[0] - 0.05, "{pair}: {losses:?}");
        // All examples are in the first step, so its loss is the pruned model's cross-entropy.
        let examples = examples(&at("pairs.jsonl"), &full, 512).unwrap();
        let texts = Texts::new(&examples, 8, None).unwrap();
        let score = |decode: &Path| {
            let mut stages = Stages::load(&full, Some(decode), &LoadOptions::default(), texts.kv_blocks()).unwrap();
            texts.score(&mut stages, Way::Draft).unwrap().cross_entropy
        };
        let (before, after) = (score(&at("pruned")), score(&at("decode")));
        assert!((before - losses[0]).abs() < 1e-3, "{pair}: {before} nats before, a loss of {}", losses[0]);
        assert!(after < losses[11], "{pair}: {after} nats after, {losses:?}");
    }
}
