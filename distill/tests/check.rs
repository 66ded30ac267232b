//! `overfill check` on the golden models: correct models pass, faulty ones fail, and incomparable ones give a one-line
//! error.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

#[allow(dead_code, reason = "each of its users needs other parts")]
#[path = "../../model/tests/gguf/write.rs"]
mod write;

use std::{
    fs,
    path::{Path, PathBuf},
};

use candle_core::quantized::GgmlDType;
use clap::Parser;
use overfill_distill::check::{
    CheckConfig, F32_BOUND, Report, Verdict, check,
    cli::{CheckArgs, text},
};
use overfill_kv::KvDtype;
use overfill_model::WeightFormat;
use serde_json::{Value, json};
use tempfile::TempDir;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name)
}

fn config(model: &Path) -> CheckConfig {
    CheckConfig {
        model: model.into(),
        reference: None,
        prompt_tokens: None,
        decode_tokens: 16,
        text: None,
        seed: 0,
        weights: WeightFormat::F32,
        kv_dtype: KvDtype::F32,
        bound: None,
    }
}

/// Copies a golden model and sets some fields of its config.json.
fn copy(name: &str, fields: Value) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(golden(name)).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let file = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    for (field, value) in fields.as_object().unwrap() {
        config[field] = value.clone();
    }
    fs::write(&file, config.to_string()).unwrap();
    folder
}

/// Writes a golden model as the only GGUF file of a folder.
fn gguf(name: &str, dtype: GgmlDType) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write::parts(&golden(name), dtype).write(&folder.path().join("model.gguf"));
    folder
}

#[test]
fn every_golden_model_passes() {
    for (name, implementation, noted) in [
        ("llama-tied/full", "llama", ""),
        // Scaled RoPE with heads that don't fill hidden_size: only a widened llama supports both.
        ("llama-tied/decode", "llama", "hidden_size is 64, not 35"),
        ("llama-untied/full", "mistral", "mistral stands in"),
        ("llama-untied/decode", "mistral", "mistral stands in"),
        ("llama-depth/full", "llama", ""),
        ("llama-depth/decode", "mistral", "mistral stands in"),
        ("qwen2/full", "qwen2", ""),
        ("qwen2/decode", "qwen2", "hidden_size is 80, not 44"),
        ("qwen3/full", "qwen3", ""),
        ("qwen3/decode", "qwen3", ""),
    ] {
        let report = check(&config(&golden(name))).unwrap();
        println!("{}", text(&report));
        assert_eq!((report.verdict, report.bound), (Verdict::Pass, Some(F32_BOUND)), "{name}");
        assert_eq!(report.implementation, implementation, "{name}");
        assert_eq!(report.notes.is_empty(), noted.is_empty(), "{name}: {:?}", report.notes);
        assert!(report.notes.iter().all(|note| note.contains(noted)), "{name}: {:?}", report.notes);
        // The context length minus the continuation.
        let longest = if name.starts_with("llama-tied") { 2048 - 16 } else { 1024 - 16 };
        assert_eq!(report.prompts.last().unwrap().prompt_tokens, longest, "{name}");
        assert_eq!(report.total.positions, 17 * report.prompts.len());
        // The two sides are different code, so they differ by rounding.
        assert!(report.total.greatest > 0.0, "{name}");
    }
}

#[test]
fn linear_scaling_has_a_reference_too() {
    let scaled = json!({"rope_scaling": {"rope_type": "linear", "factor": 4.0}});
    for name in ["llama-depth/full", "llama-depth/decode"] {
        let folder = copy(name, scaled.clone());
        let report = check(&config(folder.path())).unwrap();
        assert_eq!((report.verdict, report.implementation), (Verdict::Pass, "llama"), "{}", text(&report));
    }
}

/// Removes the second of two KV heads of 16 channels from every layer.
fn keep_one_kv_head(folder: &Path) {
    let file = folder.join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &candle_core::Device::Cpu).unwrap();
    for (name, tensor) in &mut tensors {
        if name.contains("k_proj") || name.contains("v_proj") {
            *tensor = tensor.narrow(0, 0, 16).unwrap().contiguous().unwrap();
        }
    }
    candle_core::safetensors::save(&tensors, &file).unwrap();
}

