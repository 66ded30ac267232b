//! The committed demo pair reaches the documented quality.

use std::path::Path;

use overfill_distill::demo::{data, recipe};

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
    let (alone, pair) = recipe::score(&full, &decode, &dir.path().join("held-out.jsonl")).unwrap();
    assert!(alone.exact_match >= 0.95 && pair.exact_match >= 0.95, "{alone:?} {pair:?}");
}
