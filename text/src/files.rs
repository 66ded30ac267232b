//! Reads a model's text files from disk, without parsing them.

use std::{fs, io, path::Path};

use crate::TextError;

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
    /// Reads the files from a model's folder. Only `tokenizer.json` is required.
    pub fn from_folder(folder: &Path) -> Result<Self, TextError> {
        let path = folder.join("tokenizer.json");
        let tokenizer_json =
            fs::read(&path).map_err(|source| TextError::Read { path: path.display().to_string(), source })?;
        Self::with_tokenizer(folder, tokenizer_json)
    }

    /// Reads all files except `tokenizer.json`, whose content the caller provides.
    pub fn with_tokenizer(folder: &Path, tokenizer_json: Vec<u8>) -> Result<Self, TextError> {
        let read = |name: &str| {
            let path = folder.join(name);
            match fs::read(&path) {
                Ok(bytes) => Ok(Some(bytes)),
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(source) => Err(TextError::Read { path: path.display().to_string(), source }),
            }
        };
        Ok(Self {
            tokenizer_json,
            tokenizer_config_json: read("tokenizer_config.json")?,
            chat_template: read("chat_template.jinja")?,
            generation_config_json: read("generation_config.json")?,
            special_tokens_map_json: read("special_tokens_map.json")?,
        })
    }
}
