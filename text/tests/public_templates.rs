//! Public chat templates render the same output as with transformers. `public_templates.py` downloads and renders them.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use overfill_text::{ChatInput, TextFiles, TextModel, ToolFormat};
use serde::Deserialize;
use serde_json::{Map, Value};

#[derive(Deserialize)]
struct Rendered {
    conversations: Vec<Map<String, Value>>,
    special_tokens: Value,
    templates: Vec<Template>,
}

#[derive(Deserialize)]
struct Template {
    name: String,
    source: String,
    results: Vec<Wanted>,
}

/// The expected output. `None`: transformers fails, and so must this crate.
#[derive(Debug, Deserialize)]
struct Wanted {
    output: Option<String>,
}

/// The templates whose format of tool calls is known.
const TOOL_FORMATS: [(&str, ToolFormat); 17] = [
    ("Bielik-11B-v3.0-Instruct.jinja", ToolFormat::Hermes),
    ("MiMo-VL.jinja", ToolFormat::Hermes),
    ("Mistral-Small-3.2-24B-Instruct-2506.jinja", ToolFormat::Mistral),
    ("NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use.jinja", ToolFormat::Hermes),
    ("NousResearch-Hermes-3-Llama-3.1-8B-tool_use.jinja", ToolFormat::Hermes),
    ("Qwen-QwQ-32B.jinja", ToolFormat::Hermes),
    ("Qwen-Qwen2.5-7B-Instruct.jinja", ToolFormat::Hermes),
    ("Qwen-Qwen3-0.6B.jinja", ToolFormat::Hermes),
    ("Reka-Edge.jinja", ToolFormat::Hermes),
    ("ibm-granite-granite-4.0.jinja", ToolFormat::Hermes),
    ("ibm-granite-granite-4.1.jinja", ToolFormat::Hermes),
    ("meta-llama-Llama-3.1-8B-Instruct.jinja", ToolFormat::Llama3Json),
    ("meta-llama-Llama-3.2-3B-Instruct.jinja", ToolFormat::Llama3Json),
    ("meta-llama-Llama-3.3-70B-Instruct.jinja", ToolFormat::Llama3Json),
    ("mistralai-Ministral-3-14B-Reasoning-2512.jinja", ToolFormat::Mistral),
    ("mistralai-Mistral-Nemo-Instruct-2407.jinja", ToolFormat::Mistral),
    ("unsloth-mistral-Devstral-Small-2507.jinja", ToolFormat::Mistral),
];

/// Exit code of the script if the download failed.
const NO_DOWNLOAD: i32 = 3;

/// Renders the templates with transformers. `None` if OVERFILL_PYTHON is not set or the download fails.
fn rendered() -> Option<Rendered> {
    let skip = |why: &str| {
        eprintln!("SKIPPED public_templates_as_transformers: {why}");
        None
    };
    let Ok(python) = std::env::var("OVERFILL_PYTHON") else { return skip("OVERFILL_PYTHON is not set") };
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let out = folder.join("public_templates.json");
    let mut command = Command::new(python);
    command.arg(here.join("tests/public_templates.py")).arg(folder.join("public_templates")).arg(&out);
    // Prevents requests to the Hugging Face hub.
    let status = command.env("HF_HUB_OFFLINE", "1").stdin(Stdio::null()).status().unwrap();
    match status.code() {
        Some(0) => Some(serde_json::from_slice(&std::fs::read(out).unwrap()).unwrap()),
        Some(NO_DOWNLOAD) => skip("the templates could not be downloaded"),
        _ => panic!("public_templates.py: {status}"),
    }
}

#[test]
fn public_templates_as_transformers() {
    let Some(Rendered { conversations, special_tokens, templates }) = rendered() else { return };
    let tokenizer_json =
        std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/qwen2/full/tokenizer.json"));
    let tokenizer_json = tokenizer_json.unwrap();
    let (mut same, mut refused, mut wrong, mut formats) = (0, 0, Vec::new(), Vec::new());
    for Template { name, source, results } in &templates {
        let files = TextFiles {
            tokenizer_json: tokenizer_json.clone(),
            tokenizer_config_json: Some(special_tokens.to_string().into_bytes()),
            chat_template: Some(source.clone().into_bytes()),
            ..TextFiles::default()
        };
        let model = TextModel::from_files(&files).unwrap_or_else(|e| panic!("{name}: {e}"));
        formats.extend(model.tool_format().map(|format| (name.as_str(), format)));
        for (i, (conversation, wanted)) in conversations.iter().zip(results).enumerate() {
            let mut variables = conversation.clone();
            let mut take = |field: &str| variables.shift_remove(field);
            let (messages, tools, documents) = (take("messages").unwrap(), take("tools"), take("documents"));
            let add_generation_prompt = take("add_generation_prompt").is_none_or(|value| value == true);
            let continue_final_message = take("continue_final_message").is_some_and(|value| value == true);
            let input = ChatInput {
                messages: messages.as_array().unwrap(),
                tools: tools.as_ref(),
                documents: documents.as_ref(),
                add_generation_prompt,
                continue_final_message,
                variables: Some(&variables),
            };
            let got = model.render_chat(&input);
            match (&got, &wanted.output) {
                (Ok(got), Some(output)) if got == output => same += 1,
                (Err(_), None) => refused += 1,
                (Ok(got), Some(output)) => {
                    let at = got.bytes().zip(output.bytes()).take_while(|(a, b)| a == b).count();
                    let part = |text: &str| {
                        String::from_utf8_lossy(&text.as_bytes()[at.min(text.len())..])
                            .chars()
                            .take(80)
                            .collect::<String>()
                    };
                    wrong.push(format!("{name} {i}: at {at} {:?} instead of {:?}", part(got), part(output)));
                }
                _ => wrong.push(format!("{name} {i}: {got:.120?} instead of {wanted:.120?}")),
            }
        }
    }
    println!("{} templates: {same} renderings are the same, {refused} are refused by both", templates.len());
    assert!(templates.len() >= 70 && same > 2000);
    assert_eq!(formats, TOOL_FORMATS);
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}
