use std::{collections::HashMap, path::Path};

use candle_core::{DType, Device, Tensor};
use overfill_kv::{BlockId, KvDtype, RopeSpec};
use serde_json::{Value, json};

use super::{
    Axis, Family, Kind, LayerSpec, Module, Parameter, When, gemma2, gemma3, llama, mistral, olmo2,
    parameters::{
        ATTENTION_NORM, ATTENTION_OUTPUT, DOWN, EMBEDDING, FINAL_NORM, GATE, HEAD, KEY, KEY_NORM, MLP_NORM, QUERY,
        QUERY_NORM, UP, VALUE,
    },
    phi3, qwen2, qwen3, smollm3,
};
use crate::{
    Decoder, Engine, ModelConfig, ModelError, Ops, Outputs, Rope, RopeScaling, Rows, SequenceSlice, Want, WeightDtype,
    Weights,
    cpu::{CpuEngine, kernels::packed::WeightFormat},
    no_layers,
    tensor::TensorEngine,
};

fn config(family: &'static Family) -> ModelConfig {
    let value = json!({
        "architectures": [family.class], "hidden_size": 6, "intermediate_size": 10, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2, "vocab_size": 7
    });
    ModelConfig::from_json(Path::new("config.json"), value).unwrap()
}

fn described(config: &ModelConfig) -> Vec<String> {
    let name = |name: String| name.replace("model.layers.0.", "0.");
    config.tensor_shapes().into_iter().map(|(n, shape)| format!("{} {shape:?}", name(n))).collect()
}

#[test]
fn families_have_their_tensors() {
    let llama = [
        "model.embed_tokens.weight [7, 6]",
        "0.input_layernorm.weight [6]",
        "0.post_attention_layernorm.weight [6]",
        "0.self_attn.q_proj.weight [8, 6]",
        "0.self_attn.k_proj.weight [4, 6]",
        "0.self_attn.v_proj.weight [4, 6]",
        "0.self_attn.o_proj.weight [6, 8]",
        "0.mlp.gate_proj.weight [10, 6]",
        "0.mlp.up_proj.weight [10, 6]",
        "0.mlp.down_proj.weight [6, 10]",
        "model.norm.weight [6]",
        "lm_head.weight [7, 6]",
    ];
    assert_eq!(described(&config(&llama::FAMILY)), llama);
    assert_eq!(described(&config(&mistral::FAMILY)), llama);
    let added = |config: &ModelConfig| -> Vec<String> {
        described(config).into_iter().filter(|tensor| !llama.contains(&tensor.as_str())).collect()
    };
    let qkv_biases = ["0.self_attn.q_proj.bias [8]", "0.self_attn.k_proj.bias [4]", "0.self_attn.v_proj.bias [4]"];
    assert_eq!(added(&config(&qwen2::FAMILY)), qkv_biases);
    let norms = ["0.self_attn.q_norm.weight [2]", "0.self_attn.k_norm.weight [2]"];
    assert_eq!(added(&config(&qwen3::FAMILY)), norms);

    let with_biases = ModelConfig { attention_bias: true, mlp_bias: true, ..config(&llama::FAMILY) };
    let mlp_biases = ["0.mlp.gate_proj.bias [10]", "0.mlp.up_proj.bias [10]", "0.mlp.down_proj.bias [6]"];
    let all = [&qkv_biases[..], &["0.self_attn.o_proj.bias [6]"], &mlp_biases].concat();
    assert_eq!(added(&with_biases), all);
    // Qwen2's biases are fixed, so the field has no effect.
    let mut value = config(&qwen2::FAMILY).to_json();
    value["attention_bias"] = json!(true);
    let stated = ModelConfig::from_json(Path::new("config.json"), value).unwrap();
    assert_eq!(added(&stated), qkv_biases);

    let tied = ModelConfig { tie_word_embeddings: true, ..config(&llama::FAMILY) };
    assert_eq!(described(&tied), llama[..11]);
}

