//! One step over the demo pair equals one step of the PyTorch recipe, examples/python/train.py.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use std::path::{Path, PathBuf};

use candle_core::Device;
use overfill_distill::{
    demo::recipe,
    train::{TrainConfig, train},
};
use serde_json::Value;

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// expected.json holds what `tests/recipe/make.py` computed. The optimiser's epsilon is 1, so the change of a parameter by
/// the first step is `g / (|g| + 1)`: it shows the size of the gradients, not only their sign.
#[test]
fn one_step_equals_one_step_of_pytorch() {
    let (student, dir) = (file("../demo/decode"), tempfile::tempdir().unwrap());
    let expected = json(&file("tests/recipe/expected.json"));
    let run = |name: &str, batch: usize, accumulate: usize| {
        let (full, pairs, out) = (file("../demo/full"), file("tests/recipe/pairs.jsonl"), dir.path().join(name));
        let mut config = TrainConfig {
            batch,
            accumulate,
            progress: false,
            ..recipe::training(&student, Some(&full), &pairs, &out, 1, 0)
        };
        let optim = &mut config.optim;
        (optim.learning_rate, optim.final_share, optim.warmup_steps) = (1.0, 1.0, 0);
        (optim.eps, optim.weight_decay, optim.clip) = (1.0, 0.0, 0.0);
        train(&config).unwrap();
        out
    };
    let load = |folder: &Path| candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
    let before = load(&student);
    for out in [run("whole", 6, 1), run("in-parts", 2, 3)] {
        let log = json(&out.join("loss.jsonl"));
        assert_eq!(log["tokens"], expected["tokens"]);
        let near = |got: f64, expected: f64, of: f64| (got - expected).abs() < of;
        let loss = expected["loss"].as_f64().unwrap();
        assert!(near(log["loss"].as_f64().unwrap(), loss, 1e-5 * loss), "{log} {loss}");
        let norm = expected["gradient_norm"].as_f64().unwrap();
        assert!(near(log["gradient_norm"].as_f64().unwrap(), norm, 1e-4 * norm), "{log} {norm}");
        let (after, changes) = (load(&out), expected["changes"].as_object().unwrap());
        assert_eq!(after.len(), changes.len());
        for (name, change) in changes {
            let values = |tensor: &candle_core::Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let pairs = values(&after[name]).into_iter().zip(values(&before[name]));
            let changed: Vec<f64> = pairs.map(|(after, before)| f64::from(after) - f64::from(before)).collect();
            let norm = changed.iter().map(|x| x * x).sum::<f64>().sqrt();
            let along = changed.iter().enumerate().map(|(i, x)| x * (0.7 * i as f64).cos()).sum::<f64>();
            let of = |field: &str| change[field].as_f64().unwrap();
            // Weights of about 1 have rounding errors of 1e-7 each.
            let rounding = 1e-3 * of("norm") + 1e-7 * (changed.len() as f64).sqrt();
            assert!(near(norm, of("norm"), rounding), "{name}: {norm}, expected {change}");
            assert!(near(along, of("along"), rounding), "{name}: {along}, expected {change}");
        }
    }
}
