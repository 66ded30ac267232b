//! Pruning of the golden models: compares the kept channels with NumPy, and checks the written folder.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use candle_core::{Device, Tensor};
use overfill_distill::prune::{Norm, PruneConfig, Width, prune};
use overfill_model::{DeviceSpec, ModelConfig, Provenance, Weights};
use overfill_text::{TextFiles, TextModel};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

fn golden(pair: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(pair).join("full")
}

const TEXTS: [&str; 5] = [
    "The quick brown fox jumps over the lazy dog, 42 times.",
    "Pruning by width leaves layers, heads and the KV cache as they are.",
    "zażółć gęślą jaźń",
    "one two three four five six seven eight nine ten eleven twelve",
    "fn main() { println!(\"{}\", 1 + 1); }",
];

fn config(model: &Path, folder: &Path, norm: Norm) -> PruneConfig {
    let calibration = folder.join("calibration.jsonl");
    let lines: Vec<String> = TEXTS.iter().map(|t| json!({ "text": t }).to_string()).collect();
    std::fs::write(&calibration, lines.join("\n")).unwrap();
    PruneConfig {
        model: model.into(),
        out: folder.join("pruned"),
        calibration,
        samples: 512,
        sample_tokens: 24,
        hidden: Width::Ratio(0.45),
        intermediate: Width::Ratio(0.45),
        multiple_of: 1,
        norm,
        layers: None,
        device: DeviceSpec::Cpu,
        progress: false,
    }
}

/// Returns `OVERFILL_PYTHON` or `python3`, if it has NumPy.
fn python() -> Option<String> {
    let python = std::env::var("OVERFILL_PYTHON").unwrap_or_else(|_| "python3".into());
    let found = Command::new(&python).args(["-c", "import numpy"]).stderr(Stdio::null()).status();
    found.is_ok_and(|status| status.success()).then_some(python)
}

#[test]
fn kept_channels_equal_those_of_numpy() {
    let Some(python) = python() else {
        // CI sets the variable, so that a missing NumPy fails there instead of being skipped.
        assert!(std::env::var("OVERFILL_PYTHON").is_err(), "OVERFILL_PYTHON is set but has no NumPy");
        eprintln!("SKIPPED kept_channels_equal_those_of_numpy: no python3 with numpy; set OVERFILL_PYTHON");
        return;
    };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/importance.py");
    for (pair, norm) in [
        ("llama-untied", Norm::L2),
        ("llama-tied", Norm::L2),
        ("llama-depth", Norm::L1),
        ("qwen2", Norm::L2),
        ("qwen3", Norm::L1),
    ] {
        let (model, folder) = (golden(pair), tempfile::tempdir().unwrap());
        let kept = prune(&config(&model, folder.path(), norm)).unwrap();
        let text = TextModel::from_files(&TextFiles::from_folder(&model).unwrap()).unwrap();
        let samples: Vec<Vec<u32>> =
            TEXTS.iter().map(|t| text.encode(t, true).unwrap().into_iter().take(24).collect()).collect();
        let task = json!({"samples": samples, "hidden": kept.hidden.len(), "intermediate": kept.intermediate[0].len(),
                          "norm": norm.to_string()});
        let mut child = Command::new(&python)
            .arg(&script)
            .arg(&model)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(task.to_string().as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{pair}");
        let expected: Value = serde_json::from_slice(&output.stdout).unwrap();
        let intermediate: Vec<_> = kept.intermediate.iter().map(|c| c.to_vec()).collect();
        assert_eq!(json!({"hidden": *kept.hidden, "intermediate": intermediate}), expected, "{pair}");
    }
}

fn load(folder: &Path, name: &str) -> Tensor {
    let weights = Weights::open(folder).unwrap();
    weights.load(name, &weights.info(name).unwrap().shape, &Device::Cpu).unwrap()
}

fn rows(tensor: &Tensor) -> Vec<Vec<f32>> {
    tensor.to_dtype(candle_core::DType::F32).unwrap().to_vec2().unwrap()
}

#[test]
fn the_folder_holds_the_kept_part_of_every_tensor() {
    let (model, folder) = (golden("llama-untied"), tempfile::tempdir().unwrap());
    let mut config = config(&model, folder.path(), Norm::L2);
    let layers = ModelConfig::from_folder(&model).unwrap().num_hidden_layers as u32;
    config.layers = Some((1..layers).collect());
    config.multiple_of = 4;
    let kept = prune(&config).unwrap();
    let out = &config.out;

    let (full, pruned) = (ModelConfig::from_folder(&model).unwrap(), ModelConfig::from_folder(out).unwrap());
    assert_eq!(pruned.hidden_size, (full.hidden_size as f64 * 0.55) as usize / 4 * 4);
    assert_eq!((pruned.head_dim, pruned.num_hidden_layers as u32), (full.head_dim, layers - 1));
    let weights = Weights::open(out).unwrap();
    for (name, shape) in pruned.tensor_shapes() {
        let stored = Weights::open(&model).unwrap().info("model.norm.weight").unwrap().dtype;
        let info = weights.info(&name).unwrap_or_else(|| panic!("{name} is missing"));
        assert_eq!((info.shape, info.dtype), (shape, stored), "{name}");
    }
    let pick = |tensor: &Tensor, by_row: &[u32], by_column: &[u32]| {
        let all = rows(tensor);
        let cut = |r: &u32| by_column.iter().map(|c| all[*r as usize][*c as usize]).collect::<Vec<_>>();
        by_row.iter().map(cut).collect::<Vec<_>>()
    };
    let name = |layer: u32| format!("model.layers.{layer}.mlp.down_proj.weight");
    assert_eq!(rows(&load(out, &name(0))), pick(&load(&model, &name(1)), &kept.hidden, &kept.intermediate[0]));
    let every: Vec<u32> = (0..full.vocab_size as u32).collect();
    assert_eq!(rows(&load(out, "lm_head.weight")), pick(&load(&model, "lm_head.weight"), &every, &kept.hidden));

    let provenance = Provenance::from_folder(out).unwrap().unwrap();
    assert_eq!(provenance.kept_layers, Some(kept.layers.clone()));
    assert_eq!(provenance.hidden_channels.as_deref(), Some(kept.hidden.as_slice()));
    let source = provenance.full_model.unwrap();
    assert_eq!(source.fingerprint, Some(Weights::open(&model).unwrap().fingerprint().unwrap()));
    for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"] {
        assert_eq!(std::fs::read(out.join(file)).unwrap(), std::fs::read(model.join(file)).unwrap(), "{file}");
    }
}

