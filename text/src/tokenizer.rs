//! Loads the tokenizer: `tokenizer.json`, plus the added tokens of `tokenizer_config.json` and `special_tokens_map.json`.

use std::{
    collections::HashSet,
    panic::{AssertUnwindSafe, catch_unwind},
};

use serde_json::Value;
use tokenizers::{AddedToken, Tokenizer};

use crate::TextError;

const CONFIG: &str = "tokenizer_config.json";

/// Fields of tokenizer_config.json and special_tokens_map.json, each of which names one special token.
pub(crate) const NAMED_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Parses `tokenizer_json` and adds the tokens of tokenizer_config.json (`config`) and special_tokens_map.json (`map`).
pub(crate) fn load(tokenizer_json: &[u8], config: &Value, map: &Value) -> Result<Tokenizer, TextError> {
    let invalid = |file, e: &dyn ToString| TextError::Invalid { file, reason: e.to_string() };
    // Some parsers in the tokenizers crate panic on unexpected input.
    let tokenizer = catch_unwind(|| Tokenizer::from_bytes(tokenizer_json));
    let tokenizer = tokenizer.map_err(|_| invalid("tokenizer.json", &"unexpected structure"))?;
    let mut tokenizer = tokenizer.map_err(|e| invalid("tokenizer.json", &e))?;
    // The file may contain truncation and padding settings left over from training. A prompt is never cut or padded.
    tokenizer.with_truncation(None).map_err(|e| invalid("tokenizer.json", &e))?;
    tokenizer.with_padding(None);
    let tokens = added_tokens(&tokenizer, config, map)?;
    if !tokens.is_empty() {
        let added = catch_unwind(AssertUnwindSafe(|| tokenizer.add_tokens(tokens)));
        let added = added.map_err(|_| invalid(CONFIG, &"the tokenizer does not accept these added tokens"))?;
        added.map_err(|e| invalid(CONFIG, &e))?;
    }
    Ok(tokenizer)
}

/// The tokens that transformers adds when it loads a fast tokenizer (`PreTrainedTokenizerFast.__init__`), in the same
/// order. First come the tokens of `added_tokens_decoder`, by id; their settings override those of tokenizer.json. Then
/// come named special tokens that are added nowhere else. A token that is already in the vocabulary keeps its id. A new
/// token gets the next free id, regardless of the id in its entry.
fn added_tokens(tokenizer: &Tokenizer, config: &Value, map: &Value) -> Result<Vec<AddedToken>, TextError> {
    let named = special_tokens(config, map);
    let special: HashSet<&str> = named.iter().map(|token| token.content.as_str()).collect();
    let known = tokenizer.get_added_tokens_decoder();
    let mut tokens = decoder_entries(config)?;
    for token in &mut tokens {
        token.special |= special.contains(token.content.as_str());
    }
    for token in named {
        let content = &token.content;
        if !known.values().chain(&tokens).any(|other| other.content == *content) {
            tokens.push(token);
        }
    }
    // Adding even one token rebuilds the matcher of all added tokens, so unchanged tokens are dropped here.
    tokens.retain(|token| !token.content.is_empty() && !known.values().any(|other| other == token));
    Ok(tokens)
}

/// The tokens of `added_tokens_decoder`, `{"id": {"content": .., "special": .., ..}}`, in ascending order of id.
fn decoder_entries(config: &Value) -> Result<Vec<AddedToken>, TextError> {
    let field = "added_tokens_decoder";
    let invalid = |reason: String| TextError::Invalid { file: CONFIG, reason };
    let entries = match &config[field] {
        Value::Null => return Ok(Vec::new()),
        Value::Object(entries) => entries,
        _ => return Err(invalid(format!("{field} must be an object of token ids and tokens"))),
    };
    let mut tokens = Vec::with_capacity(entries.len());
    for (id, entry) in entries {
        let place: u32 =
            id.parse().map_err(|_| invalid(format!("{field} must be an object of token ids, got \"{id}\"")))?;
        let token = token(entry).ok_or_else(|| invalid(format!("{field}.{id}.content must be a text, got {entry}")))?;
        tokens.push((place, token));
    }
    tokens.sort_by_key(|(place, _)| *place);
    Ok(tokens.into_iter().map(|(_, token)| token).collect())
}

/// The special tokens that the files name. As in transformers, special_tokens_map.json is read only if
/// tokenizer_config.json has no `added_tokens_decoder`.
pub(crate) fn special_tokens(config: &Value, map: &Value) -> Vec<AddedToken> {
    let older = config["added_tokens_decoder"].is_null();
    let one = |name: &str| named_token(config, map, name);
    let mut tokens: Vec<AddedToken> = NAMED_TOKENS.iter().filter_map(|name| one(name)).collect();
    let several = |value: &Value| -> Vec<AddedToken> {
        match value {
            Value::Array(list) => list.iter().filter_map(token).collect(),
            Value::Object(named) => named.values().filter_map(token).collect(),
            _ => Vec::new(),
        }
    };
    for name in ["additional_special_tokens", "extra_special_tokens"] {
        let value = if older && !map[name].is_null() { &map[name] } else { &config[name] };
        tokens.extend(several(value));
    }
    for token in &mut tokens {
        token.special = true;
    }
    tokens
}

/// The special token called `name`. If special_tokens_map.json is read (see [`special_tokens`]), it takes precedence.
pub(crate) fn named_token(config: &Value, map: &Value, name: &str) -> Option<AddedToken> {
    let older = config["added_tokens_decoder"].is_null();
    older.then(|| token(&map[name])).flatten().or_else(|| token(&config[name]))
}

/// Parses a token: a string, or a serialised `AddedToken`. A token given as a string is a special token and is matched
/// without normalization.
fn token(value: &Value) -> Option<AddedToken> {
    if let Value::String(content) = value {
        return Some(AddedToken::from(content, true));
    }
    let flag = |name: &str| value[name].as_bool();
    let content = value["content"].as_str()?;
    let special = flag("special").unwrap_or(false);
    Some(
        AddedToken::from(content, special)
            .lstrip(flag("lstrip").unwrap_or(false))
            .rstrip(flag("rstrip").unwrap_or(false))
            .single_word(flag("single_word").unwrap_or(false))
            .normalized(flag("normalized").unwrap_or(!special)),
    )
}
