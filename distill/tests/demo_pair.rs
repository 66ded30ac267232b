//! The committed demo pair reaches the documented quality.

use std::path::Path;

use candle_core::{DType, Device};
use overfill_distill::{demo::data, eval::Arm, examples};

#[test]
fn the_demo_pair_answers_held_out_prompts() {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo");
    let (full, decode) = (demo.join("full"), demo.join("decode"));
    let dir = tempfile::tempdir().unwrap();
    let sizes = data::DataConfig { seed: 77, conversations: 0, more_conversations: 0, pairs: 0, held_out: 60 };
    data::write(dir.path(), &sizes).unwrap();
    // The code writes the same text files as the committed ones.
    for file in ["tokenizer.json", "chat_template.jinja", "generation_config.json"] {
        let written = std::fs::read(dir.path().join("full").join(file)).unwrap();
        assert_eq!(written, std::fs::read(full.join(file)).unwrap(), "{file}");
        assert_eq!(written, std::fs::read(decode.join(file)).unwrap(), "{file}");
    }
    let examples = examples(&dir.path().join("held-out.jsonl"), &full, 2048).unwrap();
    let alone = Arm::alone(&full, DType::F32, &Device::Cpu).unwrap().score(&examples, 30).unwrap();
    let pair = Arm::two_stage(&full, &decode, DType::F32, &Device::Cpu).unwrap().score(&examples, 30).unwrap();
    assert!(alone.exact_match >= 0.95 && pair.exact_match >= 0.95, "{alone:?} {pair:?}");
}
