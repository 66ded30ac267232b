//! `tokenizer.model` gives the ids of the SentencePiece library. `sentencepiece/make.py` writes the models and the ids.

// The lint exempts `#[test]` functions, but not their shared helpers.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::{Path, PathBuf},
};

use overfill_text::{TextError, TextFiles, TextModel};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Expected {
    cases: Vec<Case>,
    special: Vec<Special>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
    decoded: String,
}

#[derive(Deserialize)]
struct Special {
    config: Value,
    text: String,
    ids: Vec<u32>,
}

fn here(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sentencepiece").join(file)
}

fn model(name: &str) -> Vec<u8> {
    fs::read(here(&format!("{name}.model"))).unwrap()
}

fn expected(name: &str) -> Expected {
    serde_json::from_slice(&fs::read(here(&format!("{name}.json"))).unwrap()).unwrap()
}

/// Reads a folder of tokenizer.model and other files.
fn files(model: &[u8], others: &[(&str, Value)]) -> Result<TextFiles, TextError> {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("tokenizer.model"), model).unwrap();
    for (name, content) in others {
        fs::write(folder.path().join(name), content.to_string()).unwrap();
    }
    TextFiles::from_folder(folder.path())
}

fn text_model(model: &[u8], others: &[(&str, Value)]) -> TextModel {
    TextModel::from_files(&files(model, others).unwrap()).unwrap()
}

