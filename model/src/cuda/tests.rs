//! The engine on the software GPU, against the CPU engine.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, OnceLock},
};

use overfill_kv::{BlockId, KvDtype, SamplingParams};
use overfill_software_gpu::{Edit, Error, SoftwareGpu};
use parking_lot::Mutex;

use super::CudaEngine;
use crate::{
    Choice, Engine, LayerSink, LoadOptions, ModelConfig, Outputs, Rows, SamplingContext, SequenceSlice, Want,
    WeightFormat, Weights,
    cpu::CpuEngine,
    engine::tests::{hand_over, spoil_unneeded, turns},
    no_layers,
};

mod heads;
mod kv;
mod sampling;

const PAIRS: [&str; 5] = ["llama-tied", "llama-untied", "llama-depth", "qwen2", "qwen3"];
/// Pairs of families with other blocks.
const OTHER_PAIRS: [&str; 7] = ["mistral", "gemma2", "gemma3", "phi3", "smollm3", "olmo2", "granite"];
const KV_BLOCKS: usize = 24;

/// Chooses a fault of [`faults`] for the software GPU of this process.
const FAULT: &str = "OVERFILL_PLANTED_FAULT";

fn on_real_gpu() -> bool {
    std::env::var_os("OVERFILL_REAL_GPU").is_some()
}

/// Loads the software GPU once; with OVERFILL_REAL_GPU, the tests run on the machine's GPU instead. Without a C++
/// compiler, the tests say so and pass, unless they are required.
fn gpu() -> bool {
    static LOADED: OnceLock<bool> = OnceLock::new();
    *LOADED.get_or_init(|| {
        if on_real_gpu() {
            return true;
        }
        let fault =
            std::env::var(FAULT).ok().map(|name| faults().into_iter().find(|fault| fault.name == name).unwrap());
        let edits: Vec<Edit> = fault.iter().map(|fault| fault.edit.clone()).collect();
        match SoftwareGpu::build(std::env::var_os(SANITIZED).is_some(), &edits) {
            Ok(gpu) => {
                gpu.load().unwrap();
                true
            }
            Err(e @ Error::NoCompiler(_)) if std::env::var_os("OVERFILL_GPU_REQUIRED").is_none() => {
                eprintln!("SKIPPED: tests of the GPU engine: {e}");
                false
            }
            Err(e) => panic!("{e}"),
        }
    })
}

fn options(weights: WeightFormat, kv_dtype: KvDtype) -> LoadOptions {
    LoadOptions { weights, kv_dtype, max_rows: 192, max_sequences: 12, ..LoadOptions::default() }
}

fn golden() -> PathBuf {
    // The tests also run where the repository is not.
    let golden = std::env::var_os("OVERFILL_GOLDEN").map(PathBuf::from);
    golden.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden"))
}

fn open(pair: &str) -> (ModelConfig, Weights) {
    let folder = golden().join(pair).join("full");
    (ModelConfig::from_folder(&folder).unwrap(), Weights::open(&folder).unwrap())
}

fn on_gpu(pair: &str, options: &LoadOptions) -> CudaEngine {
    let (config, weights) = open(pair);
    CudaEngine::load(0, &config, &weights, options, KV_BLOCKS).unwrap()
}

fn on_cpu(pair: &str, weights: WeightFormat, kv_dtype: KvDtype) -> CpuEngine {
    let (config, files) = open(pair);
    CpuEngine::load(&config, &files, weights, Rows::Few, kv_dtype, KV_BLOCKS).unwrap()
}

