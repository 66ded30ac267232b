//! [`TextModel`]: a model's tokenizer, chat template and generation defaults.

use std::{
    collections::{BTreeMap, HashSet},
    fmt::Write as _,
    sync::Arc,
};

use overfill_kv::Grammar;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokenizers::Tokenizer;

use crate::{
    AnswerFormat, Detokenizer, GenerationDefaults, Offsets, TextError, TextFiles, ToolFormat,
    answer::grammar,
    files::parsed,
    template::{ChatInput, ChatTemplate},
    templates::Templates,
    tokenizer,
    vocabulary::Vocabulary,
};

/// One message of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// The author's role: `system`, `user`, `assistant`, or another role that the template supports.
    pub role: String,
    /// Text of the message.
    pub content: String,
}

impl ChatMessage {
    /// Creates a message.
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
    special_tokens: BTreeMap<String, String>,
    templates: Option<Templates>,
    generation: GenerationDefaults,
}

impl TextModel {
    /// Parses the files. Errors name the file.
    pub fn from_files(files: &TextFiles) -> Result<Self, TextError> {
        let TextFiles {
            tokenizer_json,
            tokenizer_config_json,
            chat_template,
            generation_config_json,
            special_tokens_map_json,
        } = files;
        let invalid = |file, e: &dyn ToString| TextError::Invalid { file, reason: e.to_string() };
        let config = parsed("tokenizer_config.json", tokenizer_config_json.as_deref())?;
        let map = parsed("special_tokens_map.json", special_tokens_map_json.as_deref())?;
        let tokenizer = Arc::new(tokenizer::load(tokenizer_json, &config, &map)?);
        let special = tokenizer.get_added_tokens_decoder().into_iter().filter(|(_, t)| t.special).map(|(id, _)| id);
        let special = Arc::new(special.collect());
        let file = chat_template.as_deref().map(std::str::from_utf8).transpose();
        let file = file.map_err(|e| invalid("chat_template.jinja", &e))?;
        let special_tokens = special_tokens(&config, &map);
        let templates = Templates::compile(file, &config, &special_tokens)?;
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
        Ok(Self {
            tokenizer,
            vocabulary,
            special,
            tokenizer_sha256,
            eos_token_ids,
            special_tokens,
            templates,
            generation,
        })
    }

    /// SHA-256 of tokenizer.json in lower-case hex. KV schemas contain this hash, so that models with different tokenizers
    /// are not paired.
    pub fn tokenizer_sha256(&self) -> &str {
        &self.tokenizer_sha256
    }