#[test]
fn names_are_translated_both_ways() {
    let family = &qwen3::FAMILY;
    for (gguf, hugging_face) in [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("output.weight", "lm_head.weight"),
        ("blk.31.attn_norm.weight", "model.layers.31.input_layernorm.weight"),
        ("blk.0.attn_q_norm.weight", "model.layers.0.self_attn.q_norm.weight"),
        ("blk.2.attn_q.bias", "model.layers.2.self_attn.q_proj.bias"),
        ("blk.2.ffn_down.weight", "model.layers.2.mlp.down_proj.weight"),
        // Names outside the table.
        ("rope_freqs.weight", "rope_freqs.weight"),
        ("blk.0", "blk.0"),
        ("blk.0.attn_q", "blk.0.attn_q"),
        ("blk.0.output.weight", "blk.0.output.weight"),
        ("attn_q.weight", "attn_q.weight"),
        ("", ""),
    ] {
        assert_eq!(family.name_of_gguf(gguf), hugging_face);
        assert_eq!(family.name_in_gguf(hugging_face), gguf);
    }
    // The same name is another norm in another family.
    for (family, gguf, hugging_face) in [
        (&gemma2::FAMILY, "blk.1.ffn_norm.weight", "model.layers.1.pre_feedforward_layernorm.weight"),
        (&gemma2::FAMILY, "blk.1.post_attention_norm.weight", "model.layers.1.post_attention_layernorm.weight"),
        (&olmo2::FAMILY, "blk.1.post_ffw_norm.weight", "model.layers.1.post_feedforward_layernorm.weight"),
        (&phi3::FAMILY, "blk.1.attn_qkv.weight", "model.layers.1.self_attn.qkv_proj.weight"),
    ] {
        assert_eq!((family.name_of_gguf(gguf), family.name_in_gguf(hugging_face)), (hugging_face.into(), gguf.into()));
    }
    let rotated = |name| family.is_rotated_in_gguf(name);
    assert!(rotated("blk.0.attn_q.weight") && rotated("blk.7.attn_k.bias"));
    assert!(!rotated("blk.0.attn_v.weight") && !rotated("blk.0.attn_q_norm.weight") && !rotated("attn_q.weight"));
}

/// Names within a table are unique, each parameter occurs once, and per-layer entries are adjacent.
#[test]
fn tables_are_sound() {
    for family in super::FAMILIES.into_iter().chain([&FUSED]) {
        let of_layers = family.modules.chunk_by(|a, b| a.in_layer == b.in_layer).filter(|run| run[0].in_layer);
        assert_eq!(of_layers.count(), 1, "{family:?}");
        let mut names: Vec<_> = family.modules.iter().flat_map(|module| [module.name, module.gguf]).collect();
        let parameters = family.modules.iter().flat_map(|module| module.parts).map(|(parameter, _)| *parameter);
        let mut parameters: Vec<String> = parameters.map(|parameter| format!("{parameter:?}")).collect();
        let counts = (names.len(), parameters.len());
        names.sort_unstable();
        names.dedup();
        parameters.sort_unstable();
        parameters.dedup();
        assert_eq!((names.len(), parameters.len()), counts, "{family:?}");
    }
}

/// Phi-3's layout.
static FUSED: Family = Family {
    class: "Fused",
    model_type: "fused",
    modules: &[
        EMBEDDING,
        ATTENTION_NORM,
        MLP_NORM,
        Module {
            name: "self_attn.qkv_proj",
            gguf: "attn_qkv",
            parts: &[
                (Parameter::Query, Axis::QueryHeads),
                (Parameter::Key, Axis::KvHeads),
                (Parameter::Value, Axis::KvHeads),
            ],
            ..QUERY
        },
        ATTENTION_OUTPUT,
        Module {
            name: "mlp.gate_up_proj",
            gguf: "ffn_up",
            parts: &[(Parameter::Gate, Axis::Intermediate), (Parameter::Up, Axis::Intermediate)],
            ..GATE
        },
        DOWN,
        FINAL_NORM,
        HEAD,
    ],
    ..llama::FAMILY
};

