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

/// The three kept matrices of a folder, as its own files give them, are those of `expected`.
fn assert_kept(folder: &Path, expected: &[(String, Tensor)]) {
    let weights = Weights::open(folder).unwrap();
    assert_eq!(expected.len(), 3);
    for (name, expected) in expected {
        let got = weights.load(name, expected.dims(), &Device::Cpu).unwrap();
        assert_eq!(values(&got), values(expected), "{name}");
    }
}

fn kept(name: &str) -> Vec<(String, Tensor)> {
    let all = load(case(name).join("expected.safetensors"), &Device::Cpu).unwrap();
    all.into_iter().filter(|(name, _)| name != "logits").collect()
}

/// A copy of a case without `quantization_config`, and what that was.
fn bare(name: &str) -> (TempDir, Value) {
    let (from, folder) = (case(name), tempfile::tempdir().unwrap());
    let mut config: Value = serde_json::from_slice(&fs::read(from.join("config.json")).unwrap()).unwrap();
    let settings = config["quantization_config"].take();
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    fs::copy(from.join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
    (folder, settings)
}

/// AutoGPTQ writes the same settings to a file of its own, in earlier versions without `quant_method`, and to no other.
#[test]
fn settings_of_gptq_may_be_in_a_file_of_their_own() {
    for name in ["gptq-4", "gptq-4-order", "gptq-8-v2"] {
        let (folder, mut settings) = bare(name);
        let file = folder.path().join("quantize_config.json");
        settings.as_object_mut().unwrap().remove("quant_method");
        fs::write(&file, settings.to_string()).unwrap();
        assert_kept(folder.path(), &kept(name));
        settings["bits"] = json!(3);
        fs::write(&file, settings.to_string()).unwrap();
        let error = Weights::open(folder.path()).err().unwrap().to_string();
        assert!(error.ends_with("quantize_config.json: bits is 3, supported: 4, 8"), "{error}");
    }
}

/// Model Optimizer stores fp8 as `fp8-tensor` has it, and leaves the modules of `exclude_modules` as they are. Its settings are
/// in hf_quant_config.json, and in config.json too since version 0.31.
#[test]
fn fp8_of_model_optimizer() {
    let (folder, _) = bare("fp8-tensor");
    let file = folder.path().join("hf_quant_config.json");
    let write = |quantization: Value| {
        let settings = json!({"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": quantization});
        fs::write(&file, settings.to_string()).unwrap();
    };
    write(json!({"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}));
    assert_kept(folder.path(), &kept("fp8-tensor"));
    write(json!({"quant_algo": "NVFP4", "kv_cache_quant_algo": null, "group_size": 16}));
    let error = Weights::open(folder.path()).err().unwrap().to_string();
    assert!(error.ends_with("hf_quant_config.json: quantization.quant_algo is \"NVFP4\", supported: FP8"), "{error}");

    let file = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    config["quantization_config"] = json!({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"weights": {"dynamic": false, "num_bits": 8, "type": "float"}, "targets": ["Linear"]}}});
    fs::write(&file, config.to_string()).unwrap();
    assert_kept(folder.path(), &kept("fp8-tensor"));
}

/// Layer 0 of one case and layer 1 of another, with the groups of both.
fn mixed(targets: [Value; 2], ignore: Value) -> (TempDir, Vec<(String, Tensor)>) {
    let cases = ["compressed-float-tensor", "compressed-packed-4-group"];
    // This case has the names of a model of text and images.
    let plain = |name: &str| name.replace("model.language_model.", "model.");
    let layer = |name: &str| usize::from(name.contains(".layers.1."));
    let mut tensors = std::collections::HashMap::new();
    let mut expected = Vec::new();
    let mut groups = json!({});
    let (folder, mut settings) = bare(cases[0]);
    for (of, (name, targets)) in cases.into_iter().zip(targets).enumerate() {
        let (from, own) = bare(name);
        let stored = load(from.path().join("model.safetensors"), &Device::Cpu).unwrap();
        tensors.extend(stored.into_iter().map(|(name, t)| (plain(&name), t)).filter(|(name, _)| layer(name) == of));
        expected.extend(kept(name).into_iter().filter(|(name, _)| layer(name) == of));
        let mut group = own["config_groups"]["group_0"].clone();
        group["targets"] = targets;
        group["format"] = own["format"].clone();
        groups[format!("group_{of}")] = group;
    }
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
    settings["format"] = json!("mixed-precision");
    settings["config_groups"] = groups;
    settings["ignore"] = ignore;
    let file = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    config["quantization_config"] = settings;
    fs::write(&file, config.to_string()).unwrap();
    (folder, expected)
}

/// Names win over patterns, patterns over classes, and `ignore` over all.
#[test]
fn groups_of_compressed_tensors_apply_to_their_targets() {
    let all = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ];
    let names: Vec<String> = all.iter().map(|name| format!("model.layers.0.{name}")).collect();
    for targets in [
        [json!(["re:.*layers\\.0\\..*"]), json!(["re:.*layers\\.1\\.(self_attn|mlp)"])],
        [json!(["Linear"]), json!(["re:model.layers.1."])],
        [json!(["re:(?!.*layers.1).*proj$"]), json!(["Linear"])],
        [json!(names), json!(["re:model.layers.[01]"])],
    ] {
        let (folder, expected) = mixed(targets, json!(["lm_head"]));
        assert_kept(folder.path(), &expected);
    }
    // A pattern must match from the beginning of a name. Then the weights have no description.
    let q_proj = "model.layers.0.self_attn.q_proj.weight";
    for (first, ignore) in [(json!(["re:layers.0"]), json!([])), (json!(["Linear"]), json!(["re:.*q_proj"]))] {
        let (folder, _) = mixed([first, json!(["re:.*layers.1.*"])], ignore);
        let weights = Weights::open(folder.path()).unwrap();
        let error = weights.load(q_proj, &[32, 32], &Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("q_proj.weight is F8_E4M3, supported: "), "{error}");
    }
    for (targets, needle) in [
        (json!([]), "config_groups.group_0.targets is [], supported: names of modules"),
        (json!(["re:("]), "config_groups.group_0.targets is [\"re:(\"], supported: regular expressions"),
        (json!([1]), "config_groups.group_0.targets is [1], supported: a list of texts"),
    ] {
        let (folder, _) = mixed([targets, json!(["Linear"])], json!([]));
        let error = Weights::open(folder.path()).err().unwrap().to_string();
        assert!(error.contains(needle), "{error}");
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
