//! Tokenizers and chat templates of the golden models produce the same token ids as transformers.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use overfill_text::{ChatMessage, TextFiles, TextModel};
use proptest::prelude::*;
use serde_json::Value;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden")
}

fn model(pair: &str) -> TextModel {
    TextModel::from_files(&TextFiles::from_folder(&golden().join(pair).join("full")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn text_and_chat_as_transformers() {
    for pair in ["llama-depth", "llama-tied", "llama-untied", "qwen2", "qwen3"] {
        let expected: Value =
            serde_json::from_slice(&std::fs::read(golden().join(pair).join("expected.json")).unwrap()).unwrap();
        let model = model(pair);
        let text = expected["text"]["text"].as_str().unwrap();
        assert_eq!(model.encode(text, true).unwrap(), ids(&expected["text"]["ids"]), "{pair}");
        assert_eq!(model.decode(&ids(&expected["text"]["ids"]), true).unwrap(), text);
        let messages: Vec<ChatMessage> = serde_json::from_value(expected["chat"]["messages"].clone()).unwrap();
        assert_eq!(model.encode_chat(&messages, true).unwrap(), ids(&expected["chat"]["ids"]), "{pair}");
        assert_eq!(model.eos_token_ids(), [1]);
        assert_eq!(model.tokenizer_sha256().len(), 64);
    }
}

/// Tests 0 to 19 pending bytes before the character. From 16 pending tokens on, the detokenizer returns text that can't
/// change any more.
#[test]
fn ids_without_a_text_do_not_break_a_character() {
    let model = model("llama-tied");
    let [lead, rest] = model.encode("\u{7c0}", false).unwrap()[..] else { panic!("a character of two tokens") };
    for before in 0..20 {
        let ids = [&vec![rest; before][..], &[lead, 5000, 5001, rest, 5002]].concat();
        let mut decoder = model.detokenizer(&[5003], false).unwrap();
        let pieces: String = ids.iter().map(|id| decoder.push(*id).unwrap()).collect();
        assert_eq!(pieces + &decoder.flush().unwrap(), model.decode(&ids, false).unwrap(), "{before}");
    }
}

#[test]
fn a_tokenizer_that_its_reader_panics_at_is_an_error() {
    let tokenizer_json =
        br#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": {"type": "ByteLevel", 1: 2},
        "model": {"type": "BPE", "vocab": {}, "merges": []}}"#;
    let files = TextFiles { tokenizer_json: tokenizer_json.to_vec(), ..TextFiles::default() };
    assert!(TextModel::from_files(&files).err().unwrap().to_string().starts_with("tokenizer.json: "));
}

#[test]
fn templates_of_older_folders() {
    let mut files = TextFiles::from_folder(&golden().join("qwen2/full")).unwrap();
    files.chat_template = None;
    files.special_tokens_map_json = None;
    files.tokenizer_config_json = Some(
        br#"{"bos_token": {"content": "<|bos|>"}, "chat_template": [{"name": "tool_use", "template": "x"},
             {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"}]}"#
            .to_vec(),
    );
    let model = TextModel::from_files(&files).unwrap();
    assert_eq!(model.encode_chat(&[ChatMessage::new("user", "")], true).unwrap(), [0]);
    files.tokenizer_config_json = None;
    let e = TextModel::from_files(&files).unwrap().encode_chat(&[], true).unwrap_err();
    assert!(e.to_string().contains("no chat template"));
}

#[test]
fn characters_never_break() {
    let model = model("llama-tied");
    let text = "naïve 日本語 👩‍🚀 end";
    let tokens = model.encode(text, false).unwrap();
    let mut stream = model.detokenizer(&[], true).unwrap();
    let pieces: Vec<String> = tokens.iter().map(|t| stream.push(*t).unwrap()).collect();
    assert!(pieces.iter().all(|p| !p.contains('\u{fffd}')), "{pieces:?}");
    assert_eq!(pieces.concat(), text);
    assert_eq!(stream.flush().unwrap(), "");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    /// Arbitrary tokens, including invalid bytes, special tokens and ids outside the vocabulary.
    #[test]
    fn pieces_joined_are_the_whole(tokens in prop::collection::vec(0u32..330, 0..80), skip in any::<bool>()) {
        let model = model_once();
        let mut stream = model.detokenizer(&[], skip).unwrap();
        let mut text = String::new();
        for token in &tokens {
            text += &stream.push(*token).unwrap();
        }
        text += &stream.flush().unwrap();
        prop_assert_eq!(text, model.decode(&tokens, skip).unwrap());
    }

    /// Runs of single-byte tokens, the worst case for text that is held back.
    #[test]
    fn bytes_joined_are_the_whole(tokens in prop::collection::vec(192u32..262, 0..80)) {
        let model = model_once();
        let mut stream = model.detokenizer(&[], true).unwrap();
        let text: String = tokens.iter().map(|t| stream.push(*t).unwrap()).collect();
        prop_assert_eq!(text + &stream.flush().unwrap(), model.decode(&tokens, true).unwrap());
    }
}

fn model_once() -> &'static TextModel {
    static MODEL: std::sync::OnceLock<TextModel> = std::sync::OnceLock::new();
    MODEL.get_or_init(|| model("llama-tied"))
}
