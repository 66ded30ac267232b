//! Small templates render the same output as with transformers. `jinja/make_cases.py` writes the cases.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use overfill_text::{ChatInput, TextFiles, TextModel};
use serde::Deserialize;
use serde_json::{Map, Value};

#[derive(Deserialize)]
struct Cases {
    variables: Map<String, Value>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    output: Option<String>,
    error: Option<String>,
}

#[test]
fn small_templates_as_transformers() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let Cases { variables, cases } =
        serde_json::from_slice(&std::fs::read(folder.join("tests/jinja/cases.json")).unwrap()).unwrap();
    let tokenizer_json = std::fs::read(folder.join("../tests/golden/qwen2/full/tokenizer.json")).unwrap();
    let mut wrong = Vec::new();
    for Case { template, output, error } in &cases {
        let files = TextFiles {
            tokenizer_json: tokenizer_json.clone(),
            chat_template: Some(template.clone().into_bytes()),
            ..TextFiles::default()
        };
        let input = ChatInput {
            messages: variables["messages"].as_array().unwrap(),
            tools: variables.get("tools"),
            documents: None,
            add_generation_prompt: true,
            continue_final_message: false,
            variables: Some(&variables),
        };
        let got = TextModel::from_files(&files).and_then(|model| model.render_chat(&input));
        match (&got, output) {
            (Ok(got), Some(output)) if got == output => {}
            (Err(_), None) => {}
            _ => wrong.push(format!("{template:?}\n  want {:?}\n  got  {got:?}", output.as_ref().or(error.as_ref()))),
        }
    }
    assert!(cases.len() > 1600);
    assert!(wrong.is_empty(), "{} of {} differ:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}
