//! GGUF files give the same results as the safetensors folders that they were written from.

// The lint exempts `#[test]` functions, but not their shared helpers.
#![allow(clippy::unwrap_used)]

mod hostile;
mod text;
mod write;

use std::{
    fs,
    path::{Path, PathBuf},
};

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file::Value},
};
use overfill_kv::BlockId;
use overfill_model::{LoadOptions, Model, ModelConfig, Outputs, RopeScaling, SequenceSlice, Want, Weights, no_layers};
use serde_json::json;
use tempfile::TempDir;
use write::{Parts, parts};

fn golden(pair: &str, which: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(pair).join(which)
}

fn here(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gguf").join(name)
}

/// Writes `parts` as the only file of a new folder.
fn written(parts: &Parts) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    parts.write(&folder.path().join("model.gguf"));
    folder
}

/// Logits of every token of a prompt.
fn logits(model: Model) -> Vec<f32> {
    let tokens: Vec<u32> = (0..40).map(|i| (i * 37 + 11) % 320).collect();
    let blocks = [BlockId(0), BlockId(1), BlockId(2)];
    let slice = SequenceSlice { tokens: &tokens, start: 0, blocks: &blocks, want: Want::AllLogits };
    let mut out = Outputs::default();
    model.into_engine().run(&[slice], &no_layers(), &mut out).unwrap();
    let logits = out.logits();
    (0..logits.rows()).flat_map(|row| logits.row(row).to_vec()).collect()
}

/// Relative distance between the logits of folder and file.
fn compare(folder: &Path, parts: &Parts) -> f32 {
    let file = written(parts);
    let options = LoadOptions::default();
    let expected = logits(Model::load(folder, &options, 3).unwrap());
    let got = logits(Model::load(file.path(), &options, 3).unwrap());
    let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>();
    let distance = squares(&mut expected.iter().zip(&got).map(|(a, b)| a - b));
    (distance / squares(&mut expected.iter().copied())).sqrt()
}

#[test]
fn the_stored_type_gives_the_same_logits() {
    for (pair, which, dtype, limit) in [
        ("llama-untied", "full", GgmlDType::F32, 0.0),
        ("llama-untied", "decode", GgmlDType::F32, 0.0),
        ("qwen2", "full", GgmlDType::BF16, 0.0),
        ("qwen3", "full", GgmlDType::F16, 0.0),
        ("qwen3", "decode", GgmlDType::F16, 0.0),
        // The converter computes factors by dividing frequencies; the loader divides again, which adds rounding.
        ("llama-tied", "full", GgmlDType::BF16, 2e-4),
        ("llama-tied", "decode", GgmlDType::BF16, 2e-4),
    ] {
        let folder = golden(pair, which);
        let distance = compare(&folder, &parts(&folder, dtype));
        println!("{pair}/{which} {dtype:?}: {distance}");
        assert!(distance <= limit, "{pair}/{which} {dtype:?}: {distance}");
    }
}

/// A copy of a golden model with some fields of its config.json changed.
fn edited(pair: &str, fields: &serde_json::Value) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(golden(pair, "full")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    let file = copy.path().join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    fs::write(&file, config.to_string()).unwrap();
    copy
}

