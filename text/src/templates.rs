//! The chat templates of a model: one, or several with names. They are chosen as in transformers
//! (`PreTrainedTokenizerBase.get_chat_template`).

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::{Map, Value, json};

use crate::{
    TextError, TextFiles, ToolFormat,
    files::{parsed, read},
    template::{ChatInput, ChatTemplate},
};

/// Folder of named templates, `NAME.jinja` each.
const FOLDER: &str = "additional_chat_templates";
const CONFIG: &str = "tokenizer_config.json";
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// The compiled templates that are used. Templates with other names are not.
pub(crate) struct Templates {
    default: Option<ChatTemplate>,
    tool_use: Option<ChatTemplate>,
    names: String,
    /// The format in which the template for tools asks for calls. `None`: it names no tools, or asks for an unknown format.
    pub(crate) tool_format: Option<ToolFormat>,
    /// Whether it marks the arguments of Mistral's calls with `[ARGS]`.
    pub(crate) marks_arguments: bool,
}

impl Templates {
    /// Compiles the content of chat_template.jinja (`file`), or the templates in tokenizer_config.json (`config`). `None` if
    /// there is none.
    pub(crate) fn compile(
        file: Option<&str>,
        config: &Value,
        special_tokens: &BTreeMap<String, String>,
    ) -> Result<Option<Self>, TextError> {
        let sources = match file {
            Some(source) => Map::from_iter([(DEFAULT.to_owned(), json!(source))]),
            None => named(&config["chat_template"])?,
        };
        if sources.is_empty() {
            return Ok(None);
        }
        let compile = |name: &str| match sources.get(name).and_then(Value::as_str) {
            Some(source) => ChatTemplate::compile(source, special_tokens.clone()).map(Some),
            None => Ok(None),
        };
        let names = sources.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        let for_tools = sources.get(TOOL_USE).or(sources.get(DEFAULT)).and_then(Value::as_str).unwrap_or_default();
        Ok(Some(Self {
            default: compile(DEFAULT)?,
            tool_use: compile(TOOL_USE)?,
            names,
            tool_format: ToolFormat::of_template(for_tools),
            marks_arguments: for_tools.contains("[ARGS]"),
        }))
    }

    /// Renders a prompt: with `tool_use` if the input has tools and there is such a template, else with `default`.
    pub(crate) fn render(&self, input: &ChatInput<'_>) -> Result<String, TextError> {
        let for_tools = self.tool_use.as_ref().filter(|_| input.tools.is_some());
        let none = || TextError::Template(format!("the model has no template named default, only: {}", self.names));
        for_tools.or(self.default.as_ref()).ok_or_else(none)?.render(input)
    }
}

/// The named templates of `chat_template`, which is one template, a list of `{"name": .., "template": ..}`, or an object.
fn named(value: &Value) -> Result<Map<String, Value>, TextError> {
    let invalid = || {
        let reason = "chat_template must be a text, or a list of {\"name\": .., \"template\": ..}".into();
        TextError::Invalid { file: CONFIG, reason }
    };
    match value {
        Value::Null => Ok(Map::new()),
        Value::String(_) => Ok(Map::from_iter([(DEFAULT.to_owned(), value.clone())])),
        Value::Object(templates) if templates.values().all(Value::is_string) => Ok(templates.clone()),
        Value::Array(templates) => {
            let entry = |entry: &Value| {
                let name = entry["name"].as_str()?.to_owned();
                Some((name, entry["template"].as_str()?.into()))
            };
            templates.iter().map(|template| entry(template).ok_or_else(invalid)).collect()
        }
        _ => Err(invalid()),
    }
}

/// Adds the other files of a folder that have chat templates to chat_template.jinja and tokenizer_config.json.
///
/// Templates of the folder `additional_chat_templates` become a list in tokenizer_config.json, as older folders have it. They
/// and chat_template.jinja replace the templates of tokenizer_config.json. chat_template.json, which belongs to a processor of
/// several kinds of input, counts if there is nothing else.
pub(crate) fn gather(folder: &Path, files: &mut TextFiles) -> Result<(), TextError> {
    let mut entries = additional(folder)?;
    let config = parsed(CONFIG, files.tokenizer_config_json.as_deref())?;
    let template = if entries.is_empty() {
        if files.chat_template.is_some() || !config["chat_template"].is_null() {
            return Ok(());
        }
        match processor(folder)? {
            Some(template) => template,
            None => return Ok(()),
        }
    } else {
        if let Some(bytes) = files.chat_template.take() {
            let invalid = |e: &dyn ToString| TextError::Invalid { file: "chat_template.jinja", reason: e.to_string() };
            entries.insert(0, json!({"name": DEFAULT, "template": String::from_utf8(bytes).map_err(|e| invalid(&e))?}));
        }
        Value::Array(entries)
    };
    let mut config = match config {
        Value::Null => Map::new(),
        Value::Object(config) => config,
        _ => return Err(TextError::Invalid { file: CONFIG, reason: "not a JSON object".into() }),
    };
    config.insert("chat_template".into(), template);
    files.tokenizer_config_json = Some(Value::Object(config).to_string().into_bytes());
    Ok(())
}

/// The templates of chat_template.json; `None` if there is no such file.
fn processor(folder: &Path) -> Result<Option<Value>, TextError> {
    let file = "chat_template.json";
    let Some(bytes) = read(folder, file)? else { return Ok(None) };
    match parsed(file, Some(&bytes))? {
        Value::Object(mut processor) if processor.contains_key("chat_template") => {
            Ok(processor.remove("chat_template"))
        }
        _ => Err(TextError::Invalid { file, reason: "chat_template is absent".into() }),
    }
}

/// The templates in [`FOLDER`] as entries of a list, sorted by name.
fn additional(folder: &Path) -> Result<Vec<Value>, TextError> {
    let folder = folder.join(FOLDER);
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let error = |path: &Path, source| TextError::Read { path: path.display().to_string(), source };
    let mut paths = Vec::new();
    for entry in fs::read_dir(&folder).map_err(|e| error(&folder, e))? {
        let path = entry.map_err(|e| error(&folder, e))?.path();
        if path.extension().is_some_and(|end| end == "jinja") {
            paths.push(path);
        }
    }
    paths.sort();
    let mut entries = Vec::new();
    for path in paths {
        let template = fs::read_to_string(&path).map_err(|e| error(&path, e))?;
        entries.push(json!({"name": path.file_stem().map(|name| name.to_string_lossy()), "template": template}));
    }
    Ok(entries)
}
