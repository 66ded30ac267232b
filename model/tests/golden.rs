//! Compares with the golden pairs: results of PyTorch with the same weights, in one process and with one cache.

// The lint exempts `#[test]` functions, but not their shared helpers.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use overfill_kv::{BLOCK_TOKENS, BlockId, KvDtype, OutputToken, blocks_for};
use overfill_model::{
    LoadOptions, Logits, Model, ModelError, Outputs, Rows, SequenceSlice, Want, WeightFormat, no_layers, report,
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Expected {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    prompt: Vec<u32>,
    two_stage: Vec<Step>,
    full_only: Vec<Step>,
}

#[derive(Deserialize)]
struct Step {
    token: u32,
    top: Vec<(u32, f32)>,
}

const PAIRS: [&str; 12] = [
    "llama-tied",
    "llama-untied",
    "llama-depth",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "phi3",
    "smollm3",
    "olmo2",
    "granite",
];

fn folder(pair: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(pair)
}

fn expected(pair: &str) -> Expected {
    let read =
        |file: &str| -> Expected { serde_json::from_slice(&std::fs::read(folder(pair).join(file)).unwrap()).unwrap() };
    let mut expected = read("expected.json");
    expected.cases.extend(read("long.json").cases);
    expected
}

/// Enough blocks for the longest prompt and its output.
const KV_BLOCKS: usize = 512;

fn load(pair: &str, which: &str, rows: Rows, options: &LoadOptions) -> Model {
    Model::load(&folder(pair).join(which), &LoadOptions { rows, ..*options }, KV_BLOCKS).unwrap()
}

fn forward(model: &mut Model, batch: &[SequenceSlice<'_>]) -> Logits {
    let mut out = Outputs::default();
    model.engine().run(batch, &no_layers(), &mut out).unwrap();
    out.logits().clone()
}

/// Prefills `prompt` in chunks of `chunk` tokens. Returns the first output token.
fn prefill(model: &mut Model, prompt: &[u32], blocks: &[BlockId], chunk: usize) -> OutputToken {
    let mut start = 0;
    loop {
        let tokens = &prompt[start..prompt.len().min(start + chunk)];
        let last = start + tokens.len() == prompt.len();
        let want = if last { Want::LastLogits } else { Want::Nothing };
        let logits = forward(model, &[SequenceSlice { tokens, start, blocks, want }]);
        if last {
            return greedy(logits.row(0));
        }
        start += tokens.len();
    }
}

fn greedy(logits: &[f32]) -> OutputToken {
    let best = report(logits, 0, 1).top[0].0;
    report(logits, best, 5)
}

/// Copies what is due of a prompt of `tokens` tokens from the full model's cache, like a handoff. Everything else is NaN.
fn hand_over(full: &Model, decode: &Model, blocks: &[BlockId], tokens: usize) {
    let (from, to, schema) = (full.kv(), decode.kv(), decode.kv_schema());
    let due = schema.due_blocks(0, tokens as u32);
    for (wire, (layer, due)) in schema.layers.iter().zip(due).enumerate() {
        to.write(wire, blocks, &mut |_, b| b.fill(0xff)).unwrap();
        let blocks = &blocks[due.start as usize..due.end as usize];
        let mut bytes: Vec<Vec<u8>> = Vec::new();
        from.read(*layer as usize, blocks, &mut |_, b| bytes.push(b.to_vec())).unwrap();
        to.write(wire, blocks, &mut |i, b| b.copy_from_slice(&bytes[i])).unwrap();
    }
}

/// Generates `steps` tokens greedily with both stages.
fn generate(full: &mut Model, decode: &mut Model, prompt: &[u32], steps: usize, chunk: usize) -> Vec<OutputToken> {
    // Block tables may be in any order and start at any block.
    let count = blocks_for(prompt.len() + steps);
    let blocks: Vec<BlockId> = (0..count as u32).map(|b| BlockId(count as u32 + 1 - b)).collect();
    let mut out = vec![prefill(full, prompt, &blocks, chunk)];
    hand_over(full, decode, &blocks, prompt.len());
    for step in 1..steps {
        let tokens = [out[step - 1].token];
        let slice =
            SequenceSlice { tokens: &tokens, start: prompt.len() + step - 1, blocks: &blocks, want: Want::LastLogits };
        let logits = forward(decode, &[slice]);
        out.push(greedy(logits.row(0)));
    }
    out
}

/// Greatest difference of a log-probability. Asserts equal tokens, and stops at the first different token whose step is
/// too close to call.
fn compare(got: &[OutputToken], expected: &[Step], label: &str) -> f32 {
    let mut greatest = 0.0_f32;
    for (i, (got, step)) in got.iter().zip(expected).enumerate() {
        if step.top[0].1 - step.top[1].1 < 0.02 && got.token != step.token {
            break;
        }
        assert_eq!(got.token, step.token, "{label} step {i}");
        for (token, logprob) in &step.top {
            if let Some(found) = got.top.iter().find(|t| t.0 == *token) {
                greatest = greatest.max((found.1 - logprob).abs());
            }
        }
        assert!((got.top[0].1 - step.top[0].1).abs() < 0.5, "{label} step {i}");
    }
    greatest
}

#[test]
fn two_stage_and_full_only_hold_in_f32() {
    let options = LoadOptions::default();
    for pair in PAIRS {
        // Loaded as the nodes load them.
        let mut full = load(pair, "full", Rows::Many, &options);
        let [mut full_decode, mut decode] = ["full", "decode"].map(|which| load(pair, which, Rows::Few, &options));
        full.producer_schema().check_consumer(&decode.kv_schema()).unwrap();
        for (n, case) in expected(pair).cases.iter().enumerate() {
            for chunk in [BLOCK_TOKENS, 1000] {
                for (decoder, steps, arm) in
                    [(&mut decode, &case.two_stage, "two_stage"), (&mut full_decode, &case.full_only, "full_only")]
                {
                    let got = generate(&mut full, decoder, &case.prompt, steps.len(), chunk);
                    let distance = compare(&got, steps, &format!("{pair} case {n} {arm} chunk {chunk}"));
                    assert!(distance < 1e-3, "{pair} case {n} {arm} chunk {chunk}: {distance}");
                }
            }
        }
    }
}

/// Coarser types change the log-probabilities; the test prints by how much. These models are small and have random
/// weights, so rounding errors hardly average out. The bounds distinguish rounding from a wrong layout, which gives
/// differences above 15.
#[test]
fn narrow_types_stay_near() {
    for (weights, kv_dtype, bound) in [
        (WeightFormat::Bf16, KvDtype::Bf16, 0.6),
        (WeightFormat::F16, KvDtype::F16, 0.1),
        (WeightFormat::F32, KvDtype::Bf16, 0.5),
        (WeightFormat::Int8, KvDtype::F32, 3.0),
        (WeightFormat::Int8Channel, KvDtype::F32, 4.0),
        (WeightFormat::Int4, KvDtype::F32, 12.0),
    ] {
        let options = LoadOptions { weights, kv_dtype, ..LoadOptions::default() };
        for pair in PAIRS {
            let mut full = load(pair, "full", Rows::Many, &options);
            let mut decode = load(pair, "decode", Rows::Few, &options);
            let mut greatest = 0.0_f32;
            for case in &expected(pair).cases {
                // One step of each stage only: later steps follow tokens that rounding may change.
                let got = generate(&mut full, &mut decode, &case.prompt, 2, 1000);
                for (got, step) in got.iter().zip(&case.two_stage) {
                    for (token, logprob) in &step.top {
                        if let Some(found) = got.top.iter().find(|t| t.0 == *token) {
                            greatest = greatest.max((found.1 - logprob).abs());
                        }
                    }
                    if got.token != step.token {
                        break;
                    }
                }
            }
            println!("{pair}: weights {weights}, kv {kv_dtype}: greatest distance of a log-probability {greatest:.4}");
            assert!(greatest < bound, "{pair} {weights} {kv_dtype}: {greatest}");
        }
    }
}

#[test]
fn a_batch_gives_what_each_gives_alone() {
    let formats = [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::F16, WeightFormat::Int8, WeightFormat::Int4];
    let pairs = ["llama-tied", "qwen3", "gemma2", "gemma3"].into_iter();
    let models = pairs.flat_map(|pair| [Rows::Few, Rows::Many].map(|rows| (pair, rows)));
    // KV in bf16, for which prefill may use bf16 arithmetic.
    for ((pair, rows), weights) in models.flat_map(|model| formats.map(|weights| (model, weights))) {
        let options = LoadOptions { weights, kv_dtype: KvDtype::Bf16, ..LoadOptions::default() };
        let mut model = load(pair, "full", rows, &options);
        let cases = expected(pair).cases;
        let mut next = 0_u32;
        let tables: Vec<Vec<BlockId>> = cases
            .iter()
            .map(|case| {
                let count = blocks_for(case.prompt.len()) as u32;
                next += count;
                (next - count..next).map(BlockId).collect()
            })
            .collect();
        let batch: Vec<SequenceSlice<'_>> = cases
            .iter()
            .zip(&tables)
            .map(|(case, blocks)| SequenceSlice { tokens: &case.prompt, start: 0, blocks, want: Want::LastLogits })
            .collect();
        let together = forward(&mut model, &batch);
        assert_eq!(together.rows(), cases.len());
        for (i, slice) in batch.iter().enumerate() {
            assert_eq!(forward(&mut model, &[*slice]).row(0), together.row(i), "{weights} {rows:?} {pair} case {i}");
        }
    }
}

#[test]
fn faults_of_a_folder_are_one_line() {
    let copy = |change: &dyn Fn(&Path)| -> String {
        let folder_copy = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(folder("llama-tied").join("full")).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), folder_copy.path().join(entry.file_name())).unwrap();
        }
        change(folder_copy.path());
        let error: ModelError = Model::load(folder_copy.path(), &LoadOptions::default(), 1).err().unwrap();
        assert!(!error.to_string().contains('\n'));
        error.to_string()
    };
    let edit = |field: &'static str, value: serde_json::Value| {
        move |folder: &Path| {
            let file = folder.join("config.json");
            let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
            config[field] = value.clone();
            std::fs::write(&file, config.to_string()).unwrap();
        }
    };
    let wrong = copy(&edit("intermediate_size", 161.into()));
    assert!(
        wrong.contains("model.safetensors: tensor model.layers.0.mlp.gate_proj.weight has shape [160, 64]"),
        "{wrong}"
    );
    assert!(wrong.contains("asks for [161, 64]"), "{wrong}");
    let missing = copy(&edit("tie_word_embeddings", false.into()));
    assert!(missing.contains("tensor lm_head.weight is missing"), "{missing}");
    let none = copy(&|folder| std::fs::remove_file(folder.join("model.safetensors")).unwrap());
    assert!(none.contains("model.safetensors: No such file"), "{none}");
    let broken = copy(&|folder| std::fs::write(folder.join("model.safetensors"), b"not weights").unwrap());
    assert!(broken.contains("model.safetensors: "), "{broken}");
}