/// What metadata can't state is changed to what llama.cpp assumes: Gemma's scale of scores, and which of SmolLM3's layers
/// have no rotation.
#[test]
fn families_are_read_as_the_folders_that_they_were_made_from() {
    let dtype = GgmlDType::BF16;
    for (pair, fields, limit) in [
        ("mistral", json!({}), 0.0),
        // The 1 that the converter adds to norms is taken away again.
        ("gemma2", json!({"query_pre_attn_scalar": 16}), 1e-5),
        ("gemma3", json!({"query_pre_attn_scalar": 16}), 1e-5),
        ("phi3", json!({}), 0.0),
        ("smollm3", json!({"no_rope_layers": [1, 1, 1, 0]}), 0.0),
        ("olmo2", json!({}), 0.0),
        // Factors are f32.
        ("granite", json!({}), 1e-5),
    ] {
        let folder = edited(pair, &fields);
        let parts = parts(folder.path(), dtype);
        let distance = compare(folder.path(), &parts);
        println!("{pair} {dtype:?}: {distance}");
        assert!(distance <= limit, "{pair} {dtype:?}: {distance}");
        // A pair may have one model of each kind.
        let options = LoadOptions::default();
        let of_folder = Model::load(folder.path(), &options, 1).unwrap();
        let file = written(&parts);
        fs::copy(folder.path().join("tokenizer.json"), file.path().join("tokenizer.json")).unwrap();
        let of_file = Model::load(file.path(), &options, 1).unwrap();
        of_folder.producer_schema().check_consumer(&of_file.kv_schema()).unwrap();
        assert_eq!(of_file.config().layers.len(), of_folder.config().layers.len());
        for (a, b) in of_file.config().layers.iter().zip(&of_folder.config().layers) {
            assert_eq!((a.rope, a.window, a.score_cap), (b.rope, b.window, b.score_cap), "{pair}");
        }
        // What pruning writes is the same model.
        let config = of_file.config();
        let again = ModelConfig::from_json(Path::new("config.json"), config.to_json()).unwrap();
        assert_eq!((&again.layers, &again.ropes, &again.scales), (&config.layers, &config.ropes, &config.scales));
    }
}

#[test]
fn gemma_27b_has_a_scale_of_its_own() {
    for (pair, layers, scalar) in [("gemma2", 46, 144.0_f64), ("gemma3", 62, 168.0)] {
        let mut parts = parts(&golden(pair, "full"), GgmlDType::F16);
        parts.set(&format!("{pair}.block_count"), Value::U32(layers));
        let config = ModelConfig::from_folder(written(&parts).path()).unwrap();
        assert_eq!(config.layers[0].score_scale, Some(scalar.sqrt().recip()));
    }
}

#[test]
fn quantised_weights_stay_near() {
    for (pair, dtype, limit) in [
        ("llama-untied", GgmlDType::F16, 0.005),
        ("llama-untied", GgmlDType::BF16, 0.03),
        ("llama-untied", GgmlDType::Q8_0, 0.05),
        ("llama-untied", GgmlDType::Q4_0, 0.5),
        ("qwen3", GgmlDType::Q8_0, 0.05),
    ] {
        let folder = golden(pair, "full");
        let distance = compare(&folder, &parts(&folder, dtype));
        println!("{pair} {dtype:?}: {distance}");
        // A distance of 0 would mean that something else was read. Rows in the wrong order give more than 1.
        assert!(distance > 0.0 && distance <= limit, "{pair} {dtype:?}: {distance}");
    }
}

