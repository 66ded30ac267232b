//! Builds the text files of a Hugging Face folder from a GGUF file's metadata.

use overfill_text::TextFiles;
use serde_json::{Value, json};

use super::{
    Gguf, folder_of,
    header::Metadata,
    tokenizer::{self, Vocabulary},
};
use crate::ModelError;

/// Tokens that end a turn or a text. The metadata can name only one token of each kind, while a generation_config.json may
/// list several. So these texts count as well, as in llama.cpp.
const END_TOKENS: [&str; 7] =
    ["<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>", "<|endoftext|>"];

/// The text files next to `gguf`; missing ones are built from its metadata.
pub(super) fn files(gguf: &Gguf) -> Result<TextFiles, ModelError> {
    let metadata = gguf.metadata();
    let folder = folder_of(&gguf.file);
    let vocabulary = Vocabulary::read(&metadata)?;
    let mut files = if folder.join("tokenizer.json").exists() {
        TextFiles::from_folder(folder)?
    } else {
        let vocabulary = vocabulary.as_ref().ok_or_else(|| metadata.bad(tokenizer::TOKENS, "an array of texts"))?;
        TextFiles::with_tokenizer(folder, bytes(tokenizer::build(&metadata, vocabulary)?))?
    };
    if let Some(vocabulary) = vocabulary {
        if files.tokenizer_config_json.is_none() {
            files.tokenizer_config_json = Some(bytes(tokenizer_config(&metadata, &vocabulary)?));
        }
        if files.generation_config_json.is_none() {
            files.generation_config_json = Some(bytes(generation_config(&metadata, &vocabulary)?));
        }
    }
    Ok(files)
}

/// JSON with sorted keys: nodes compare its hash, and the key order must not depend on the build.
fn bytes(mut value: Value) -> Vec<u8> {
    value.sort_all_objects();
    value.to_string().into_bytes()
}

fn tokenizer_config(metadata: &Metadata<'_>, vocabulary: &Vocabulary<'_>) -> Result<Value, ModelError> {
    let mut config = json!({});
    for (field, id) in [("bos_token", vocabulary.bos), ("eos_token", vocabulary.eos)] {
        if let Some(id) = id {
            config[field] = json!(vocabulary.tokens[id]);
        }
    }
    if let Some(template) = metadata.text("tokenizer.chat_template")? {
        config["chat_template"] = json!(template);
    }
    Ok(config)
}

fn generation_config(metadata: &Metadata<'_>, vocabulary: &Vocabulary<'_>) -> Result<Value, ModelError> {
    Ok(json!({"bos_token_id": vocabulary.bos, "eos_token_id": end_token_ids(metadata, vocabulary)?}))
}

/// Ids of the tokens that end a turn or a text, without duplicates. The metadata's end-of-text token comes first.
pub(super) fn end_token_ids(metadata: &Metadata<'_>, vocabulary: &Vocabulary<'_>) -> Result<Vec<usize>, ModelError> {
    let mut ends: Vec<usize> = vocabulary.eos.into_iter().collect();
    for key in ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        ends.extend(vocabulary.id(metadata, key)?);
    }
    let named = |id: &usize| vocabulary.is_added(*id) && END_TOKENS.contains(&&*vocabulary.tokens[*id]);
    ends.extend((0..vocabulary.tokens.len()).filter(named));
    let mut unique = Vec::new();
    for id in ends {
        if !unique.contains(&id) {
            unique.push(id);
        }
    }
    Ok(unique)
}