/// candle's Gemma has the scale of scores of most published models, and no scaled rope.
#[test]
fn gemma_passes() {
    for (name, fields) in [
        ("gemma2/full", json!({"query_pre_attn_scalar": 16})),
        ("gemma2/decode", json!({"query_pre_attn_scalar": 16})),
        ("gemma3/full", json!({"query_pre_attn_scalar": 16, "rope_scaling": null, "num_key_value_heads": 1})),
    ] {
        let folder = copy(name, fields);
        if name == "gemma3/full" {
            keep_one_kv_head(folder.path());
        }
        let report = check(&config(folder.path())).unwrap();
        let implementation = name.split_once('/').unwrap().0;
        assert_eq!((report.verdict, report.implementation), (Verdict::Pass, implementation), "{}", text(&report));
        // Not beyond the windows: candle's are one token wider.
        assert!(report.prompts.iter().all(|prompt| prompt.prompt_tokens + 16 <= 37), "{}", text(&report));
    }
    for (name, fields, expected) in [
        ("gemma2/full", json!({}), "factor of the scores is 0.22360679774997896, supported: 1 / sqrt(head_dim)"),
        ("gemma3/full", json!({}), "num_key_value_heads is 2, supported: 1, for gemma3"),
        ("phi3/full", json!({}), "rope_scaling is factors 1x1,1.15x1"),
        ("granite/full", json!({}), "smollm3; the granite of candle-transformers has no multipliers"),
    ] {
        let error = check(&config(copy(name, fields).path())).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

/// candle's implementations of these have no scaled rope, so the copies have none.
#[test]
fn families_with_blocks_of_their_own_pass() {
    for family in ["phi3", "olmo2", "smollm3"] {
        for which in ["full", "decode"] {
            let folder = copy(&format!("{family}/{which}"), json!({"rope_scaling": null}));
            let report = check(&config(folder.path())).unwrap();
            assert_eq!((report.verdict, report.implementation), (Verdict::Pass, family), "{}", text(&report));
            assert!(report.total.greatest > 0.0, "{}", text(&report));
        }
    }
    // What makes them their own: a part of each head is rotated, q is normalised, and a layer has no rotation.
    for (family, changed) in [
        ("phi3", json!({"partial_rotary_factor": 0.5})),
        ("olmo2", json!({"rms_norm_eps": 0.1})),
        ("smollm3", json!({"no_rope_layers": [1, 1, 1, 1]})),
    ] {
        let name = format!("{family}/full");
        let original = copy(&name, json!({"rope_scaling": null}));
        let mut fields = changed;
        fields["rope_scaling"] = Value::Null;
        let faulty = copy(&name, fields);
        let reference = Some(original.path().into());
        let report = check(&CheckConfig { reference, bound: Some(F32_BOUND), ..config(faulty.path()) }).unwrap();
        assert_eq!(report.verdict, Verdict::Fail, "{}", text(&report));
    }
}

/// The engine runs a changed copy, the reference the original.
#[test]
fn planted_faults_fail() {
    for (name, fault) in [
        ("llama-depth/full", json!({"rope_theta": 10_050.0})),
        (
            "llama-tied/decode",
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 66}}),
        ),
        ("qwen2/full", json!({"rope_theta": 1_005_000.0})),
        ("qwen3/decode", json!({"rms_norm_eps": 1e-3})),
    ] {
        let changed = copy(name, fault.clone());
        let faulty = CheckConfig { reference: Some(golden(name)), bound: Some(F32_BOUND), ..config(changed.path()) };
        let report = check(&faulty).unwrap();
        println!("{fault}\n{}", text(&report));
        assert_eq!(report.verdict, Verdict::Fail, "{name} {fault}");
        assert!(text(&report).contains("\nFAIL: greatest distance "), "{name}");
        // An unchanged copy passes.
        let same = copy(name, json!({}));
        let report = check(&CheckConfig { model: same.path().into(), ..faulty }).unwrap();
        assert_eq!(report.verdict, Verdict::Pass, "{name}");
    }
}

#[test]
fn narrow_formats_are_judged_only_by_a_bound_that_was_asked_for() {
    let model = golden("llama-tied/full");
    let with = |weights, kv_dtype, bound| {
        check(&CheckConfig { weights, kv_dtype, bound, prompt_tokens: Some(vec![128]), ..config(&model) }).unwrap()
    };
    let report = with(WeightFormat::Int8, KvDtype::F32, None);
    assert_eq!((report.verdict, report.bound), (Verdict::NotJudged, None));
    assert!(report.total.greatest > F32_BOUND, "{}", text(&report));
    assert!(text(&report).contains("\nNOT JUDGED: "));
    let bound = report.total.greatest;
    assert_eq!(with(WeightFormat::Int8, KvDtype::F32, Some(bound)).verdict, Verdict::Pass);
    assert_eq!(with(WeightFormat::Int8, KvDtype::F32, Some(bound * 0.99)).verdict, Verdict::Fail);
    assert_eq!(with(WeightFormat::F32, KvDtype::Bf16, None).verdict, Verdict::NotJudged);
}

