//! Reads a model's text files from disk, without parsing them.

use std::{fs, io, path::Path};

use serde_json::Value;

use crate::{TextError, sentencepiece, templates};

/// Contents of the text files of a Hugging Face model folder. A file that does not exist is `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TextFiles {
    /// `tokenizer.json`: vocabulary, pre-tokenizer and decoder.
    pub tokenizer_json: Vec<u8>,
    /// `tokenizer_config.json`: special tokens, and the chat template in older folders.
    pub tokenizer_config_json: Option<Vec<u8>>,
    /// `chat_template.jinja`: the chat template. It takes precedence over the template in `tokenizer_config.json`.
    pub chat_template: Option<Vec<u8>>,
    /// `generation_config.json`: end-of-text token ids and default sampling parameters.
    pub generation_config_json: Option<Vec<u8>>,
    /// `special_tokens_map.json`: special tokens of older folders.
    pub special_tokens_map_json: Option<Vec<u8>>,
}

impl TextFiles {
    /// Reads the files from a model's folder. Only `tokenizer.json` is required; without it, `tokenizer.model` of the
    /// SentencePiece library is converted.
    pub fn from_folder(folder: &Path) -> Result<Self, TextError> {
        let mut files = match read(folder, "tokenizer.json")? {
            Some(tokenizer_json) => Self::with_tokenizer(folder, tokenizer_json)?,
            None => {
                let Some(model) = read(folder, sentencepiece::FILE)? else {
                    let path = folder.join("tokenizer.json").display().to_string();
                    return Err(TextError::Read { path, source: io::ErrorKind::NotFound.into() });
                };
                let mut files = Self::with_tokenizer(folder, Vec::new())?;
                let config = parsed("tokenizer_config.json", files.tokenizer_config_json.as_deref())?;
                let map = parsed("special_tokens_map.json", files.special_tokens_map_json.as_deref())?;
                let added = parsed("added_tokens.json", read(folder, "added_tokens.json")?.as_deref())?;
                files.tokenizer_json = sentencepiece::tokenizer_json(&model, &config, &map, &added)?;
                files
            }
        };
        templates::gather(folder, &mut files)?;
        Ok(files)
    }

    /// Reads all files except `tokenizer.json`, whose content the caller provides, and additional chat templates.
    pub fn with_tokenizer(folder: &Path, tokenizer_json: Vec<u8>) -> Result<Self, TextError> {
        Ok(Self {
            tokenizer_json,
            tokenizer_config_json: read(folder, "tokenizer_config.json")?,
            chat_template: read(folder, "chat_template.jinja")?,
            generation_config_json: read(folder, "generation_config.json")?,
            special_tokens_map_json: read(folder, "special_tokens_map.json")?,
        })
    }
}

/// A file's content; `None` if there is no such file.
pub(crate) fn read(folder: &Path, name: &str) -> Result<Option<Vec<u8>>, TextError> {
    let path = folder.join(name);
    match fs::read(&path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TextError::Read { path: path.display().to_string(), source }),
    }
}

/// A parsed JSON file; null if there is none.
pub(crate) fn parsed(file: &'static str, bytes: Option<&[u8]>) -> Result<Value, TextError> {
    match bytes {
        Some(bytes) => serde_json::from_slice(bytes).map_err(|e| TextError::Invalid { file, reason: e.to_string() }),
        None => Ok(Value::Null),
    }
}