/// For every format, and for safetensors: row ranges of every tensor equal the rows that `load` returns.
#[test]
fn rows_are_parts_of_the_tensor() {
    let folder = golden("llama-untied", "full");
    let files: Vec<TempDir> = [GgmlDType::F32, GgmlDType::F16, GgmlDType::BF16, GgmlDType::Q8_0, GgmlDType::Q5_1]
        .iter()
        .map(|dtype| written(&parts(&folder, *dtype)))
        .collect();
    let f16_folder = golden("qwen3", "full");
    let bf16_folder = golden("qwen2", "full");
    for path in files.iter().map(TempDir::path).chain([folder.as_path(), &f16_folder, &bf16_folder]) {
        let (config, weights) = (ModelConfig::from_folder(path).unwrap(), Weights::open(path).unwrap());
        for (name, shape) in config.tensor_shapes() {
            let whole = weights.load(&name, &shape, &Device::Cpu).unwrap();
            let whole =
                whole.to_dtype(candle_core::DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let width = shape[1..].iter().product::<usize>();
            for rows in [0..shape[0], 0..1, 3..shape[0] - 2, 5..5, shape[0] - 1..shape[0]] {
                let mut out = vec![f32::NAN; rows.len() * width];
                weights.read_rows(&name, &shape, rows.clone(), &mut out).unwrap();
                assert_eq!(out, whole[rows.start * width..rows.end * width], "{name} {rows:?}");
            }
            let beyond = weights.read_rows(&name, &shape, 0..shape[0] + 1, &mut vec![0.0; (shape[0] + 1) * width]);
            assert!(beyond.unwrap_err().to_string().contains("rows 0.."));
        }
    }
}

/// Random blocks of every type, dequantised by the Python package of llama.cpp's repository; see make_reference.py.
#[test]
fn blocks_mean_what_the_reference_says() {
    let weights = Weights::open(&here("blocks.gguf")).unwrap();
    let names: Vec<&str> = weights.names().into_iter().filter(|name| !name.ends_with(".f32")).collect();
    assert_eq!(names, ["q2_k", "q3_k", "q4_0", "q4_1", "q4_k", "q5_0", "q5_1", "q5_k", "q6_k", "q8_0"]);
    for name in names {
        let shape = weights.info(name).unwrap().shape;
        let read = |name: &str| {
            let mut values = vec![f32::NAN; shape.iter().product()];
            weights.read_rows(name, &shape, 0..shape[0], &mut values).unwrap();
            values
        };
        for (got, expected) in read(name).into_iter().zip(read(&format!("{name}.f32"))) {
            assert!((got - expected).abs() <= 1e-5 * expected.abs().max(1.0), "{name}: {got}, not {expected}");
        }
    }
}

#[test]
fn the_configuration_is_that_of_the_folder() {
    for pair in ["llama-untied", "qwen2", "qwen3", "llama-tied"] {
        let folder = golden(pair, "full");
        let mut expected = ModelConfig::from_folder(&folder).unwrap();
        let file = written(&parts(&folder, GgmlDType::F32));
        let got = ModelConfig::from_folder(file.path()).unwrap();
        if let RopeScaling::Factors { .. } = got.ropes[0].scaling {
            assert_eq!(pair, "llama-tied");
            expected.ropes = got.ropes.clone();
        }
        expected.raw = got.raw.clone();
        assert_eq!(got, expected, "{pair}");
    }
}

#[test]
fn a_pair_agrees_by_its_rope_factors() {
    let options = LoadOptions::default();
    let load = |parts: &Parts| Model::load(written(parts).path(), &options, 1).unwrap();
    let full = parts(&golden("llama-tied", "full"), GgmlDType::BF16);
    let mut decode = parts(&golden("llama-tied", "decode"), GgmlDType::BF16);
    let schema = load(&full).producer_schema();
    schema.check_consumer(&load(&decode).kv_schema()).unwrap();

    // Changes the last bit of one factor.
    let (_, factors) = decode.tensors.pop().unwrap();
    let mut factors = factors.dequantize(&Device::Cpu).unwrap().to_vec1::<f32>().unwrap();
    factors[5] = factors[5].next_up();
    let tensor = Tensor::new(factors, &Device::Cpu).unwrap();
    decode.tensors.push(("rope_freqs.weight".into(), QTensor::quantize(&tensor, GgmlDType::F32).unwrap()));
    let mismatch = schema.check_consumer(&load(&decode).kv_schema()).unwrap_err();
    assert_eq!(mismatch.field, "rope.scaling");
    assert!(mismatch.producer.contains("factors 1x") && mismatch.producer != mismatch.consumer, "{mismatch}");
}

/// Factors of the published models are recognised as Llama 3 scaling, so that a GGUF decoder fits a safetensors model.
#[test]
fn factors_of_published_models_are_their_parameters() {
    let folder = golden("llama-tied", "full");
    let mut config = ModelConfig::from_folder(&folder).unwrap();
    for factor in [8.0, 32.0] {
        (config.head_dim, config.rotary_dim) = (128, 128);
        config.ropes[0].scaling = RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let mut parts = parts(&folder, GgmlDType::F32);
        parts.tensors.pop();
        parts.tensors.push(write::rope_factors(&config));
        for key in ["attention.key_length", "attention.value_length", "rope.dimension_count"] {
            parts.set(&format!("llama.{key}"), Value::U32(128));
        }
        // q and k have the wrong shapes for this head width, but the configuration does not check them.
        parts.tensors.retain(|(name, _)| !name.contains("attn_q") && !name.contains("attn_k"));
        let got = ModelConfig::from_folder(written(&parts).path()).unwrap();
        assert_eq!(got.rope_spec(), config.rope_spec());
        // The config.json written for a model pruned from it states the same rope.
        let again = ModelConfig::from_json(Path::new("config.json"), got.to_json()).unwrap();
        assert_eq!(again.rope_spec(), config.rope_spec());
    }
}

#[test]
fn faults_name_file_key_and_values() {
    let folder = golden("qwen3", "full");
    let fault = |change: &dyn Fn(&mut Parts)| -> String {
        let mut parts = parts(&folder, GgmlDType::F32);
        change(&mut parts);
        let error = Model::load(written(&parts).path(), &LoadOptions::default(), 1).err().unwrap().to_string();
        assert!(error.contains("model.gguf: ") && !error.contains('\n'), "{error}");
        error
    };
    let set = |key: &'static str, value: Value| fault(&move |parts: &mut Parts| parts.set(key, value.clone()));
    let gone = |key: &'static str| fault(&move |parts: &mut Parts| parts.remove(key));
    for (error, expected) in [
        (
            set("general.architecture", Value::String("mamba".into())),
            "general.architecture is \"mamba\", supported: llama",
        ),
        (gone("general.architecture"), "general.architecture is absent"),
        (gone("qwen3.block_count"), "qwen3.block_count is absent"),
        (set("qwen3.block_count", Value::U32(0)), "qwen3.block_count is 0, supported: a whole number from 1"),
        (
            set("qwen3.block_count", Value::U32(1 << 24)),
            "qwen3.block_count is 16777216, supported: no more than the file's 36 tensors",
        ),
        (set("qwen3.block_count", Value::U32(4)), "tensor blk.3.attn_norm.weight is missing"),
        (
            set("qwen3.attention.head_count_kv", Value::U32(3)),
            "qwen3.attention.head_count_kv is 3, supported: a divisor",
        ),
        (
            set("qwen3.attention.head_count_kv", Value::Array(vec![Value::U32(2); 3])),
            "qwen3.attention.head_count_kv is \"an array of 3\"",
        ),
        (set("qwen3.rope.freq_base", Value::F32(f32::NAN)), "qwen3.rope.freq_base is \"NaN\""),
        (
            set("qwen3.rope.dimension_count", Value::U32(16)),
            "qwen3.rope.dimension_count is 16, supported: the width of a head (32)",
        ),
        (
            set("qwen3.rope.scaling.type", Value::String("longrope".into())),
            "qwen3.rope.scaling.type is \"longrope\", supported: none, linear, yarn",
        ),
        (set("qwen3.expert_count", Value::U32(8)), "qwen3.expert_count is 8, supported: 0"),
        (
            set("qwen3.feed_forward_length", Value::U32(161)),
            "tensor blk.0.ffn_gate.weight has shape [160, 64], the configuration asks for [161, 64]",
        ),
        (set("split.count", Value::U16(3)), "split.count is 3, supported: 1"),
        (
            set("tokenizer.ggml.model", Value::String("t5".into())),
            "tokenizer.ggml.model is \"t5\", supported: gpt2, llama",
        ),
        (
            set("tokenizer.ggml.pre", Value::String("dbrx".into())),
            "tokenizer.ggml.pre is \"dbrx\", supported: llama-bpe",
        ),
        (
            set("tokenizer.ggml.bos_token_id", Value::U32(320)),
            "tokenizer.ggml.bos_token_id is 320, supported: ids below 320",
        ),
        (gone("tokenizer.ggml.tokens"), "tokenizer.ggml.tokens is absent"),
        (set("tokenizer.ggml.merges", write::texts(["a nonesuch"])), "tokenizer.ggml.merges[0] is \"a nonesuch\""),
        (set("tokenizer.ggml.token_type", Value::Array(vec![Value::I32(1)])), "supported: an array of 320 numbers"),
    ] {
        assert!(error.contains(expected), "{error}\n  has not: {expected}");
    }
}

#[test]
fn a_linear_factor_and_a_window_are_read() {
    let mut parts = parts(&golden("llama-untied", "full"), GgmlDType::F32);
    parts.set("llama.rope.scaling.type", Value::String("linear".into()));
    parts.set("llama.rope.scaling.factor", Value::F32(2.5));
    parts.set("llama.attention.sliding_window", Value::U32(256));
    let config = ModelConfig::from_folder(written(&parts).path()).unwrap();
    assert_eq!(config.ropes[0].scaling, RopeScaling::Linear { factor: 2.5 });
    assert!(config.layers.iter().all(|layer| layer.window == Some(256)));
    // It is not stated which of these layers have a window.
    let mut parts = crate::parts(&golden("qwen2", "full"), GgmlDType::F32);
    parts.set("qwen2.attention.sliding_window", Value::U32(256));
    assert_eq!(ModelConfig::from_folder(written(&parts).path()).unwrap().max_position_embeddings, 256);
    let mut parts = crate::parts(&golden("olmo2", "full"), GgmlDType::F32);
    parts.set("olmo2.attention.sliding_window", Value::U32(256));
    let error = ModelConfig::from_folder(written(&parts).path()).unwrap_err().to_string();
    assert!(error.contains("olmo2.attention.sliding_window is 256, supported: 0"), "{error}");
}

#[test]
fn a_model_is_a_file_or_the_only_one_of_a_folder() {
    let parts = parts(&golden("qwen3", "full"), GgmlDType::F16);
    let folder = written(&parts);
    let file = folder.path().join("model.gguf");
    let options = LoadOptions::default();
    let (of_file, of_folder) =
        (Model::load(&file, &options, 1).unwrap(), Model::load(folder.path(), &options, 1).unwrap());
    assert_eq!(of_file.name(), "model");
    assert_eq!(of_folder.name(), folder.path().file_name().unwrap().to_str().unwrap());
    assert_eq!(of_file.fingerprint(), of_folder.fingerprint());
    assert_eq!(overfill_model::resolve(file.to_str().unwrap()).unwrap(), file);

    // overfill.json is next to the file.
    fs::write(folder.path().join("overfill.json"), r#"{"version": 1, "kept_layers": [0, 2]}"#).unwrap();
    let error = Model::load(&file, &options, 1).err().unwrap().to_string();
    assert!(error.contains("overfill.json: kept_layers is [0, 2], supported: as many layers"), "{error}");
    fs::write(folder.path().join("overfill.json"), r#"{"version": 1, "kept_layers": [0, 2, 5]}"#).unwrap();
    assert_eq!(Model::load(&file, &options, 1).unwrap().kv_schema().layers, [0, 2, 5]);

    parts.write(&folder.path().join("other.gguf"));
    let error = Model::load(folder.path(), &options, 1).err().unwrap().to_string();
    assert!(error.contains("holds 2 .gguf files (model.gguf, other.gguf") || error.contains("(other.gguf, model.gguf"));
    let other = folder.path().join("other.txt");
    fs::write(&other, "x").unwrap();
    let error = overfill_model::resolve(other.to_str().unwrap()).unwrap_err().to_string();
    assert!(error.contains("neither a folder nor a .gguf file"), "{error}");
}