#[test]
fn gguf_files_are_checked_by_their_own_weights_or_by_the_folder_they_were_made_from() {
    let quantised = gguf("llama-untied/full", GgmlDType::Q8_0);
    let report = check(&config(quantised.path())).unwrap();
    assert_eq!(report.verdict, Verdict::Pass, "{}", text(&report));
    assert!(report.notes.iter().any(|note| note.contains("GGUF")), "{:?}", report.notes);
    // The path of the file gives the same result as its folder.
    assert_eq!(check(&config(&quantised.path().join("model.gguf"))).unwrap().total, report.total);

    let against_folder = |file: &TempDir, name: &str, bound| {
        check(&CheckConfig { reference: Some(golden(name)), bound, ..config(file.path()) }).unwrap()
    };
    let cost = against_folder(&quantised, "llama-untied/full", None);
    assert_eq!(cost.verdict, Verdict::NotJudged);
    assert!(cost.total.greatest > F32_BOUND, "{}", text(&cost));
    // F32 files are not quantised, so only the GGUF reader is tested.
    for name in ["llama-untied/full", "qwen2/decode", "qwen3/full"] {
        let report = against_folder(&gguf(name, GgmlDType::F32), name, Some(F32_BOUND));
        assert_eq!(report.verdict, Verdict::Pass, "{name}: {}", text(&report));
        assert!(report.notes.iter().all(|note| !note.contains("GGUF")), "{:?}", report.notes);
    }
}

#[test]
fn what_can_not_be_compared_is_one_line() {
    let fault = |folder: &Path, change: &dyn Fn(&mut CheckConfig)| {
        let mut config = config(folder);
        change(&mut config);
        let error = check(&config).unwrap_err().to_string();
        assert!(!error.contains('\n'), "{error}");
        error
    };
    let none = " (candle-transformers has no implementation of anything else)";
    for (name, fields, expected) in [
        ("llama-tied/full", json!({"attention_bias": true}), "config.json: attention_bias is true, supported: false"),
        ("llama-tied/full", json!({"mlp_bias": true}), "config.json: mlp_bias is true, supported: false"),
        (
            "qwen3/full",
            json!({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
            "config.json: rope_scaling is linear factor=2, supported: none",
        ),
        // Heads narrower than hidden_size: candle's llama can't be widened to match.
        (
            "llama-tied/full",
            json!({"num_attention_heads": 2}),
            "config.json: head_dim is 16, supported: hidden_size / num_attention_heads or more, for llama",
        ),
    ] {
        let folder = copy(name, fields);
        assert_eq!(fault(folder.path(), &|_| {}), format!("{}/{expected}{none}", folder.path().display()));
    }
    // The GGUF file stores RoPE factors without the parameters of the scaling.
    let factors = gguf("llama-tied/full", GgmlDType::F32);
    let error = fault(factors.path(), &|_| {});
    assert!(error.contains("rope_scaling is factors ") && error.ends_with(none), "{error}");

    let model = golden("qwen2/full");
    let error = fault(&model, &|c| c.prompt_tokens = Some(vec![1, 1009]));
    assert_eq!(error, "--prompt-tokens has 1009, supported: 1 to 1008 (the model's context, less --decode-tokens)");
    let error = fault(&model, &|c| c.decode_tokens = 1024);
    assert_eq!(error, "--decode-tokens is 1024, supported: fewer than the context's 1024");
    let missing = copy("qwen2/full", json!({"tie_word_embeddings": false}));
    assert!(fault(missing.path(), &|_| {}).contains("tensor lm_head.weight is missing"));
    let wide = copy("qwen2/full", json!({"vocab_size": 321}));
    let error = fault(&model, &|c| c.reference = Some(wide.path().into()));
    assert!(error.contains("tensor model.embed_tokens.weight has shape [320, 80]"), "{error}");
}

#[test]
fn the_prompts_may_be_a_text() {
    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        check: CheckArgs,
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("text");
    fs::write(&file, "The quick brown fox jumps over the lazy dog, 42 times.").unwrap();
    let model = golden("qwen3/full");
    let report = check(&CheckConfig { text: Some(file.clone()), ..config(&model) }).unwrap();
    assert_eq!(report.verdict, Verdict::Pass);
    let Report { prompts, .. } = &report;
    let lengths: Vec<usize> = prompts.iter().map(|p| p.prompt_tokens).collect();
    assert!(lengths.starts_with(&[1, 16]) && *lengths.last().unwrap() < 128, "{lengths:?}");
    let written: Value = serde_json::to_value(&report).unwrap();
    assert_eq!((&written["verdict"], &written["weights"]), (&json!("pass"), &json!("f32")));
    assert_eq!(written["prompts"][1]["decode"]["positions"], 16);

    let (model, file) = (model.to_str().unwrap(), file.to_str().unwrap());
    let run = |more: &[&str]| {
        let args = ["check", model, "--text", file].into_iter().chain(more.iter().copied());
        Command::try_parse_from(args).unwrap().check.run()
    };
    assert!(run(&["--prompt-tokens", "3,5", "--print", "json"]).unwrap());
    assert!(!run(&["--prompt-tokens", "3", "--bound", "0"]).unwrap());
    let error = run(&["--prompt-tokens", "200"]).unwrap_err().to_string();
    assert!(error.ends_with(" (the text's tokens)"), "{error}");
}
