//! Heads of all widths. The golden models have narrow ones only.

use std::collections::HashMap;

use overfill_kv::KvDtype;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{KV_BLOCKS, conversation, difference, gpu, options};
use crate::{ModelConfig, Rows, WeightFormat, Weights, cpu::CpuEngine, cuda::CudaEngine};

const VOCAB_SIZE: usize = 64;

/// A model of one layer, with heads of this width and weights that look random.
fn with_heads(head_dim: usize) -> (TempDir, ModelConfig, Weights) {
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/llama-untied/full/config.json");
    let mut config: HashMap<String, Value> = serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap();
    let fields = [
        ("head_dim", head_dim),
        ("hidden_size", 48),
        ("intermediate_size", 64),
        ("num_hidden_layers", 1),
        ("num_attention_heads", 4),
        ("num_key_value_heads", 2),
        ("vocab_size", VOCAB_SIZE),
    ];
    config.extend(fields.map(|(name, value)| (name.to_owned(), json!(value))));
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), serde_json::to_vec(&config).unwrap()).unwrap();
    let config = ModelConfig::from_folder(folder.path()).unwrap();
    let mut state = 1_u32;
    let mut random = |width: usize| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * (3.0 / width as f32).sqrt()
    };
    let mut tensors = Vec::new();
    for (name, shape) in config.tensor_shapes() {
        let (count, width) = (shape.iter().product::<usize>(), *shape.last().unwrap());
        let values: Vec<u8> = (0..count).flat_map(|_| random(width).to_le_bytes()).collect();
        tensors.push((name, shape, values));
    }
    let views = tensors
        .iter()
        .map(|(name, shape, values)| (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), values).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    let weights = Weights::open(folder.path()).unwrap();
    (folder, config, weights)
}

#[test]
fn heads_of_all_widths_agree_with_the_cpu() {
    if !gpu() {
        return;
    }
    for head_dim in [40, 64, 96, 128, 130, 200, 256] {
        let (_folder, config, weights) = with_heads(head_dim);
        let (f32, few, kv) = (WeightFormat::F32, Rows::Few, KvDtype::F32);
        let mut cpu = CpuEngine::load(&config, &weights, f32, few, kv, KV_BLOCKS).unwrap();
        let expected = conversation(&mut cpu, &config);
        let scale = expected.iter().flatten().fold(0.0_f32, |most, l| most.max(l.abs()));
        for (kv, tolerance) in [(KvDtype::F16, 0.01), (KvDtype::Fp8, 0.1)] {
            let options = options(WeightFormat::F16, kv);
            let mut gpu = CudaEngine::load(0, &config, &weights, &options, KV_BLOCKS).unwrap();
            let difference = difference(&conversation(&mut gpu, &config), &expected);
            println!("heads of {head_dim}, kv {kv}: {:.4} of the greatest logit", difference / scale);
            assert!(difference < tolerance * scale, "heads of {head_dim}, kv {kv}: {difference} of {scale}");
        }
    }
    let (_folder, config, weights) = with_heads(258);
    let refused = CudaEngine::load(0, &config, &weights, &options(WeightFormat::F16, KvDtype::F16), KV_BLOCKS);
    assert!(refused.err().unwrap().to_string().contains("even numbers up to 256"));
}
