//! Added tokens of tokenizer_config.json. The expected ids come from transformers 4.57.6 and 5.24.0.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use overfill_text::{TextFiles, TextModel};
use serde_json::{Value, json};

fn load(change: impl FnOnce(&mut Value)) -> Result<TextModel, String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/llama-untied/full");
    let mut files = TextFiles::from_folder(&folder).unwrap();
    let mut config: Value = serde_json::from_slice(files.tokenizer_config_json.as_ref().unwrap()).unwrap();
    config["added_tokens_decoder"]["320"] = json!({
        "content": "<|im_start|>", "lstrip": false, "normalized": false, "rstrip": false, "single_word": false,
        "special": true
    });
    change(&mut config);
    files.tokenizer_config_json = Some(config.to_string().into_bytes());
    TextModel::from_files(&files).map_err(|e| e.to_string())
}

fn ids(text: &str, change: impl FnOnce(&mut Value)) -> Vec<u32> {
    load(change).unwrap().encode(text, false).unwrap()
}

#[test]
fn a_token_that_only_the_configuration_has() {
    let model = load(|_| {}).unwrap();
    let ids = model.encode("hi <|im_start|>a", false).unwrap();
    assert_eq!(ids, [312, 224, 320, 68]);
    assert_eq!(model.decode(&ids, false).unwrap(), "hi <|im_start|>a");
    assert_eq!(model.decode(&ids, true).unwrap(), "hi a");
    let stream = |skip_special| {
        let mut detokenizer = model.detokenizer(&[], skip_special).unwrap();
        ids.iter().map(|id| detokenizer.push(*id).unwrap()).collect::<String>()
    };
    assert_eq!((stream(false), stream(true)), ("hi <|im_start|>a".into(), "hi a".into()));
    assert_eq!(model.token_name(320), "<|im_start|>");
}

#[test]
fn its_settings_are_honoured() {
    let model = load(|config| {
        config["added_tokens_decoder"]["320"]["lstrip"] = json!(true);
        config["added_tokens_decoder"]["320"]["special"] = json!(false);
    })
    .unwrap();
    let ids = model.encode("hi <|im_start|>a", false).unwrap();
    assert_eq!(ids, [312, 320, 68]);
    assert_eq!(model.decode(&ids, true).unwrap(), "hi<|im_start|>a");
    // They also override the settings of a token in tokenizer.json.
    assert_eq!(
        self::ids("hi <|end|>a", |config| config["added_tokens_decoder"]["3"]["lstrip"] = json!(true)),
        [312, 3, 68]
    );
    // `single_word` matches "the", but not inside "theatre".
    let word = |config: &mut Value| {
        config["added_tokens_decoder"]["321"] = json!({"content": "the", "single_word": true, "special": false});
    };
    assert_eq!(self::ids("in the theatre", word), [315, 224, 321, 262, 68, 87, 265]);
}

#[test]
fn new_tokens_get_the_next_free_ids_in_the_order_of_their_entries() {
    let order = |config: &mut Value| {
        let entries = config["added_tokens_decoder"].as_object_mut().unwrap();
        entries.remove("320");
        for (id, content) in [("1000", "<|k|>"), ("321", "<|l|>"), ("999", "<|m|>")] {
            entries.insert(id.into(), json!({"content": content, "special": true}));
        }
    };
    assert_eq!(ids("<|k|><|l|><|m|>", order), [322, 320, 321]);
}

#[test]
fn named_special_tokens_are_added_too() {
    let named = |config: &mut Value| {
        config["pad_token"] = json!("<pad>");
        config["eos_token"] = json!("<|new|>");
        config["additional_special_tokens"] = json!(["<|a|>", {"content": "<|b|>", "lstrip": false}]);
    };
    assert_eq!(ids("x<pad><|a|><|b|><|new|>y", named), [91, 322, 323, 324, 321, 92]);
    let model = load(named).unwrap();
    assert_eq!(model.decode(&[91, 322, 92], true).unwrap(), "xy");
    assert_eq!(model.eos_token_ids(), [1, 321]);
    let extra = |config: &mut Value| config["extra_special_tokens"] = json!({"image_token": "<|img|>"});
    assert_eq!(ids("x<|img|>y", extra), [91, 321, 92]);
}

#[test]
fn faults_name_the_field() {
    let fault = |entry: Value| load(|config| config["added_tokens_decoder"] = entry).err().unwrap();
    assert_eq!(
        fault(json!({"x": {"content": "a"}})),
        "tokenizer_config.json: added_tokens_decoder must be an object of token ids, got \"x\""
    );
    assert_eq!(
        fault(json!({"320": {"content": 3}})),
        "tokenizer_config.json: added_tokens_decoder.320.content must be a text, got {\"content\":3}"
    );
    assert_eq!(
        fault(json!([])),
        "tokenizer_config.json: added_tokens_decoder must be an object of token ids and tokens"
    );
}
