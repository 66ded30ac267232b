//! Quantised checkpoints give the weights and logits that PyTorch computes from them. `make.py` writes the checkpoints.

// The lint exempts `#[test]` functions, but not their shared helpers.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor, safetensors::load};
use overfill_kv::BlockId;
use overfill_model::{LoadOptions, Model, ModelConfig, ModelError, Outputs, SequenceSlice, Want, Weights, no_layers};
use serde_json::{Value, json};
use tempfile::TempDir;

fn cases() -> Vec<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/quantised");
    let mut folders: Vec<PathBuf> = fs::read_dir(here).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.retain(|path| path.is_dir());
    folders.sort();
    assert_eq!(folders.len(), 16);
    folders
}

fn case(name: &str) -> PathBuf {
    cases().into_iter().find(|folder| folder.ends_with(name)).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn matrices_are_dequantised_bit_by_bit() {
    for folder in cases() {
        let (config, weights) = (ModelConfig::from_folder(&folder).unwrap(), Weights::open(&folder).unwrap());
        let mut compared = 0;
        for (name, expected) in load(folder.join("expected.safetensors"), &Device::Cpu).unwrap() {
            if name == "logits" {
                continue;
            }
            compared += 1;
            let shape = expected.dims();
            let (expected, width) = (values(&expected), shape[1]);
            let what = format!("{} {name}", folder.display());
            assert_eq!(values(&weights.load(&name, shape, &Device::Cpu).unwrap()), expected, "{what}");
            let info = weights.info(&name).unwrap();
            assert_eq!((info.shape.as_slice(), info.dtype), (shape, safetensors::Dtype::F32), "{what}");
            for rows in [0..1, 3..shape[0] - 2, 5..5, shape[0] - 1..shape[0]] {
                let mut out = vec![f32::NAN; rows.len() * width];
                weights.read_rows(&name, shape, rows.clone(), &mut out).unwrap();
                assert_eq!(out, expected[rows.start * width..rows.end * width], "{what} {rows:?}");
            }
            let beyond = weights.read_rows(&name, shape, 1..shape[0] + 1, &mut vec![0.0; shape[0] * width]);
            assert!(beyond.unwrap_err().to_string().contains("rows 1.."), "{what}");
        }
        assert_eq!(compared, 3);
        for (name, shape) in config.tensor_shapes() {
            weights.check(&name, &shape).unwrap();
        }
    }
}

/// Copies a case with a tokenizer, so that it can be loaded as a model.
fn with_tokenizer(from: &Path) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/llama-untied/full");
    fs::copy(golden.join("tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(from.join(name), folder.path().join(name)).unwrap();
    }
    folder
}

#[test]
fn models_give_the_logits_of_their_dequantised_weights() {
    for folder in cases() {
        let expected = load(folder.join("expected.safetensors"), &Device::Cpu).unwrap().remove("logits").unwrap();
        let tokens: Vec<u32> = (0..expected.dims()[0] as u32).map(|i| (7 * i + 3) % 40).collect();
        let model = Model::load(with_tokenizer(&folder).path(), &LoadOptions::default(), 1).unwrap();
        let slice = SequenceSlice { tokens: &tokens, start: 0, blocks: &[BlockId(0)], want: Want::AllLogits };
        let mut out = Outputs::default();
        model.into_engine().run(&[slice], &no_layers(), &mut out).unwrap();
        let logits = out.logits();
        let got: Vec<f32> = (0..logits.rows()).flat_map(|row| logits.row(row).to_vec()).collect();
        let expected = values(&expected);
        assert_eq!(got.len(), expected.len());
        let largest = expected.iter().fold(0.0_f32, |largest, logit| largest.max(logit.abs()));
        let distance = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!("{}: {distance} of {largest}", folder.display());
        assert!(largest > 1.0 && distance < 1e-4 * largest, "{}: {distance} of {largest}", folder.display());
    }
}

/// What is written from a quantised model is plain, so the fields that describe its quantisation are gone.
#[test]
fn a_configuration_is_written_for_plain_weights() {
    let config = ModelConfig::from_folder(&case("awq")).unwrap();
    assert!(config.raw.contains_key("quantization_config"));
    assert_eq!(config.to_json().get("quantization_config"), None);
}

/// Copies a case with a changed `quantization_config` or a replaced tensor, and returns the error for layer 0's q_proj.
fn fault(name: &str, change: impl Fn(&mut Value), replaced: Option<(&str, &Tensor)>) -> String {
    let (from, folder) = (case(name), tempfile::tempdir().unwrap());
    let mut config: Value = serde_json::from_slice(&fs::read(from.join("config.json")).unwrap()).unwrap();
    change(&mut config["quantization_config"]);
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let (from, to) = (from.join("model.safetensors"), folder.path().join("model.safetensors"));
    match replaced {
        None => drop(fs::copy(from, to).unwrap()),
        Some((name, tensor)) => {
            let mut stored = load(from, &Device::Cpu).unwrap();
            stored.insert(name.into(), tensor.clone());
            candle_core::safetensors::save(&stored, to).unwrap();
        }
    }
    let read = || -> Result<(), ModelError> {
        let config = ModelConfig::from_folder(folder.path())?;
        let weights = Weights::open(folder.path())?;
        let (name, shape) =
            config.tensor_shapes().into_iter().find(|(name, _)| name.ends_with("q_proj.weight")).unwrap();
        weights.info(&name);
        weights.read_rows(&name, &shape, 0..1, &mut vec![0.0; shape[1]])
    };
    let error = read().unwrap_err().to_string();
    assert!(!error.contains('\n'), "{error}");
    error
}

#[test]
fn what_can_not_be_read_is_named_in_one_line() {
    for (case, field, value, needle) in [
        (
            "awq",
            "quant_method",
            json!("bitsandbytes"),
            "quant_method is \"bitsandbytes\", supported: fp8, fbgemm_fp8, comp",
        ),
        ("awq", "quant_method", Value::Null, "quantization_config.quant_method is null"),
        ("awq", "version", json!("gemv"), "quantization_config.version is \"gemv\", supported: gemm"),
        ("awq", "zero_point", json!(false), "quantization_config.zero_point is false, supported: true"),
        ("awq", "bits", json!(8), "quantization_config.bits is 8, supported: 4"),
        ("awq", "group_size", json!(0), "quantization_config.group_size is 0, supported: -1, or a whole number"),
        ("awq", "group_size", json!(1_u64 << 60), "group_size is 1152921504606846976"),
        // The scales are of another group size than the configuration says.
        ("awq", "group_size", json!(8), "q_proj.qzeros has shape [2, 4], the configuration asks for [4, 4]"),
        ("gptq-4", "bits", json!(3), "quantization_config.bits is 3, supported: 4, 8"),
        ("gptq-4", "bits", json!(8), "q_proj.qzeros has shape [2, 4], the configuration asks for [1, 8]"),
        ("gptq-4", "checkpoint_format", json!("marlin"), "checkpoint_format is \"marlin\", supported: gptq, gptq_v2"),
        ("gptq-4", "group_size", Value::Null, "quantization_config.group_size is null"),
        ("fp8-block", "fmt", json!("e5m2"), "quantization_config.fmt is \"e5m2\", supported: e4m3"),
        ("fp8-block", "weight_block_size", json!([20]), "weight_block_size is [20], supported: two whole numbers"),
        ("fp8-block", "weight_block_size", json!([0, 12]), "weight_block_size is [0,12]"),
        ("fp8-block", "weight_block_size", json!([10, 12]), "weight_scale_inv has shape [2, 3]"),
        (
            "compressed-int-group",
            "format",
            json!("nvfp4-pack-quantized"),
            "quantization_config.format is \"nvfp4-pack-q",
        ),
        ("compressed-int-group", "config_groups", json!({}), "config_groups is {}, supported: one group, or several"),
        ("compressed-int-group", "config_groups", json!([]), "config_groups is [], supported: an object"),
        ("compressed-int-group", "sparsity_config", json!({"format": "sparse-24-bitmask"}), "format is \"sparse-24"),
        ("compressed-int-group", "transform_config", json!({"config_groups": {}}), "transform_config is"),
    ] {
        let error = fault(case, |config| config[field] = value.clone(), None);
        assert!(
            error.contains(needle) && error.contains(if needle.contains("shape") { "model.saf" } else { "config.js" }),
            "{error}"
        );
    }
    for (case, field, value, needle) in [
        (
            "compressed-packed-4-group",
            "num_bits",
            json!(3),
            "config_groups.group_0.weights.num_bits is 3, supported: 4, 8",
        ),
        ("compressed-packed-4-group", "type", json!("float"), "weights.type is \"float\", supported: int"),
        ("compressed-packed-4-group", "strategy", json!("tensor_group"), "weights.strategy is \"tensor_group\""),
        ("compressed-packed-4-group", "group_size", json!("16"), "weights.group_size is \"16\""),
        ("compressed-packed-4-group", "symmetric", json!(false), "q_proj.weight_zero_point is missing"),
        ("compressed-float-block", "block_structure", Value::Null, "block_structure is null"),
        ("compressed-float-block", "symmetric", json!(false), "symmetric is false, supported: true"),
    ] {
        let error = fault(case, |config| config["config_groups"]["group_0"]["weights"][field] = value.clone(), None);
        assert!(error.contains(needle), "{error}");
    }
}

#[test]
fn tensors_that_do_not_fit_are_refused() {
    let q_proj = "model.layers.0.self_attn.q_proj";
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
    let index = |value: i64| Tensor::full(value, 32, &Device::Cpu).unwrap().to_dtype(DType::I32).unwrap();
    let shape = |rows: i64, columns: i64| Tensor::new(&[rows, columns], &Device::Cpu).unwrap();
    for (case, part, tensor, needle) in [
        ("gptq-4-order", "g_idx", index(4), "a value of model.layers.0.self_attn.q_proj.g_idx is 4, supported: 0 to 3"),
        ("gptq-4-order", "g_idx", zeros(&[31], DType::I32), "g_idx has shape [31]"),
        (
            "gptq-4-order",
            "scales",
            zeros(&[4, 32], DType::I32),
            "dtype of model.layers.0.self_attn.q_proj.scales is I32",
        ),
        ("gptq-4-order", "qweight", zeros(&[4, 32], DType::F32), "q_proj.qweight is F32, supported: I32"),
        ("gptq-4-order", "qweight", zeros(&[4], DType::I32), "q_proj.qweight is [4], supported: two dimensions"),
        ("gptq-4-order", "qweight", zeros(&[0, 32], DType::I32), "shape"),
        ("gptq-4-order", "qweight", zeros(&[4, 0], DType::I32), "shape"),
        ("fp8-tensor", "weight_scale", zeros(&[3], DType::F32), "weight_scale has shape [3]"),
        (
            "compressed-packed-8-channel",
            "weight_shape",
            shape(24, 37),
            "weight_shape is [24, 37], supported: [24, 33 to 36]",
        ),
        ("compressed-packed-8-channel", "weight_shape", shape(24, -1), "weight_shape is [24, -1]"),
        (
            "compressed-packed-8-channel",
            "weight_shape",
            shape(24, 35),
            "has shape [24, 35], the configuration asks for [24, 36]",
        ),
        ("compressed-packed-8-channel", "weight_zero_point", zeros(&[6, 1], DType::I64), "weight_zero_point is I64"),
    ] {
        let error = fault(case, |_| {}, Some((&format!("{q_proj}.{part}"), &tensor)));
        assert!(error.contains(needle), "{error}");
    }
    // fp8 without a configuration that describes it.
    let error = fault("fp8-tensor", |config| *config = Value::Null, None);
    assert!(error.contains("q_proj.weight is F8_E4M3, supported: BF16, F16, F32, F64; others with quant"), "{error}");
}

#[test]
fn other_files_of_weights_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let error = || Weights::open(folder.path()).err().unwrap().to_string();
    assert!(error().contains("model.safetensors: "), "{}", error());
    fs::write(folder.path().join("pytorch_model.bin"), "").unwrap();
    assert!(
        error().contains("the file of weights is pytorch_model.bin, supported: model.safetensors, "),
        "{}",
        error()
    );
}
