//! Text processing of a model: tokenizer, chat template, generation defaults, detokenization and stop strings.
//!
//! This crate does not need the model's weights. The router gets [`TextFiles`] from a prefill node and needs no model
//! folder.

mod answer;
mod detokenize;
mod files;
mod generation;
mod grammar;
mod model;
mod sentencepiece;
mod stop;
mod template;
mod templates;
mod tokenizer;
mod vocabulary;

pub use answer::{AnswerFormat, AnswerParser, AnswerPart, ReasoningFormat, ReasoningPosition, ToolFormat};
pub use detokenize::Detokenizer;
pub use files::TextFiles;
pub use generation::{GenerationDefaults, token_ids};
pub use grammar::{GrammarError, GrammarMatcher, Grammars, check_grammar};
pub use model::{ChatMessage, TextModel};
pub use sentencepiece::ranked_merges;
pub use stop::{StopMatch, StopMatcher};
pub use template::ChatInput;
pub use vocabulary::Offsets;

/// Invalid text files of a model, or text that the tokenizer or the chat template can't process.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file could not be read from disk.
    #[error("reading {path}: {source}")]
    Read {
        /// Path of the file.
        path: String,
        /// The I/O error.
        source: std::io::Error,
    },
    /// A file's content is invalid.
    #[error("{file}: {reason}")]
    Invalid {
        /// Name of the file.
        file: &'static str,
        /// What is wrong with the content.
        reason: String,
    },
    /// The model's folder has no chat template.
    #[error("the model has no chat template: send a prompt instead of messages")]
    NoChatTemplate,
    /// The chat template rejected the messages with `raise_exception`, or failed to render.
    #[error("chat template: {0}")]
    Template(String),
    /// The tokenizer failed to encode or decode.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
}