/// A prompt in chunks next to another sequence, then decode steps of different sizes. Returns all logits.
/// What a layer's window has left behind is spoilt before each step.
fn conversation(engine: &mut dyn Engine, config: &ModelConfig) -> Vec<Vec<f32>> {
    let layers = config.num_hidden_layers;
    let tokens: Vec<u32> = (0..200).map(|i| i * 7 % config.vocab_size as u32).collect();
    let blocks: Vec<BlockId> = (0..10).rev().map(BlockId).collect();
    let other: Vec<BlockId> = (10..14).map(BlockId).collect();
    let slice = |tokens, start, blocks, want| SequenceSlice { tokens, start, blocks, want };
    let mut steps = vec![
        vec![
            slice(&tokens[..70], 0, &blocks[..], Want::Nothing),
            slice(&tokens[3..20], 0, &other[..], Want::AllLogits),
        ],
        vec![
            slice(&tokens[9..10], 17, &other[..], Want::LastLogits),
            slice(&tokens[70..147], 70, &blocks[..], Want::LastLogits),
        ],
        vec![slice(&tokens[147..148], 147, &blocks[..], Want::LastLogits)],
    ];
    for i in 148..151 {
        let next = slice(&tokens[i..=i], i, &blocks[..], Want::LastLogits);
        steps.push(vec![slice(&tokens[i..=i], i - 130, &other[..], Want::LastLogits), next]);
    }
    let mut out = Outputs::default();
    let mut logits = Vec::new();
    for batch in &steps {
        for slice in batch {
            spoil_unneeded(engine, config, slice.blocks, slice.start);
        }
        let heard = Arc::new(Mutex::new(Vec::new()));
        let hears = heard.clone();
        let sink: Arc<dyn LayerSink> = Arc::new(move |layer| hears.lock().push(layer));
        engine.run(batch, &sink, &mut out).unwrap();
        assert_eq!(*heard.lock(), (0..layers).collect::<Vec<_>>());
        logits.extend((0..out.logits().rows()).map(|row| out.logits().row(row).to_vec()));
    }
    logits
}

/// The greatest difference of two logits.
fn difference(got: &[Vec<f32>], expected: &[Vec<f32>]) -> f32 {
    assert!(!got.is_empty() && got.len() == expected.len());
    let pairs = got.iter().zip(expected).flat_map(|(got, expected)| got.iter().zip(expected));
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, |most, d| if d.is_nan() { f32::INFINITY } else { d.max(most) })
}

/// These models are small and sharp, so rounding shows: f16 has 3 bits more than bf16, and differs 8 times less. A wrong
/// layout or a missing barrier gives differences as large as the logits.
#[test]
fn all_families_agree_with_the_cpu() {
    if !gpu() {
        return;
    }
    for pair in PAIRS.into_iter().chain(OTHER_PAIRS) {
        let (config, _) = open(pair);
        let mut cpu = on_cpu(pair, WeightFormat::F32, KvDtype::F32);
        let expected = conversation(&mut cpu, &config);
        let scale = expected.iter().flatten().fold(0.0_f32, |most, l| most.max(l.abs()));
        let formats = [
            (WeightFormat::F16, KvDtype::F16, 0.01),
            (WeightFormat::Bf16, KvDtype::Fp8, 0.35),
            (WeightFormat::Bf16, KvDtype::Bf16, 0.07),
            (WeightFormat::Int8, KvDtype::F16, 0.15),
            (WeightFormat::Fp8, KvDtype::Bf16, 0.7),
        ];
        // Products are the same in all families, and the software GPU takes long.
        let count = if OTHER_PAIRS.contains(&pair) { 2 } else { formats.len() };
        for (weights, kv, tolerance) in formats.into_iter().take(count) {
            let got = conversation(&mut on_gpu(pair, &options(weights, kv)), &config);
            let difference = difference(&got, &expected);
            println!("{pair}, {weights}, kv {kv}: {:.4} of the greatest logit", difference / scale);
            assert!(difference < tolerance * scale, "{pair}, {weights}, kv {kv}: {difference} of {scale}");
        }
    }
}

/// Quantised weights have the values of the CPU's.
#[test]
fn quantisation_agrees_with_the_cpu() {
    if !gpu() {
        return;
    }
    for weights in [WeightFormat::Int8, WeightFormat::Int4] {
        let (config, _) = open("llama-untied");
        let expected = conversation(&mut on_cpu("llama-untied", weights, KvDtype::F16), &config);
        let scale = expected.iter().flatten().fold(0.0_f32, |most, l| most.max(l.abs()));
        let got = conversation(&mut on_gpu("llama-untied", &options(weights, KvDtype::F16)), &config);
        let difference = difference(&got, &expected);
        // The CPU also rounds activations to 8 bits.
        assert!(difference < 0.05 * scale, "{weights}: {difference} of {scale}");
    }
}

#[test]
fn blocks_travel_out_of_and_into_device_memory() {
    if !gpu() {
        return;
    }
    let engine = on_gpu("qwen3", &options(WeightFormat::Bf16, KvDtype::Bf16));
    let kv = engine.kv();
    let blocks = [4, 5, 6, 1, 9, 23].map(BlockId);
    for layer in 0..kv.num_layers() {
        kv.write(layer, &blocks, &mut |i, bytes| bytes.fill((i * 3 + layer) as u8)).unwrap();
    }
    for layer in 0..kv.num_layers() {
        let mut seen = Vec::new();
        kv.read(layer, &blocks, &mut |i, bytes| {
            assert!(bytes.len() == kv.block_bytes() && bytes.iter().all(|byte| *byte == (i * 3 + layer) as u8));
            seen.push(i);
        })
        .unwrap();
        assert_eq!(seen, [0, 1, 2, 3, 4, 5]);
    }
    assert!(kv.read(0, &[BlockId(KV_BLOCKS as u32)], &mut |_, _| ()).is_err());
}

