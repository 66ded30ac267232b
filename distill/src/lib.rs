//! Making decode models: importance pruning of a full model by width, fine-tuning under the full model's KV, and
//! evaluation of what came out. And the demo pair, made by exactly that. And the check of a model against
//! candle-transformers.

mod attention;
mod batch;
pub mod check;
mod checkpoint;
pub mod cli;
mod data;
pub mod demo;
pub mod eval;
mod folder;
mod fused;
pub mod optim;
pub mod prune;
mod random;
pub mod train;

use std::path::Path;

pub use data::Example;

/// Tokenised examples of a JSONL file, cut to `max_tokens`, by the tokenizer of a model's folder.
pub fn examples(file: &Path, model: &Path, max_tokens: usize) -> anyhow::Result<Vec<Example>> {
    Ok(data::load(file, &train::load_text(model)?, max_tokens)?.0)
}
