//! The text side of a model: its tokenizer, its chat template and what its folder says about generation.
//!
//! Nothing here needs weights: the router gets the files of [`TextFiles`] from a prefill node and needs no model folder.

mod detokenize;
mod files;
mod generation;
mod model;
mod stop;
mod template;
mod tokenizer;
mod vocabulary;

pub use detokenize::Detokenizer;
pub use files::TextFiles;
pub use generation::{GenerationDefaults, token_ids};
pub use model::{ChatMessage, TextModel};
pub use stop::{StopMatch, StopMatcher};
pub use template::ChatInput;
pub use vocabulary::Offsets;

/// Text files that can't be used, or text that they can't process.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file could not be read from disk.
    #[error("reading {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// A file's content is not what it must be.
    #[error("{file}: {reason}")]
    Invalid {
        /// Name of the file.
        file: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The model's folder has no chat template.
    #[error("the model has no chat template: send a prompt instead of messages")]
    NoChatTemplate,
    /// The chat template refuses the messages, or fails on them.
    #[error("chat template: {0}")]
    Template(String),
    /// The tokenizer failed.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
}
