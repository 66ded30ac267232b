//! Text files built from metadata give the same token ids as the original files.

use candle_core::quantized::{GgmlDType, gguf_file::Value};
use overfill_model::{LoadOptions, Model, text_files};
use overfill_text::{ChatMessage, TextModel};
use serde::Deserialize;
use serde_json::Value as Json;

use super::{golden, here, write, write::Parts, written};

fn text(parts: &Parts) -> TextModel {
    TextModel::from_files(&text_files(written(parts).path()).unwrap()).unwrap()
}

#[test]
fn byte_level_bpe_and_chat_as_the_folder() {
    let expected: Json =
        serde_json::from_slice(&std::fs::read(golden("llama-untied", "expected.json")).unwrap()).unwrap();
    let ids = |value: &Json| serde_json::from_value::<Vec<u32>>(value.clone()).unwrap();
    let mut parts = write::parts(&golden("llama-untied", "full"), GgmlDType::F32);
    let model = text(&parts);
    let sample = expected["text"]["text"].as_str().unwrap();
    assert_eq!(model.encode(sample, true).unwrap(), ids(&expected["text"]["ids"]));
    assert_eq!(model.decode(&ids(&expected["text"]["ids"]), true).unwrap(), sample);
    let messages: Vec<ChatMessage> = serde_json::from_value(expected["chat"]["messages"].clone()).unwrap();
    assert_eq!(model.encode_chat(&messages, true).unwrap(), ids(&expected["chat"]["ids"]));
    // `<|end|>` is recognised by its text.
    assert_eq!(model.eos_token_ids(), [1, 3]);
    assert_eq!(model.vocab_size(), 320);

    parts.set("tokenizer.ggml.add_bos_token", Value::Bool(true));
    parts.set("tokenizer.ggml.eot_token_id", Value::U32(2));
    let model = text(&parts);
    assert_eq!(model.encode(sample, true).unwrap()[..2], [0, ids(&expected["text"]["ids"])[0]]);
    assert_eq!(model.encode(sample, false).unwrap(), ids(&expected["text"]["ids"]));
    assert_eq!(model.eos_token_ids(), [1, 2, 3]);
}

