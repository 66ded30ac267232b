//! Compares with transformers; see tests/golden/make/ropes.py.

use std::path::Path;

use overfill_kv::{BlockId, KvDtype, blocks_for};
use serde::Deserialize;
use serde_json::Value;

use crate::{
    Engine, ModelConfig, Outputs, Rows, SequenceSlice, Want, WeightFormat, Weights, cpu::CpuEngine, no_layers, report,
};

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    model: String,
    fields: serde_json::Map<String, Value>,
    frequencies: Vec<f32>,
    attention_factor: f32,
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    tokens: u32,
    top: Vec<(u32, f32)>,
}

#[test]
fn every_kind_is_that_of_transformers_before_and_beyond_the_original_context() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    let cases: Golden = serde_json::from_slice(&std::fs::read(golden.join("ropes.json")).unwrap()).unwrap();
    for Case { model, fields, frequencies, attention_factor, prompts } in cases.cases {
        let folder = golden.join(model);
        let mut json: Value = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
        let label = serde_json::to_string(&fields).unwrap();
        json.as_object_mut().unwrap().extend(fields);
        let config = ModelConfig::from_json(&folder.join("config.json"), json).unwrap();
        let longest = prompts.iter().map(|prompt| prompt.tokens).max().unwrap() as usize;
        assert!(config.max_position_embeddings >= longest, "{label}");
        let got = &config.inverse_frequencies()[0];
        assert_eq!(got.len(), frequencies.len());
        for (got, expected) in got.iter().zip(&frequencies) {
            assert!((got - expected).abs() <= 2e-6 * expected, "{label}: {got}, not {expected}");
        }
        assert!((config.ropes[0].attention_factor() - attention_factor).abs() < 1e-6, "{label}");

        let weights = Weights::open(&folder).unwrap();
        let blocks: Vec<BlockId> = (0..blocks_for(longest) as u32).map(BlockId).collect();
        for rows in [Rows::Few, Rows::Many] {
            let format = WeightFormat::F32;
            let mut engine = CpuEngine::load(&config, &weights, format, rows, KvDtype::F32, blocks.len()).unwrap();
            for Prompt { tokens, top } in &prompts {
                // The formula of long_prompts.py.
                let tokens: Vec<u32> = (0..*tokens).map(|i| 4 + (i * i * 37 + i * 11) % 316).collect();
                let slice = SequenceSlice { tokens: &tokens, start: 0, blocks: &blocks, want: Want::LastLogits };
                let mut out = Outputs::default();
                engine.run(&[slice], &no_layers(), &mut out).unwrap();
                for (token, expected) in top {
                    let got = report(out.logits().row(0), *token, 0).logprob;
                    assert!((got - expected).abs() < 1e-3, "{label} {} tokens: {got}, not {expected}", tokens.len());
                }
            }
        }
    }
}