/// Logits of a prompt split in two, computed by the kernels and by tensor operations.
fn logits(config: &ModelConfig, weights: &Weights) -> Result<[Vec<f32>; 2], ModelError> {
    let kernels = CpuEngine::load(config, weights, WeightFormat::F32, Rows::Few, KvDtype::F32, 3)?;
    let tensors = TensorEngine::load(config, weights, WeightDtype::F32, &Device::Cpu, KvDtype::F32, 3)?;
    let mut engines: [Box<dyn Engine>; 2] = [Box::new(kernels), Box::new(tensors)];
    let tokens: Vec<u32> = (0..40).map(|i| i * 7 % config.vocab_size as u32).collect();
    let blocks = [BlockId(2), BlockId(0), BlockId(1)];
    let slice = |part: std::ops::Range<usize>| SequenceSlice {
        tokens: &tokens[part.clone()],
        start: part.start,
        blocks: &blocks,
        want: Want::AllLogits,
    };
    let mut out = [Vec::new(), Vec::new()];
    for batch in [[slice(0..30)], [slice(30..40)]] {
        for (out, engine) in out.iter_mut().zip(&mut engines) {
            let mut outputs = Outputs::default();
            engine.run(&batch, &no_layers(), &mut outputs)?;
            let got = outputs.logits();
            (0..got.rows()).for_each(|row| out.extend(got.row(row)));
        }
    }
    Ok(out)
}