/// The same metadata gives identical bytes, because nodes compare their hash.
#[test]
fn a_tokenizer_beside_the_file_wins_and_one_that_is_made_is_always_the_same() {
    let parts = write::parts(&golden("qwen2", "full"), GgmlDType::F32);
    let (one, two) = (written(&parts), written(&parts));
    assert_eq!(text_files(one.path()).unwrap(), text_files(two.path()).unwrap());

    let original = std::fs::read(golden("qwen2", "full").join("tokenizer.json")).unwrap();
    assert_ne!(text_files(one.path()).unwrap().tokenizer_json, original);
    std::fs::write(one.path().join("tokenizer.json"), &original).unwrap();
    let files = text_files(&one.path().join("model.gguf")).unwrap();
    assert_eq!(files.tokenizer_json, original);
    // Files that are not in the folder still come from the metadata.
    assert!(TextModel::from_files(&files).unwrap().has_chat_template());
    std::fs::write(one.path().join("generation_config.json"), r#"{"eos_token_id": [2]}"#).unwrap();
    // First the id from generation_config.json, then the metadata's eos_token. The model adds `<|end|>` from the
    // metadata.
    assert_eq!(TextModel::from_files(&text_files(one.path()).unwrap()).unwrap().eos_token_ids(), [2, 1]);
    let model = Model::load(one.path(), &LoadOptions::default(), 1).unwrap();
    assert_eq!(model.eos_token_ids(), [2, 1, 3]);
}

/// A vocabulary of all bytes in the byte-level alphabet, the given merges, and two control tokens.
fn byte_level(pre: &str, merges: &[&str]) -> Parts {
    let mut parts = write::parts(&golden("qwen2", "full"), GgmlDType::F32);
    let printable = |byte: &u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let shifted = (0..256).filter(|byte| !printable(byte)).zip(256..).map(|(_, letter)| letter);
    let letters = (0..256).filter(printable).chain(shifted).map(|letter| char::from_u32(letter).unwrap().to_string());
    let merged = merges.iter().map(|merge| merge.replace(' ', ""));
    let tokens: Vec<String> =
        letters.chain(merged).chain(["<|begin_of_text|>".to_string(), "<|eot_id|>".into()]).collect();
    let count = tokens.len();
    let kinds = (0..count).map(|id| Value::I32(if id >= count - 2 { 3 } else { 1 }));
    parts.set("tokenizer.ggml.token_type", Value::Array(kinds.collect()));
    parts.set("tokenizer.ggml.tokens", write::texts(tokens));
    parts.set("tokenizer.ggml.merges", write::texts(merges));
    parts.set("tokenizer.ggml.pre", Value::String(pre.into()));
    parts.set("tokenizer.ggml.bos_token_id", Value::U32(count as u32 - 2));
    parts.set("tokenizer.ggml.eos_token_id", Value::U32(count as u32 - 2));
    parts
}

fn pieces(parts: &Parts, sample: &str) -> Vec<String> {
    let model = text(parts);
    let ids = model.encode(sample, true).unwrap();
    assert_eq!(model.decode(&ids, true).unwrap(), sample.replace("<|eot_id|>", ""));
    ids.into_iter().map(|id| model.token_name(id)).collect()
}

#[test]
fn each_pre_tokenizer_cuts_numbers_and_words_its_own_way() {
    let merges = ["1 2", "12 3", "123 4", "Ġ a", "Ġa b", "' S"];
    let cut = |pre: &str| pieces(&byte_level(pre, &merges), " ab1234'S");
    assert_eq!(cut("llama-bpe"), ["<|begin_of_text|>", " ab", "123", "4", "'S"]);
    assert_eq!(cut("qwen2"), [" ab", "1", "2", "3", "4", "'S"]);
    assert_eq!(cut("smollm"), [" ab", "1", "2", "3", "4", "'", "S"]);
    assert_eq!(cut("gpt-2"), [" ab", "1234", "'", "S"]);
    assert_eq!(cut("default"), cut("gpt-2"));
}

#[test]
fn control_tokens_are_matched_and_end_a_text() {
    let parts = byte_level("qwen2", &[]);
    assert_eq!(pieces(&parts, "a<|eot_id|>b"), ["a", "<|eot_id|>", "b"]);
    // First the token that the metadata names, then tokens known to end a turn.
    assert_eq!(text(&parts).eos_token_ids(), [256, 257]);
    // Qwen's tokenizer normalises to NFC, which composes a letter and its accent.
    let composed = |pre: &str| {
        let model = text(&byte_level(pre, &[]));
        model.encode("e\u{301}", false).unwrap() == model.encode("\u{e9}", false).unwrap()
    };
    assert!(composed("qwen2") && !composed("gpt-2"));
}

#[derive(Deserialize)]
struct Encoded {
    text: String,
    ids: Vec<u32>,
}

/// Compares with the ids that the SentencePiece library gives for the same model; see make_reference.py.
#[test]
fn sentence_piece_as_its_own_library() {
    let files = text_files(&here("sentencepiece.gguf")).unwrap();
    let model = TextModel::from_files(&files).unwrap();
    let cases: Vec<Encoded> = serde_json::from_slice(&std::fs::read(here("sentencepiece.json")).unwrap()).unwrap();
    assert!(cases.iter().map(|case| case.ids.len()).sum::<usize>() > 1000);
    for Encoded { text, ids } in cases {
        assert_eq!(model.encode(&text, false).unwrap(), ids, "{text:?}");
        assert_eq!(model.decode(&ids, true).unwrap(), text);
        // Begin-of-text is prepended, since the file does not say otherwise.
        assert_eq!(model.encode(&text, true).unwrap()[0], 1);
    }
    assert_eq!(model.eos_token_ids(), [2]);
}

/// SentencePiece metadata: the given pieces and scores, after the three tokens of its library.
fn scored(pieces: &[(&str, f32)]) -> Parts {
    let mut parts = write::parts(&golden("qwen2", "full"), GgmlDType::F32);
    let special = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)];
    let all = special.into_iter().chain(pieces.iter().map(|(text, score)| (*text, *score, 1)));
    let (mut texts, mut scores, mut kinds) = (Vec::new(), Vec::new(), Vec::new());
    for (text, score, kind) in all {
        texts.push(text);
        scores.push(Value::F32(score));
        kinds.push(Value::I32(kind));
    }
    parts.set("tokenizer.ggml.model", Value::String("llama".into()));
    parts.set("tokenizer.ggml.tokens", write::texts(texts));
    parts.set("tokenizer.ggml.scores", Value::Array(scores));
    parts.set("tokenizer.ggml.token_type", Value::Array(kinds));
    parts.set("tokenizer.ggml.bos_token_id", Value::U32(1));
    parts.set("tokenizer.ggml.eos_token_id", Value::U32(2));
    parts.set("tokenizer.ggml.add_space_prefix", Value::Bool(false));
    parts.set("tokenizer.ggml.add_bos_token", Value::Bool(false));
    parts
}

/// Of two merges with the same score, SentencePiece takes the left one.
#[test]
fn pieces_of_the_same_score_merge_from_the_left() {
    let letters = [("a", -9.0), ("b", -9.1), ("c", -9.2)];
    let parts = scored(&[&letters[..], &[("bc", 0.0), ("ab", 0.0)]].concat());
    assert_eq!(pieces(&parts, "abc"), ["ab", "c"]);
    assert_eq!(pieces(&parts, "bcab"), ["bc", "ab"]);
    // Which one is left depends on the text: ab in "aba", ba in "bab".
    let error = text_files(written(&scored(&[&letters[..], &[("ab", 0.0), ("ba", 0.0)]].concat())).path());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("tokenizer.ggml.scores of \"ab\" and \"ba\" is the same"), "{error}");
}
