//! What structured output costs per token: finding out which tokens may come next, and taking the next one.
//!
//!     OVERFILL_TOKENIZER=FOLDER cargo bench -p overfill-text --bench grammar
//!
//! FOLDER has a tokenizer.json. Its vocabulary determines the time.

#![allow(clippy::unwrap_used, missing_docs, reason = "a benchmark")]

use std::{path::PathBuf, sync::Arc};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use overfill_kv::Grammar;
use overfill_text::{Grammars, TextFiles, TextModel};
use serde_json::json;

fn grammars(c: &mut Criterion) {
    let golden = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/qwen3/full");
    let folder = std::env::var_os("OVERFILL_TOKENIZER").map_or_else(golden, PathBuf::from);
    let files = TextFiles::from_folder(&folder).unwrap();
    let model = TextModel::from_files(&files).unwrap();
    let grammars = Grammars::new(Arc::new(files), model.vocab_size(), model.eos_token_ids());
    let person = json!({
        "type": "object", "additionalProperties": false, "required": ["name", "age", "tags"],
        "properties": {
            "name": {"type": "string"}, "age": {"type": "integer", "minimum": 0},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
    });
    let text = r#"{"name": "Ada Lovelace, countess", "age": 36, "tags": ["mathematics", "first programs", "poetry"]}"#;
    let cases = [
        ("any object", Grammar::Json(json!({"type": "object"}).to_string()), text),
        ("schema", Grammar::Json(person.to_string()), text),
        ("regex", Grammar::Regex("([a-z]+ [0-9]{2,4}, ?)+".into()), "some 123, words 42, and 2024, years 99, "),
    ];
    let mut group = c.benchmark_group(format!("{} tokens", model.vocab_size()));
    for (name, grammar, text) in cases {
        let tokens = model.encode(text, false).unwrap();
        group.throughput(Throughput::Elements(tokens.len() as u64));
        group.bench_function(name, |bench| {
            bench.iter(|| {
                let mut matcher = grammars.matcher(&grammar).unwrap();
                for token in &tokens {
                    std::hint::black_box(matcher.allowed().unwrap());
                    matcher.accept(*token).unwrap();
                }
            });
        });
    }
    group.finish();
}

criterion_group!(benches, grammars);
criterion_main!(benches);