fn golden(pair: &str) -> (ModelConfig, Weights) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(pair).join("full");
    (ModelConfig::from_folder(&folder).unwrap(), Weights::open(&folder).unwrap())
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert!(!a.is_empty() && a.len() == b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// No family has such layers yet, but both decoders compute them alike.
#[test]
fn layers_may_differ_in_rope_and_scale() {
    let (plain, weights) = golden("qwen3");
    let [expected, _] = logits(&plain, &weights).unwrap();
    let layer = |rope, score_scale| LayerSpec { rope, score_scale, ..LayerSpec::PLAIN };
    let two_ropes = vec![plain.ropes[0].clone(), Rope { theta: 100.0, scaling: RopeScaling::Linear { factor: 2.0 } }];
    let own = 1.0 / (plain.head_dim as f64).sqrt();
    for (ropes, layers, differs) in [
        (two_ropes.clone(), vec![layer(Some(1), None), layer(Some(0), None), layer(Some(1), None)], true),
        (plain.ropes.clone(), vec![layer(Some(0), None), layer(None, None), layer(Some(0), None)], true),
        (Vec::new(), vec![layer(None, None); 3], true),
        (two_ropes, vec![layer(Some(0), None); 3], false),
        (plain.ropes.clone(), vec![layer(Some(0), Some(2.0 * own)); 3], true),
        (plain.ropes.clone(), vec![layer(Some(0), Some(own)), layer(Some(0), None), layer(Some(0), None)], false),
    ] {
        let config = ModelConfig { ropes, layers, ..plain.clone() };
        let [kernels, tensors] = logits(&config, &weights).unwrap();
        assert!(distance(&kernels, &tensors) < 2e-3, "{:?}", config.layers);
        assert_eq!(distance(&kernels, &expected) > 1e-2, differs, "{:?}", config.layers);
    }
}

/// Writes a golden model's tensors in the layout of the fused family.
fn fused(plain: &ModelConfig, weights: &Weights, folder: &Path) -> ModelConfig {
    let config = ModelConfig { family: &FUSED, ..plain.clone() };
    let mut tensors = HashMap::new();
    for tensor in config.tensors() {
        let part = |(parameter, _): &(Parameter, Axis)| {
            let place = plain.rows_of(*parameter, tensor.kind, tensor.layer).unwrap();
            weights.load(&place.name, &place.shape, &Device::Cpu).unwrap()
        };
        let parts: Vec<Tensor> = tensor.module.parts.iter().map(part).collect();
        let whole = Tensor::cat(&parts, 0).unwrap();
        assert_eq!(whole.dims(), tensor.shape, "{}", tensor.name);
        tensors.insert(tensor.name, whole);
    }
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
    config
}

#[test]
fn parameters_may_be_rows_of_a_fused_tensor() {
    let (plain, weights) = golden("llama-untied");
    let folder = tempfile::tempdir().unwrap();
    let config = fused(&plain, &weights, folder.path());
    let rows = |parameter| config.rows_of(parameter, Kind::Weight, Some(1)).unwrap();
    let (q, kv) = (config.size_of(Axis::QueryHeads), config.size_of(Axis::KvHeads));
    let value = rows(Parameter::Value);
    assert_eq!(value.name, "model.layers.1.self_attn.qkv_proj.weight");
    assert_eq!((value.shape, value.rows), (vec![q + 2 * kv, config.hidden_size], q + kv..q + 2 * kv));
    assert_eq!(config.axes_of(Parameter::Up), Some([Axis::Intermediate, Axis::Hidden]));
    let expected = logits(&plain, &weights).unwrap();
    assert_eq!(logits(&config, &Weights::open(folder.path()).unwrap()).unwrap(), expected);
}

/// Neither decoder computes LayerNorm's bias or norms over other axes, and both need a final norm.
#[test]
fn decoders_refuse_tables_that_they_cannot_compute() {
    static WRONG_WIDTH: Family = Family {
        model_type: "wrong-width",
        modules: &[
            EMBEDDING,
            ATTENTION_NORM,
            MLP_NORM,
            QUERY,
            KEY,
            VALUE,
            ATTENTION_OUTPUT,
            GATE,
            UP,
            DOWN,
            Module { parts: &[(Parameter::QueryNorm, Axis::KvHeads)], ..QUERY_NORM },
            KEY_NORM,
            FINAL_NORM,
            HEAD,
        ],
        ..qwen3::FAMILY
    };
    static NO_NORM: Family = Family {
        model_type: "no-norm",
        modules: &[EMBEDDING, ATTENTION_NORM, MLP_NORM, QUERY, KEY, VALUE, ATTENTION_OUTPUT, GATE, UP, DOWN, HEAD],
        ..llama::FAMILY
    };
    static NORM_BIAS: Family = Family {
        model_type: "norm-bias",
        modules: &[
            EMBEDDING,
            ATTENTION_NORM,
            MLP_NORM,
            QUERY,
            KEY,
            VALUE,
            ATTENTION_OUTPUT,
            GATE,
            UP,
            DOWN,
            Module { bias: When::Always, ..FINAL_NORM },
            HEAD,
        ],
        ..llama::FAMILY
    };
    let folder = tempfile::tempdir().unwrap();
    for (family, expected) in [
        (&NORM_BIAS, "norm-bias has model.norm.bias, which the decoder does not use"),
        (&WRONG_WIDTH, "QueryNorm of wrong-width is over KvHeads, supported: [HeadDim, QueryHeads]"),
        (&NO_NORM, "no-norm has no FinalNorm"),
    ] {
        let config = ModelConfig { family, ..config(&qwen3::FAMILY) };
        let zeros =
            |(name, shape): (String, Vec<usize>)| (name, Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap());
        let tensors: HashMap<String, Tensor> = config.tensor_shapes().into_iter().map(zeros).collect();
        candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
        let weights = Weights::open(folder.path()).unwrap();
        let kernels = CpuEngine::load(&config, &weights, WeightFormat::F32, Rows::Few, KvDtype::F32, 1)
            .err()
            .unwrap()
            .to_string();
        let tensors = Decoder::from_tensors(&config, &tensors, Ops::Fused).err().unwrap().to_string();
        assert!(kernels.ends_with(expected), "{kernels}");
        assert!(tensors.ends_with(expected), "{tensors}");
    }
}

#[test]
fn a_schema_states_the_rope_of_all_layers() {
    let plain = config(&llama::FAMILY);
    assert_eq!((plain.rope_spec().theta, plain.rope_spec().scaling.as_str()), (10_000.0, "none"));
    let layer = |rope| LayerSpec { rope, ..LayerSpec::PLAIN };
    let layers = vec![layer(Some(1)), layer(Some(1)), layer(None), layer(Some(0))];
    let other = Rope { theta: 1e6, scaling: RopeScaling::Linear { factor: 8.0 } };
    let ropes = vec![plain.ropes[0].clone(), other];
    assert!(plain.layer_attention().is_empty());
    let config = ModelConfig { ropes, layers, num_hidden_layers: 4, ..plain };
    assert_eq!(config.rope_spec(), RopeSpec { theta: 10_000.0, scaling: "by layer".into() });
    let [linear, without, none] = [
        "theta=1000000 linear factor=8 window=none",
        "theta=0 without rotation window=none",
        "theta=10000 none window=none",
    ];
    let texts = |config: &ModelConfig| config.layer_attention().iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(texts(&config), [linear, linear, without, none]);
    let windows = config.layers[..2].iter().map(|layer| LayerSpec { window: Some(7), ..layer.clone() }).collect();
    let config = ModelConfig { layers: windows, rotary_dim: 4, head_dim: 8, ..config };
    assert_eq!(config.rope_spec(), RopeSpec { theta: 1e6, scaling: "linear factor=8 of 4 channels".into() });
    assert_eq!(texts(&config), ["theta=1000000 linear factor=8 of 4 channels window=7"; 2]);
}

#[test]
fn a_cut_edits_what_counts_layers() {
    let mut value = config(&qwen2::FAMILY).to_json();
    for (field, set) in [
        ("num_hidden_layers", json!(3)),
        ("max_window_layers", json!(28)),
        ("layer_types", json!(["full_attention", "sliding_attention", "full_attention"])),
    ] {
        value[field] = set;
    }
    let full = ModelConfig::from_json(Path::new("config.json"), value.clone()).unwrap();
    let narrow = full.cut(4, 5, &[0, 1, 2]).to_json();
    assert_eq!((&narrow["hidden_size"], &narrow["intermediate_size"]), (&json!(4), &json!(5)));
    assert_eq!((&narrow["max_window_layers"], &narrow["layer_types"]), (&json!(28), &value["layer_types"]));
    let short = full.cut(4, 5, &[1, 2]);
    assert_eq!(short.layers.len(), 2);
    let json: Value = short.to_json();
    assert_eq!((&json["num_hidden_layers"], &json["max_window_layers"]), (&json!(2), &json!(2)));
    assert_eq!(json["layer_types"], json!(["sliding_attention", "full_attention"]));
}

/// A pruned model's config.json states the attention of each kept layer, even if the full one's states a rule.
#[test]
fn a_cut_keeps_the_attention_of_its_layers() {
    for family in [&gemma2::FAMILY, &gemma3::FAMILY, &smollm3::FAMILY, &qwen2::FAMILY, &mistral::FAMILY] {
        let mut value = config(family).to_json();
        for (field, set) in [
            ("num_hidden_layers", json!(9)),
            ("sliding_window", json!(8)),
            ("use_sliding_window", json!(true)),
            ("max_window_layers", json!(4)),
            ("sliding_window_pattern", json!(3)),
        ] {
            value[field] = set;
        }
        let full = ModelConfig::from_json(Path::new("config.json"), value).unwrap();
        assert!(full.layers.iter().any(|layer| layer.window == Some(8)), "{family:?}");
        let kept = [0, 1, 3, 4, 5, 8];
        let short = full.cut(4, 5, &kept);
        let read = ModelConfig::from_json(Path::new("config.json"), short.to_json()).unwrap();
        assert_eq!(read.layers, short.layers, "{family:?}");
        assert_eq!(read.layers, kept.map(|layer| full.layers[layer as usize].clone()), "{family:?}");
    }
}