#[test]
fn siblings_share_their_kv() {
    if !gpu() {
        return;
    }
    let options = options(WeightFormat::Bf16, KvDtype::Bf16);
    let decode = golden().join("llama-tied/decode");
    let (config, weights) = (ModelConfig::from_folder(&decode).unwrap(), Weights::open(&decode).unwrap());
    let mut full = on_gpu("llama-tied", &options);
    let mut apart = CudaEngine::load(0, &config, &weights, &options, KV_BLOCKS).unwrap();
    let expected = turns(&mut full, &mut apart, hand_over);
    let mut sibling = full.load_sibling(&config, &weights, &options).unwrap();
    assert_eq!(turns(&mut full, &mut *sibling, |_, _, _| {}), expected);
}

#[test]
fn batches_without_room_are_refused() {
    if !gpu() {
        return;
    }
    let mut engine = on_gpu("llama-tied", &options(WeightFormat::Bf16, KvDtype::Bf16));
    let tokens = vec![1; 193];
    let blocks: Vec<BlockId> = (0..13).map(BlockId).collect();
    let batch = [SequenceSlice { tokens: &tokens, start: 0, blocks: &blocks, want: Want::Nothing }];
    let error = engine.run(&batch, &no_layers(), &mut Outputs::default()).unwrap_err().to_string();
    assert_eq!(error, "device cuda:0: a batch has 193 tokens, at most 192 were allocated");
}

#[test]
fn options_that_gpus_lack_are_refused() {
    if !gpu() {
        return;
    }
    let (config, weights) = open("llama-tied");
    let refused =
        |format, kv| CudaEngine::load(0, &config, &weights, &options(format, kv), KV_BLOCKS).err().unwrap().to_string();
    assert!(refused(WeightFormat::F32, KvDtype::Bf16).contains("weights are f32, supported on GPUs: bf16"));
    assert!(refused(WeightFormat::Bf16, KvDtype::F32).contains("kv is f32, supported on GPUs: bf16"));
    assert!(refused(WeightFormat::F16, KvDtype::Bf16).contains("use one type for both"));
    let most = CudaEngine::load(0, &config, &weights, &options(WeightFormat::Bf16, KvDtype::Bf16), 1 << 24);
    assert!(most.err().unwrap().to_string().contains("would fit"));
}

/// Tokens do not depend on the step in which they were computed.
#[test]
fn a_chosen_token_is_the_same_alone_and_in_a_batch() {
    if !gpu() {
        return;
    }
    let mut engine = on_gpu("llama-tied", &options(WeightFormat::F16, KvDtype::F16));
    let tokens: Vec<u32> = (1..20).collect();
    let params = SamplingParams { seed: 5, ..SamplingParams::default() };
    let next = Want::Next(Choice { params: &params, context: SamplingContext::following(&tokens, &[]) });
    let tables: Vec<Vec<BlockId>> = (0..12).map(|i| vec![BlockId(2 * i), BlockId(2 * i + 1)]).collect();
    let mut run = |count: usize| {
        let slice = |blocks| SequenceSlice { tokens: &tokens, start: 0, blocks, want: next };
        let batch: Vec<_> = tables[..count].iter().map(|table| slice(&table[..])).collect();
        let mut out = Outputs::default();
        engine.run(&batch, &no_layers(), &mut out).unwrap();
        (0..count).map(|i| out.take_next(i).unwrap().token).collect::<Vec<_>>()
    };
    let alone = run(1);
    assert!(run(10).iter().all(|token| *token == alone[0]));
}

/// Set in processes with AddressSanitizer.
const SANITIZED: &str = "OVERFILL_SANITIZED_GPU";

struct Fault {
    name: &'static str,
    edit: Edit,
    /// The test that must fail.
    test: &'static str,
    /// What the process says when it finds the fault.
    found: &'static str,
}

