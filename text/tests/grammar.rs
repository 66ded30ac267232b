//! Random outputs that a grammar allows, over the tokenizers of the golden pairs.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use std::{path::Path, sync::Arc};

use overfill_kv::Grammar;
use overfill_text::{Grammars, TextFiles, TextModel, check_grammar};
use proptest::prelude::*;
use serde_json::{Value, json};

const PAIRS: [&str; 3] = ["llama-tied", "qwen2", "qwen3"];

fn grammars(pair: &str) -> (TextModel, Grammars, Vec<u32>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(pair).join("full");
    let files = TextFiles::from_folder(&folder).unwrap();
    let model = TextModel::from_files(&files).unwrap();
    let ends = model.eos_token_ids().to_vec();
    // Larger than the tokenizer, as many models' are.
    let grammars = Grammars::new(Arc::new(files), 333, &ends);
    (model, grammars, ends)
}

fn ids(set: &[u32]) -> Vec<u32> {
    (0..set.len() as u32 * 32).filter(|id| set[*id as usize / 32] >> (id % 32) & 1 == 1).collect()
}

/// An output whose tokens are drawn from those that are allowed. It ends as soon as it may.
fn draw(pair: &str, grammar: &Grammar, mut random: impl FnMut() -> u64) -> String {
    let (model, grammars, ends) = grammars(pair);
    let mut matcher = grammars.matcher(grammar).unwrap();
    let mut output = Vec::new();
    for _ in 0..2000 {
        let allowed = ids(&matcher.allowed().unwrap());
        assert!(!allowed.is_empty() && allowed.iter().all(|id| *id < 333));
        let token = match allowed.iter().find(|id| ends.contains(id)) {
            Some(end) => *end,
            None => allowed[random() as usize % allowed.len()],
        };
        matcher.accept(token).unwrap();
        if ends.contains(&token) {
            return model.decode(&output, false).unwrap();
        }
        output.push(token);
    }
    panic!("{grammar:?} does not end: {:?}", model.decode(&output, false));
}

fn schema() -> Value {
    json!({
        "type": "object", "additionalProperties": false, "required": ["name", "size", "tags"],
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "size": {"type": "integer", "minimum": 0, "maximum": 99},
            "tags": {"type": "array", "items": {"enum": ["a", "b\"\u{e9}"]}, "minItems": 1, "maxItems": 3},
        },
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn what_is_drawn_matches(seed in any::<u64>(), pair in prop::sample::select(&PAIRS[..])) {
        let mut state = seed;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state >> 33
        };
        let text = draw(pair, &Grammar::Json(schema().to_string()), &mut random);
        let value: Value = serde_json::from_str(&text).unwrap();
        prop_assert!(value["name"].as_str().unwrap().chars().count() <= 8, "{text}");
        prop_assert!(value["size"].as_u64().unwrap() <= 99, "{text}");
        let tags = value["tags"].as_array().unwrap();
        let known = tags.iter().all(|tag| *tag == "a" || *tag == "b\"\u{e9}");
        prop_assert!((1..=3).contains(&tags.len()) && known, "{text}");

        let texts = vec!["yes".to_owned(), "no\n\"maybe\"".into(), "\u{1f600} \\".into()];
        let text = draw(pair, &Grammar::Choice(texts.clone()), &mut random);
        prop_assert!(texts.contains(&text), "{text:?}");

        let text = draw(pair, &Grammar::Regex("[0-9]{3}/[a-f]{2}".into()), &mut random);
        let bytes = text.as_bytes();
        prop_assert!(bytes.len() == 6 && bytes[3] == b'/' && bytes[..3].iter().all(u8::is_ascii_digit), "{text}");

        let sums = "start: NUMBER (\"+\" NUMBER){1,2} \"=\"\nNUMBER: /[1-9]/";
        let text = draw(pair, &Grammar::Lark(sums.into()), &mut random);
        prop_assert!(text.ends_with('=') && text.len() >= 4, "{text}");
    }
}

#[test]
fn special_tokens_are_not_text() {
    for pair in PAIRS {
        let (model, grammars, ends) = grammars(pair);
        let mut matcher = grammars.matcher(&Grammar::Regex("(?s:.{1,9})".into())).unwrap();
        let allowed = ids(&matcher.allowed().unwrap());
        assert!(allowed.iter().all(|id| !model.is_special(*id)), "{pair}");
        matcher.accept(allowed[3]).unwrap();
        let allowed = ids(&matcher.allowed().unwrap());
        assert!(ends.iter().all(|id| allowed.contains(id)) && !ends.is_empty(), "{pair}: an end is allowed now");
    }
}

#[test]
fn an_output_that_does_not_match_is_an_error_and_none_follows_the_end() {
    let (model, grammars, ends) = grammars("qwen3");
    let choice = Grammar::Choice(vec!["ab".into()]);
    let [wrong, right] = ["x", "ab"].map(|text| model.encode(text, false).unwrap());
    assert!(grammars.matcher(&choice).unwrap().accept(wrong[0]).is_err());
    let mut matcher = grammars.matcher(&choice).unwrap();
    right.iter().for_each(|id| matcher.accept(*id).unwrap());
    assert_eq!(ids(&matcher.allowed().unwrap()), ends);
    for id in [ends[0], wrong[0], ends[0]] {
        matcher.accept(id).unwrap();
        assert_eq!(ids(&matcher.allowed().unwrap()), ends);
    }
    // A grammar that is kept begins anew.
    let mut again = grammars.matcher(&choice).unwrap();
    right.iter().for_each(|id| again.accept(*id).unwrap());
}

#[test]
fn invalid_grammars_say_where() {
    let error = |grammar| check_grammar(&grammar).unwrap_err().to_string();
    let json = |schema: Value| Grammar::Json(schema.to_string());
    for (grammar, wanted) in [
        (Grammar::Json("{\"type\":".into()), "EOF while parsing a value at line 1 column 8"),
        (Grammar::Json("3".into()), "a JSON schema must be an object"),
        (json(json!({"type": "strin"})), "strin"),
        (json(json!({"properties": {"a": {"$ref": "#/nowhere"}}})), "nowhere"),
        (json(json!({"$ref": "https://example.com/schema.json"})), "example.com"),
        (json(json!({"type": "object", "required": ["a"], "properties": {"a": false}})), "nsatisfiable"),
        (Grammar::Regex("[0-9".into()), "unclosed character class"),
        (Grammar::Choice(vec![]), "there must be at least one text"),
        (Grammar::Lark("start: missing".into()), "missing"),
        (Grammar::Lark("start: \"a".into()), "1"),
        (Grammar::Regex("a(?=b)".into()), "look-around"),
    ] {
        let error = error(grammar.clone());
        assert!(error.contains(wanted) && !error.contains('\n'), "{grammar:?}: {error}");
    }
    check_grammar(&json(schema())).unwrap();
    check_grammar(&json(json!({}))).unwrap();
}

#[test]
fn a_model_without_an_end_is_refused() {
    let error = Grammars::new(Arc::default(), 333, &[]).matcher(&Grammar::Choice(vec!["a".into()])).unwrap_err();
    assert!(error.to_string().contains("no end-of-text token"), "{error}");
}
