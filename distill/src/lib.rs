//! Makes and evaluates decode models: importance pruning of a full model by width, fine-tuning over the full model's
//! KV, and scoring. Also contains the recipe of the demo pair, and the check of a model against candle-transformers.

mod attention;
mod batch;
pub mod check;
mod checkpoint;
pub mod cli;
mod data;
pub mod demo;
pub mod eval;
mod folder;
mod full;
pub mod measure;
pub mod optim;
pub mod prune;
mod random;
pub mod train;

use std::path::Path;

pub use data::Example;

/// Loads a JSONL file with the tokenizer of the model folder `model`, and cuts each example to `max_tokens`.
pub fn examples(file: &Path, model: &Path, max_tokens: usize) -> anyhow::Result<Vec<Example>> {
    Ok(data::load(file, &train::load_text(model)?, max_tokens)?.0)
}
