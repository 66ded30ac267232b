//! Writes the demo's files: tokenizer and configuration of the full model, and the data of every stage.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
};

use anyhow::{Context, Result};
use overfill_text::ChatMessage;
use serde_json::json;

use super::{
    files,
    task::{Question, Split, people, records},
};
use crate::{data::Line, random::Random};

/// Number of people in a document of the final task: from, to (inclusive).
const PEOPLE: (usize, usize) = (3, 4);

/// Amount of data, and its seed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataConfig {
    /// Seed of all random streams.
    pub seed: u64,
    /// Number of chats that train the full model, with four questions each. They get harder in the file's order.
    pub conversations: usize,
    /// Number of further chats, all of full difficulty.
    pub more_conversations: usize,
    /// Number of prompt and response pairs that fine-tune a student.
    pub pairs: usize,
    /// Number of held-out prompt and response pairs. Their documents are in no training file.
    pub held_out: usize,
}

/// Writes `full/` (tokenizer and config.json, no weights), `conversations.jsonl`, `more-conversations.jsonl`,
/// `pairs.jsonl` and `held-out.jsonl`.
pub fn write(folder: &Path, config: &DataConfig) -> Result<()> {
    let full = folder.join("full");
    fs::create_dir_all(&full).with_context(|| format!("creating {}", full.display()))?;
    files::write(&full)?;
    crate::folder::write_json(&full.join("config.json"), &model_config())?;

    let mut random = Random::new(config.seed, "conversations");
    write_lines(&folder.join("conversations.jsonl"), config.conversations, |i| {
        let progress = i as f64 / config.conversations as f64;
        let range = match progress {
            p if p < 0.10 => (1, 2),
            p if p < 0.25 => (2, 3),
            _ => PEOPLE,
        };
        conversation(&mut random, range)
    })?;
    let mut random = Random::new(config.seed, "more conversations");
    let more = folder.join("more-conversations.jsonl");
    write_lines(&more, config.more_conversations, |_| conversation(&mut random, PEOPLE))?;
    let mut random = Random::new(config.seed, "pairs");
    write_lines(&folder.join("pairs.jsonl"), config.pairs, |_| pair(&mut random, Split::Train))?;
    let mut random = Random::new(config.seed, "held out");
    write_lines(&folder.join("held-out.jsonl"), config.held_out, |_| pair(&mut random, Split::HeldOut))
}

/// Returns config.json of the full model.
fn model_config() -> serde_json::Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "vocab_size": files::vocabulary().len(), "tie_word_embeddings": true, "attention_bias": false, "mlp_bias": false,
        "max_position_embeddings": 2048, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "initializer_range": 0.125,
        "bos_token_id": 0, "eos_token_id": files::EOS_ID, "torch_dtype": "float32",
    })
}

fn between(random: &mut Random, (from, to): (usize, usize)) -> usize {
    from + random.below(to - from + 1)
}

fn conversation(random: &mut Random, range: (usize, usize)) -> Line {
    let count = between(random, range);
    let group = people(random, Split::Train, count);
    let mut messages = Vec::new();
    for question in random.choose(&Question::ALL, 4) {
        let asked = match messages.is_empty() {
            true => format!("{} {}", records(&group), question.text()),
            false => question.text().to_string(),
        };
        messages.push(ChatMessage::new("user", asked));
        messages.push(ChatMessage::new("assistant", question.answer(&group)));
    }
    Line::Messages { messages }
}

fn pair(random: &mut Random, split: Split) -> Line {
    let count = between(random, PEOPLE);
    let group = people(random, split, count);
    let question = Question::ALL[random.below(Question::ALL.len())];
    Line::Pair { prompt: format!("{} {}", records(&group), question.text()), response: question.answer(&group) }
}

fn write_lines(path: &Path, count: usize, mut line: impl FnMut(usize) -> Line) -> Result<()> {
    let context = || format!("writing {}", path.display());
    let mut out = BufWriter::new(File::create(path).with_context(context)?);
    for i in 0..count {
        serde_json::to_writer(&mut out, &line(i)).with_context(context)?;
        out.write_all(b"\n").with_context(context)?;
    }
    out.flush().with_context(context)
}