#[test]
fn texts_have_the_ids_of_the_library() {
    let names = fs::read_dir(here("")).unwrap().map(|entry| entry.unwrap().path());
    let names = names.filter(|path| path.extension().is_some_and(|end| end == "json"));
    let mut names: Vec<String> = names.map(|path| path.file_stem().unwrap().to_string_lossy().into_owned()).collect();
    names.sort();
    assert!(names.len() >= 6, "{names:?}");
    let mut wrong = Vec::new();
    for name in &names {
        let text = text_model(&model(name), &[]);
        let cases = expected(name).cases;
        assert!(cases.len() > 100);
        for case in cases {
            let ids = text.encode(&case.text, false).unwrap();
            if ids != case.ids {
                wrong.push(format!("{name}: {:?}: {ids:?}, not {:?}", case.text, case.ids));
            }
            let decoded = text.decode(&case.ids, true).unwrap();
            // The library writes an unknown token as U+2047, and this crate omits it as special.
            if decoded != case.decoded && !case.decoded.contains('\u{2047}') {
                wrong.push(format!("{name}: {:?}: {decoded:?}, not {:?}", case.ids, case.decoded));
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn special_tokens_are_as_in_transformers() {
    let special = expected("bpe-prefix").special;
    assert_eq!(special.len(), 30);
    for Special { config, text, ids } in special {
        let model = text_model(&model("bpe-prefix"), &[("tokenizer_config.json", config.clone())]);
        assert_eq!(model.encode(&text, true).unwrap(), ids, "{text:?} with {config}");
    }
}

#[test]
fn a_model_has_its_special_and_added_tokens() {
    let model = model("bpe-prefix");
    let map = json!({"bos_token": "<s>", "eos_token": "<|end|>"});
    let added = json!({"<|user|>": 701, "<|end|>": 700, "<s>": 1});
    let text = text_model(&model, &[("special_tokens_map.json", map), ("added_tokens.json", added)]);
    assert_eq!((text.vocab_size(), text.eos_token_ids()), (702, &[700][..]));
    let ids = text.encode("<|user|>the<|end|>", true).unwrap();
    assert_eq!((ids[0], ids[1], ids[ids.len() - 1]), (1, 701, 700));
    assert_eq!(text.decode(&ids, true).unwrap().trim(), "<|user|> the");
    // The same files give the same bytes: nodes compare their hash.
    assert_eq!(files(&model, &[]).unwrap(), files(&model, &[]).unwrap());

    // A file without a token for the begin of a text.
    let trimmed = self::model("bpe-trimmed");
    let begins = |config: Value| files(&trimmed, &[("tokenizer_config.json", config)]);
    let text = TextModel::from_files(&begins(json!({"add_bos_token": null})).unwrap()).unwrap();
    assert_eq!(text.encode("a", true).unwrap(), text.encode("a", false).unwrap());
    let error = begins(json!({"add_bos_token": true})).unwrap_err().to_string();
    assert_eq!(error, "tokenizer_config.json: add_bos_token is true, but tokenizer.model has no bos_token");
}

/// A message of `field` in an encoded protobuf message.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    [&[number << 3 | 2, content.len() as u8], content].concat()
}

fn piece(text: &str, kind: u8) -> Vec<u8> {
    field(1, &[field(1, text.as_bytes()), vec![0x18, kind]].concat())
}

#[test]
fn what_would_not_be_exact_is_refused_in_one_line() {
    // Fields that follow replace earlier ones.
    for (name, more, needle) in [
        (
            "normalized",
            vec![],
            "normalizer_spec.name is user_defined, supported: identity; for others, put tokenizer.json",
        ),
        ("bpe-prefix", field(2, &[0x18, 3]), "trainer_spec.model_type is WORD, supported: UNIGRAM, BPE"),
        ("bpe-prefix", field(2, &[0x18, 9]), "trainer_spec.model_type is"),
        ("bpe-prefix", field(2, &[0xc0, 0x01, 1]), "trainer_spec.treat_whitespace_as_suffix is true, supported: false"),
        ("bpe-prefix", field(2, &[0x98, 0x02, 0]), "256 pieces are of type BYTE, supported: 0"),
        ("bpe-prefix", field(3, &[0x28, 0]), "normalizer_spec.escape_whitespaces is false, supported: true"),
        ("bpe-prefix", piece("<s>", 1), "piece 700 is \"<s>\", supported: each text once"),
        ("bpe-prefix", piece("", 1), "piece 700 is \"\""),
        ("bpe-prefix", piece("xy", 5), "the type of piece 700 is UNUSED"),
        ("bpe-prefix", piece("xy", 7), "type of piece 700"),
        (
            "bpe-prefix",
            piece("<b>", 4),
            "add_dummy_prefix, with the user-defined piece \"<b>\", is true, supported: false",
        ),
        ("bpe-prefix", piece("a\u{2603}", 1), "'\u{2603}' of the piece \"a\u{2603}\" is no piece"),
        (
            "bpe-prefix",
            [piece("qz", 1), piece("zq", 1)].concat(),
            "the score of the pieces \"qz\" and \"zq\" is the same",
        ),
        ("bpe-prefix", vec![0x0a, 9], "not a model of SentencePiece: failed to decode"),
        ("unigram-user-defined", piece("a</b>", 1), "piece \"a</b>\", with the user-defined piece \"</b>\" inside"),
    ] {
        let error = files(&[model(name), more].concat(), &[]).unwrap_err().to_string();
        assert!(error.starts_with("tokenizer.model: ") && error.contains(needle) && !error.contains('\n'), "{error}");
    }
    let model = model("bpe-prefix");
    for (file, content, needle) in [
        (
            "tokenizer_config.json",
            json!({"tokenizer_class": "T5Tokenizer"}),
            "tokenizer_class is T5Tokenizer, supported",
        ),
        ("added_tokens.json", json!({"<x>": 702}), "the id of \"<x>\" is 702, supported: 700, the next after"),
        ("added_tokens.json", json!({"<x>": "a"}), "the id of \"<x>\" is \"a\", not a number"),
        ("added_tokens.json", json!([]), "not an object"),
    ] {
        let error = files(&model, &[(file, content)]).unwrap_err().to_string();
        assert!(error.starts_with(file) && error.contains(needle), "{error}");
    }
    let nothing = TextFiles::from_folder(tempfile::tempdir().unwrap().path()).unwrap_err().to_string();
    assert!(nothing.contains("tokenizer.json"), "{nothing}");
}
