//! A model's text side, ready for use.

use std::{
    collections::{BTreeMap, HashSet},
    fmt::Write as _,
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokenizers::Tokenizer;

use crate::{
    Detokenizer, GenerationDefaults, Offsets, TextError, TextFiles,
    template::{ChatInput, ChatTemplate},
    tokenizer,
    vocabulary::Vocabulary,
};

/// One message of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// Who speaks: `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl ChatMessage {
    /// A message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// Tokenizer, chat template and generation defaults of one model. Cheap to share behind an `Arc`.
pub struct TextModel {
    tokenizer: Arc<Tokenizer>,
    vocabulary: Arc<Vocabulary>,
    special: Arc<HashSet<u32>>,
    tokenizer_sha256: String,
    eos_token_ids: Vec<u32>,
    template: Option<ChatTemplate>,
    generation: GenerationDefaults,
}

impl TextModel {
    /// Parses the files; errors name the file.
    pub fn from_files(files: &TextFiles) -> Result<Self, TextError> {
        let TextFiles {
            tokenizer_json,
            tokenizer_config_json,
            chat_template,
            generation_config_json,
            special_tokens_map_json,
        } = files;
        let invalid = |file, e: &dyn ToString| TextError::Invalid { file, reason: e.to_string() };
        let json = |file, bytes: &Option<Vec<u8>>| match bytes {
            Some(bytes) => serde_json::from_slice(bytes).map_err(|e| invalid(file, &e)),
            None => Ok(Value::Null),
        };
        let config = json("tokenizer_config.json", tokenizer_config_json)?;
        let map = json("special_tokens_map.json", special_tokens_map_json)?;
        let tokenizer = Arc::new(tokenizer::load(tokenizer_json, &config, &map)?);
        let special = tokenizer.get_added_tokens_decoder().into_iter().filter(|(_, t)| t.special).map(|(id, _)| id);
        let special = Arc::new(special.collect());
        let source = match chat_template {
            Some(bytes) => Some(String::from_utf8(bytes.clone()).map_err(|e| invalid("chat_template.jinja", &e))?),
            None => default_template(&config["chat_template"]),
        };
        let template = match source {
            Some(source) => Some(ChatTemplate::compile(&source, special_tokens(&config, &map))?),
            None => None,
        };
        let generation = match generation_config_json {
            Some(bytes) => GenerationDefaults::parse(bytes)?,
            None => GenerationDefaults::default(),
        };
        let tokenizer_sha256 = Sha256::digest(tokenizer_json).iter().fold(String::new(), |mut hex, byte| {
            // Writing to a String can't fail.
            let _ = write!(hex, "{byte:02x}");
            hex
        });
        let mut eos_token_ids = generation.eos_token_ids.clone();
        let named = tokenizer::named_token(&config, &map, "eos_token");
        let id = named.and_then(|token| tokenizer.token_to_id(&token.content));
        eos_token_ids.extend(id.filter(|id| !eos_token_ids.contains(id)));
        let vocabulary = Arc::new(Vocabulary::new(tokenizer.clone()));
        Ok(Self { tokenizer, vocabulary, special, tokenizer_sha256, template, generation, eos_token_ids })
    }

    /// SHA-256 of tokenizer.json, lower-case hex: what two models' schemas are compared by.
    pub fn tokenizer_sha256(&self) -> &str {
        &self.tokenizer_sha256
    }

    /// Tokens known to the tokenizer, added ones included. A model's vocabulary may be larger.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// What the folder says about generation.
    pub fn generation_defaults(&self) -> &GenerationDefaults {
        &self.generation
    }

    /// Tokens that end a text: those of generation_config.json, then the tokenizer's `eos_token`. A model's config.json may
    /// name others: the node that serves the model adds them.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }

    /// Does the folder have a chat template?
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// Token ids of `text`; `add_special` puts in what the model's post-processor adds (often a begin-of-text token).
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        let encoding =
            self.tokenizer.encode_fast(text, add_special).map_err(|e| TextError::Tokenizer(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of tokens, all at once.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TextError> {
        self.tokenizer.decode(ids, skip_special).map_err(|e| TextError::Tokenizer(e.to_string()))
    }

    /// The bytes that a token adds to a text in its middle. They may be a part of a character.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.vocabulary.bytes(id)
    }

    /// A token as log-probabilities name it: its text, `bytes:\xf0` for a part of a character, or `token_id:17` where
    /// another token has the same text. No two tokens share a name.
    pub fn token_name(&self, id: u32) -> String {
        self.vocabulary.name(id)
    }

    /// Counts where tokens begin in the text that follows `context`.
    pub fn offsets(&self, context: &[u32], skip_special: bool) -> Offsets {
        Offsets::new(self.vocabulary.clone(), self.special.clone(), context, skip_special)
    }

    /// The prompt that the chat template makes of `messages`.
    pub fn apply_chat_template(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        let json = |message: &ChatMessage| json!({"role": message.role, "content": message.content});
        self.render_chat(&ChatInput::new(&messages.iter().map(json).collect::<Vec<_>>(), add_generation_prompt))
    }

    /// The prompt that the chat template makes of messages in any form, with tools and variables of the request.
    pub fn render_chat(&self, input: &ChatInput<'_>) -> Result<String, TextError> {
        self.template.as_ref().ok_or(TextError::NoChatTemplate)?.render(input)
    }

    /// The same as token ids. The template has already written the special tokens: none are added.
    pub fn encode_chat(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<Vec<u32>, TextError> {
        self.encode(&self.apply_chat_template(messages, add_generation_prompt)?, false)
    }

    /// A decoder for the tokens that follow `context` (the end of the prompt, whose text is not repeated).
    pub fn detokenizer(&self, context: &[u32], skip_special: bool) -> Result<Detokenizer, TextError> {
        Detokenizer::new(self.tokenizer.clone(), self.special.clone(), context, skip_special)
    }
}

/// `chat_template` of tokenizer_config.json: a template, or a list of named ones.
fn default_template(value: &Value) -> Option<String> {
    match value {
        Value::String(source) => Some(source.clone()),
        Value::Array(named) => named.iter().find(|t| t["name"] == "default")?["template"].as_str().map(str::to_owned),
        _ => None,
    }
}

/// `bos_token`, `eos_token` and the like.
fn special_tokens(config: &Value, map: &Value) -> BTreeMap<String, String> {
    let token = |name: &str| Some((name.to_owned(), tokenizer::named_token(config, map, name)?.content));
    tokenizer::NAMED_TOKENS.iter().filter_map(|name| token(name)).collect()
}
