//! Which chat template of a folder is used. transformers 4.57.6 chooses the same ones.

// The lint exempts `#[test]` functions, but not their shared helpers.
#![allow(clippy::unwrap_used)]

use std::fs;

use overfill_text::{ChatInput, TextError, TextFiles, TextModel};
use serde_json::{Value, json};

/// What a folder with these files renders, without and with tools.
fn rendered(files: &[(&str, Value)]) -> Result<[String; 2], TextError> {
    let folder = tempfile::tempdir().unwrap();
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/llama-untied/full");
    fs::copy(golden.join("tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    fs::create_dir(folder.path().join("additional_chat_templates")).unwrap();
    for (name, content) in files {
        let text = content.as_str().map_or_else(|| content.to_string(), str::to_owned);
        fs::write(folder.path().join(name), text).unwrap();
    }
    let model = TextModel::from_files(&TextFiles::from_folder(folder.path())?)?;
    let (messages, tools) = ([json!({"role": "user", "content": "q"})], json!([{"type": "function"}]));
    let input = ChatInput::new(&messages, true);
    Ok([model.render_chat(&input)?, model.render_chat(&ChatInput { tools: Some(&tools), ..input })?])
}

fn both(one: &str, two: &str) -> [String; 2] {
    [one.into(), two.into()]
}

#[test]
fn the_template_is_the_one_that_transformers_chooses() {
    let list = json!([{"name": "rag", "template": "r"}, {"name": "tool_use", "template": "t{{ tools | length }}"},
                      {"name": "default", "template": "d"}]);
    let config = |template: Value| ("tokenizer_config.json", json!({"chat_template": template}));
    let file = ("chat_template.jinja", json!("file"));
    let additional = ("additional_chat_templates/tool_use.jinja", json!("additional"));
    let processor = ("chat_template.json", json!({"chat_template": "processor"}));
    for (files, expected) in [
        (vec![config(json!("one"))], both("one", "one")),
        (vec![config(list.clone())], both("d", "t1")),
        (vec![config(json!({"default": "d", "tool_use": "t"}))], both("d", "t")),
        // A file replaces all templates of tokenizer_config.json.
        (vec![config(list.clone()), file.clone()], both("file", "file")),
        (vec![config(list.clone()), file.clone(), additional.clone()], both("file", "additional")),
        (vec![file.clone(), additional.clone()], both("file", "additional")),
        (vec![processor.clone()], both("processor", "processor")),
        (vec![processor.clone(), config(json!("one"))], both("one", "one")),
        (vec![processor.clone(), file.clone()], both("file", "file")),
        (vec![("chat_template.json", json!({"chat_template": list}))], both("d", "t1")),
    ] {
        assert_eq!(rendered(&files).unwrap(), expected, "{files:?}");
    }
}

#[test]
fn a_template_that_is_not_there_is_named() {
    let fault = |files: &[(&str, Value)]| rendered(files).unwrap_err().to_string();
    let config = |template: Value| fault(&[("tokenizer_config.json", json!({"chat_template": template}))]);
    let named = config(json!([{"name": "rag", "template": "r"}, {"name": "tool_use", "template": "t"}]));
    assert_eq!(named, "chat template: the model has no template named default, only: rag, tool_use");
    assert!(fault(&[]).starts_with("the model has no chat template"));
    for template in [json!(1), json!([{"name": "default"}]), json!(["text"]), json!({"default": 1})] {
        assert!(config(template).starts_with("tokenizer_config.json: chat_template must be a text, or a list of"));
    }
    for (content, needle) in [(json!({}), "chat_template is absent"), (json!("{"), "EOF")] {
        let error = fault(&[("chat_template.json", content)]);
        assert!(error.starts_with("chat_template.json: ") && error.contains(needle), "{error}");
    }
    let additional = ("additional_chat_templates/x.jinja", json!("x"));
    assert!(fault(&[additional, ("tokenizer_config.json", json!("[]"))]).contains("not a JSON object"));
}