/// Faults of kinds that are easily made in kernels.
fn faults() -> Vec<Fault> {
    let fault = |name, file, from, to, found| {
        let test = match file {
            "block_sums.cu" => "kv::blocks_are_summed_where_they_lie",
            "sample.cu" => "sampling::the_device_chooses_what_the_host_chooses",
            _ => AGREES,
        };
        Fault { name, edit: Edit { file, from, to }, test, found }
    };
    vec![
        fault("twice", "block_sums.cu", "last && part == 0", "last", " bytes, "),
        fault("choice-barrier", "sample.cu", "__syncthreads();", "", " of "),
        fault("ties", "sample.cu", "at <= token", "at < token", " instead of "),
        fault("barrier", "matmul.cu", "__syncthreads();", "", " of "),
        fault("warp-barrier", "decode_attention.cu", "__syncwarp();", "", " of "),
        fault("misaligned", "matmul.cu", "+ t * 16, *high", "+ t * 16 + 2, *high", "misaligned address"),
        fault(
            "past-the-end",
            "rows.cu",
            "i < p.half; i += blockDim.x",
            "i <= p.half; i += blockDim.x",
            "heap-buffer-overflow",
        ),
        fault("uninitialised", "prefill_attention.cu", "out[n][i] = 0;", ";", " of "),
        fault(
            "divergent",
            "decode_attention.cu",
            "__syncwarp();",
            "if (lane == 0) return; __syncwarp();",
            "meets without",
        ),
        fault("fragment", "matmul.cu", "pair_of(b, i), pair_of(b, i + 1)", "pair_of(b, i + 1), pair_of(b, i)", " of "),
    ]
}

/// The name of [`one_pair_agrees_closely`].
const AGREES: &str = "one_pair_agrees_closely";

/// The test that most planted faults must fail: one pair, in f16, whose tolerance is small.
#[test]
fn one_pair_agrees_closely() {
    if !gpu() {
        return;
    }
    let (config, _) = open("llama-untied");
    let expected = conversation(&mut on_cpu("llama-untied", WeightFormat::F32, KvDtype::F32), &config);
    let got = conversation(&mut on_gpu("llama-untied", &options(WeightFormat::F16, KvDtype::F16)), &config);
    let scale = expected.iter().flatten().fold(0.0_f32, |most, l| most.max(l.abs()));
    let difference = difference(&got, &expected);
    assert!(difference < 0.01 * scale, "{difference} of {scale}");
}

/// Runs a test in a process of its own, with AddressSanitizer. Returns whether it passed, and what it said.
fn in_a_process(test: &str, seed: u32, fault: Option<&str>) -> (bool, String) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([&format!("cuda::tests::{test}"), "--exact"]).env("SOFTWARE_GPU_SEED", seed.to_string());
    command.env(SANITIZED, "1").envs(overfill_software_gpu::address_sanitizer().unwrap());
    if let Some(fault) = fault {
        command.env(FAULT, fault);
    }
    let done = command.output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    (done.status.success(), said)
}

#[test]
fn any_order_of_threads_and_streams_gives_the_same() {
    if on_real_gpu() || !gpu() {
        return;
    }
    for (test, seed) in [(AGREES, 1), (AGREES, 2), ("sampling::an_engine_chooses_what_the_host_chooses", 1)] {
        let (passed, said) = in_a_process(test, seed, None);
        assert!(passed && said.contains("1 passed"), "seed {seed}: {said}");
    }
}

#[test]
fn planted_faults_are_found() {
    if on_real_gpu() || !gpu() {
        return;
    }
    for Fault { name, test, found, .. } in faults() {
        let (passed, said) = in_a_process(test, 1, Some(name));
        assert!(!passed && said.contains(found), "{name} was not found: {said}");
    }
}

/// What the compiler said of registers, when it compiled the kernels for real GPUs.
const COMPILED: &str = include_str!(concat!(env!("OUT_DIR"), "/ptxas.txt"));

/// A kernel that spills registers to memory is slow. On the oldest architecture, a few kernels for unusual heads over
/// 8-bit KV do, by a few bytes. The compiler mixes its messages about several architectures, so they can't be told by name.
#[test]
fn kernels_do_not_spill() {
    // A warning repeats the figures of kernels that spill, without the stack frame.
    let lines = COMPILED.lines().filter(|line| line.contains("bytes stack frame"));
    let spills = lines.filter_map(|line| line.split_once(" bytes spill stores"));
    let spills: Vec<usize> = spills.map(|(before, _)| before.rsplit(' ').next().unwrap().parse().unwrap()).collect();
    assert!(spills.len() >= 400, "the compiler reported {} kernels", spills.len());
    assert!(spills.iter().all(|bytes| *bytes <= 16), "a kernel spills {:?} bytes", spills.iter().max());
    let count = spills.iter().filter(|bytes| **bytes > 0).count();
    assert!(count <= 5, "{count} kernels spill");
}