/// Copies a golden folder with all layers' matrices in fp8, or with what these matrices mean.
fn copied(from: &Path, to: &Path, quantised: bool) {
    for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"] {
        std::fs::copy(from.join(file), to.join(file)).unwrap();
    }
    let mut config: Value = serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
    let mut stored = Vec::new();
    let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    for (index, (name, shape)) in ModelConfig::from_folder(from).unwrap().tensor_shapes().into_iter().enumerate() {
        let (count, scale) = (shape.iter().product::<usize>(), 0.0625 * (index + 1) as f32);
        if shape.len() == 1 || !name.contains("layers") {
            let values: Vec<f32> = load(from, &name).flatten_all().unwrap().to_vec1().unwrap();
            stored.push((name, Dtype::F32, shape, bytes(&values)));
        } else if quantised {
            // Numbers from 1 to 1.875, negative in two of three places.
            let number = |i: usize| (0x38 + i * 7 % 8) as u8 | if i.is_multiple_of(3) { 0 } else { 0x80 };
            stored.push((name.clone() + "_scale", Dtype::F32, vec![], scale.to_le_bytes().into()));
            stored.push((name, Dtype::F8_E4M3, shape, (0..count).map(number).collect()));
        } else {
            let number = |i: usize| (1.0 + (i * 7 % 8) as f32 / 8.0) * if i.is_multiple_of(3) { scale } else { -scale };
            stored.push((name, Dtype::F32, shape, bytes(&(0..count).map(number).collect::<Vec<_>>())));
        }
    }
    if quantised {
        config["quantization_config"] = json!({"quant_method": "fp8", "activation_scheme": "dynamic"});
    }
    std::fs::write(to.join("config.json"), config.to_string()).unwrap();
    let view = |(name, dtype, shape, bytes)| (name, TensorView::new(dtype, shape, bytes).unwrap());
    let views =
        stored.iter().map(|(name, dtype, shape, bytes)| view((name.as_str(), *dtype, shape.clone(), bytes.as_slice())));
    safetensors::serialize_to_file(views, None, &to.join("model.safetensors")).unwrap();
}

#[test]
fn a_quantised_model_is_pruned_as_its_dequantised_one() {
    let pruned = [true, false].map(|quantised| {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        std::fs::create_dir(&model).unwrap();
        copied(&golden("llama-untied"), &model, quantised);
        let config = config(&model, folder.path(), Norm::L2);
        prune(&config).unwrap();
        let read = |file: &str| std::fs::read(config.out.join(file)).unwrap();
        (read("model.safetensors"), serde_json::from_slice::<Value>(&read("config.json")).unwrap())
    });
    assert_eq!(pruned[0].1, pruned[1].1);
    assert!(pruned[0].0 == pruned[1].0 && pruned[0].1.get("quantization_config").is_none());
}

#[test]
fn a_plain_text_calibrates_too_and_errors_name_the_field() {
    let (model, folder) = (golden("qwen2"), tempfile::tempdir().unwrap());
    let mut config = config(&model, folder.path(), Norm::L2);
    config.calibration = folder.path().join("text.txt");
    std::fs::write(&config.calibration, TEXTS.join("\n")).unwrap();
    prune(&config).unwrap();
    // Biases of q, k and v are per head, and heads are not pruned.
    assert_eq!(
        load(&config.out, "model.layers.0.self_attn.q_proj.bias").dims(),
        load(&model, "model.layers.0.self_attn.q_proj.bias").dims()
    );
    let fault = |change: &dyn Fn(&mut PruneConfig)| {
        let mut config = config.clone();
        change(&mut config);
        prune(&config).unwrap_err().to_string()
    };
    assert!(fault(&|c| c.layers = Some(vec![0, 99])).contains("layers must be ascending and below"));
    assert!(fault(&|c| c.hidden = Width::Channels(9999)).contains("hidden: 9999 channels of"));
    std::fs::write(&config.calibration, "").unwrap();
    assert!(fault(&|_| ()).contains("no text to calibrate on"));
}
