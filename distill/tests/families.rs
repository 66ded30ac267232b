//! The golden pairs of all families in the tools: dense attention generates what transformers generates, and pruning and
//! fine-tuning work.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use overfill_distill::{
    demo::recipe,
    eval::Arm,
    prune::{Width, prune},
    train::{TrainConfig, train},
};
use overfill_model::{ModelConfig, Weights};
use serde::Deserialize;
use serde_json::json;

const PAIRS: [&str; 7] = ["mistral", "gemma2", "gemma3", "phi3", "smollm3", "olmo2", "granite"];

#[derive(Deserialize)]
struct Expected {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    prompt: Vec<u32>,
    two_stage: Vec<Step>,
}

#[derive(Deserialize)]
struct Step {
    token: u32,
    top: Vec<(u32, f32)>,
}

fn golden(pair: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(pair)
}

#[test]
fn two_stages_generate_what_transformers_generates() {
    for pair in PAIRS {
        let folder = golden(pair);
        let cases = |file: &str| {
            let expected: Expected = serde_json::from_slice(&std::fs::read(folder.join(file)).unwrap()).unwrap();
            expected.cases
        };
        let arm = Arm::two_stage(&folder.join("full"), &folder.join("decode"), DType::F32, &Device::Cpu).unwrap();
        // Prompts of different lengths in one batch: some are padded.
        let cases: Vec<Case> = cases("expected.json")
            .into_iter()
            .chain(cases("long.json"))
            .filter(|case| case.prompt.len() <= 300)
            .collect();
        let prompts: Vec<&[u32]> = cases.iter().map(|case| case.prompt.as_slice()).collect();
        let outputs = arm.generate(&prompts, &vec![24; prompts.len()]).unwrap();
        let mut same = 0;
        for (case, output) in cases.iter().zip(&outputs) {
            for (step, token) in case.two_stage.iter().zip(output) {
                if step.top[0].1 - step.top[1].1 < 0.02 && *token != step.token {
                    break;
                }
                assert_eq!(*token, step.token, "{pair}, a prompt of {} tokens", case.prompt.len());
                same += 1;
            }
        }
        assert!(same > 24 * cases.len() / 2, "{pair}: {same} tokens");
    }
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
        train(&training).unwrap();
        let log = std::fs::read_to_string(at("decode").join("loss.jsonl")).unwrap();
        let loss = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64().unwrap();
        let losses: Vec<f64> = log.lines().map(loss).collect();
        assert!(losses.len() == 12 && losses[11] < losses[0] - 0.05, "{pair}: {losses:?}");
        Arm::two_stage(&full, &at("decode"), DType::F32, &Device::Cpu).unwrap();
    }
}