    /// Number of tokens in the tokenizer, including added tokens. The model's own vocabulary may be larger.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// Texts of the special tokens that have a name in tokenizer_config.json, such as `eos_token`.
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.special_tokens
    }

    /// Defaults of generation_config.json.
    pub fn generation_defaults(&self) -> &GenerationDefaults {
        &self.generation
    }

    /// End-of-text token ids: those of generation_config.json, then the tokenizer's `eos_token`. The model's config.json may
    /// name more; the node that serves the model adds those.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }

    /// Whether the model has a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.templates.is_some()
    }

    /// The format in which the chat template asks for tool calls. `None`: it names no tools, or asks for an unknown format.
    pub fn tool_format(&self) -> Option<ToolFormat> {
        self.templates.as_ref()?.tool_format
    }

    /// The grammar of answers in `format` that call one of `functions`, given by name and JSON schema of the arguments.
    pub fn call_grammar(&self, format: &AnswerFormat, functions: &[(&str, &Value)]) -> Grammar {
        let marks_arguments = self.templates.as_ref().is_some_and(|templates| templates.marks_arguments);
        Grammar::Lark(grammar::of_calls(format, functions, marks_arguments, |text| self.special_id(text)))
    }

    /// The grammar of answers whose text after the reasoning matches `grammar`.
    pub fn grammar_after_reasoning(&self, format: &AnswerFormat, grammar: &Grammar) -> Grammar {
        grammar::after_reasoning(format, grammar, |text| self.special_id(text))
    }

    fn special_id(&self, text: &str) -> Option<u32> {
        self.tokenizer.token_to_id(text).filter(|id| self.special.contains(id))
    }

    /// Encodes `text`. `add_special` adds the special tokens of the tokenizer's post-processor, often a begin-of-text token.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        let encoding =
            self.tokenizer.encode_fast(text, add_special).map_err(|e| TextError::Tokenizer(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Decodes all tokens at once. `skip_special` omits special tokens.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TextError> {
        self.tokenizer.decode(ids, skip_special).map_err(|e| TextError::Tokenizer(e.to_string()))
    }

    /// The bytes that a token contributes in the middle of a text. They may be an incomplete UTF-8 character.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.vocabulary.bytes(id)
    }

    /// Whether it is a special token, which is not part of the text.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// The unique name of a token in reported log-probabilities: its text, `bytes:\xf0` if it is an incomplete character,
    /// or `token_id:17` if another token has the same text.
    pub fn token_name(&self, id: u32) -> String {
        self.vocabulary.name(id)
    }

    /// The entry of a token in the tokenizer's vocabulary, such as `Ġhello`. `None`: the tokenizer has no such token.
    pub fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// A counter of token offsets in the text that follows the tokens of `context`.
    pub fn offsets(&self, context: &[u32], skip_special: bool) -> Offsets {
        Offsets::new(self.vocabulary.clone(), self.special.clone(), context, skip_special)
    }

    /// Renders `messages` to a prompt with the chat template.
    pub fn apply_chat_template(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        let json = |message: &ChatMessage| json!({"role": message.role, "content": message.content});
        self.render_chat(&ChatInput::new(&messages.iter().map(json).collect::<Vec<_>>(), add_generation_prompt))
    }

    /// Renders a prompt from messages in any JSON form, with tools, documents and template variables.
    pub fn render_chat(&self, input: &ChatInput<'_>) -> Result<String, TextError> {
        self.templates.as_ref().ok_or(TextError::NoChatTemplate)?.render(input)
    }

    /// Renders a prompt with another chat template than the model's.
    pub fn render_with(&self, source: &str, input: &ChatInput<'_>) -> Result<String, TextError> {
        ChatTemplate::compile(source, self.special_tokens.clone())?.render(input)
    }

    /// Renders `messages` and encodes the prompt. The template writes the special tokens, so the tokenizer adds none.
    pub fn encode_chat(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<Vec<u32>, TextError> {
        self.encode(&self.apply_chat_template(messages, add_generation_prompt)?, false)
    }

    /// An incremental decoder for the tokens that follow `context`, the last tokens of the prompt. It does not return the
    /// text of `context`.
    pub fn detokenizer(&self, context: &[u32], skip_special: bool) -> Result<Detokenizer, TextError> {
        let skipped = if skip_special { self.special.clone() } else { Arc::default() };
        Detokenizer::new(self.tokenizer.clone(), skipped, context)
    }

    /// As [`detokenizer`](Self::detokenizer) without special tokens, except `shown`.
    pub fn detokenizer_showing(&self, context: &[u32], shown: &[u32]) -> Result<Detokenizer, TextError> {
        let skipped = match shown {
            [] => self.special.clone(),
            shown => Arc::new(self.special.iter().filter(|id| !shown.contains(id)).copied().collect()),
        };
        Detokenizer::new(self.tokenizer.clone(), skipped, context)
    }

    /// The special tokens among `texts`.
    pub fn special_ids(&self, texts: impl Iterator<Item = &'static str>) -> Vec<u32> {
        texts.filter_map(|text| self.special_id(text)).collect()
    }
}

/// The texts of [`tokenizer::NAMED_TOKENS`] by field name, as variables of the chat template.
fn special_tokens(config: &Value, map: &Value) -> BTreeMap<String, String> {
    let token = |name: &str| Some((name.to_owned(), tokenizer::named_token(config, map, name)?.content));
    tokenizer::NAMED_TOKENS.iter().filter_map(|name| token(name)).collect()
}
