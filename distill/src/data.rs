//! Training and evaluation data: tokenises JSONL lines of `messages`, or of `prompt` and `response`.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
};

use anyhow::{Context, Result, bail};
use overfill_text::{ChatMessage, TextModel};
use serde::{Deserialize, Serialize};

use crate::random::Random;

/// One line of a data file.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
#[serde(untagged)]
pub enum Line {
    /// A chat. Every assistant message is a response to learn.
    Messages {
        /// Messages of the chat, in order.
        messages: Vec<ChatMessage>,
    },
    /// A raw prompt and its response.
    Pair {
        /// Prompt. Encoding adds the tokenizer's prefix (often a begin-of-text token).
        prompt: String,
        /// Response. It is encoded separately, and an end-of-text token is appended.
        response: String,
    },
}

/// A tokenised line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// All tokens.
    pub tokens: Vec<u32>,
    /// For each token, whether it is part of a response.
    pub learned: Vec<bool>,
}

impl Example {
    fn push(&mut self, tokens: Vec<u32>, learned: bool) {
        self.learned.extend(std::iter::repeat_n(learned, tokens.len()));
        self.tokens.extend(tokens);
    }

    /// Splits the example into the tokens before the last response, and the last response.
    pub fn last_response(&self) -> (&[u32], &[u32]) {
        let end = self.learned.iter().rposition(|l| *l).map_or(0, |i| i + 1);
        let start = self.learned[..end].iter().rposition(|l| !*l).map_or(0, |i| i + 1);
        (&self.tokens[..start], &self.tokens[start..end])
    }
}

/// Tokenises one line. Prompts and responses are encoded separately, as in serving.
pub fn tokenize(line: &Line, text: &TextModel) -> Result<Example> {
    let mut example = Example { tokens: Vec::new(), learned: Vec::new() };
    match line {
        Line::Pair { prompt, response } => {
            example.push(text.encode(prompt, true)?, false);
            let mut tokens = text.encode(response, false)?;
            tokens.extend(text.eos_token_ids().first());
            example.push(tokens, true);
        }
        Line::Messages { messages } => {
            let mut done = String::new();
            for i in (0..messages.len()).filter(|i| messages[*i].role == "assistant") {
                let prompt = text.apply_chat_template(&messages[..i], true)?;
                let full = text.apply_chat_template(&messages[..=i], false)?;
                let (Some(asked), Some(answer)) = (prompt.strip_prefix(&done), full.strip_prefix(&prompt)) else {
                    bail!("can't train on message {i}: the chat template changes the text of earlier messages");
                };
                example.push(text.encode(asked, false)?, false);
                example.push(text.encode(answer, false)?, true);
                done = full;
            }
        }
    }
    if !example.learned.contains(&true) {
        bail!("line has no response: expected an assistant message or a `response`");
    }
    Ok(example)
}

/// Parses the lines of a JSONL file. Empty lines are skipped.
pub fn read_lines(path: &Path) -> Result<Vec<Line>> {
    let file = File::open(path).with_context(|| format!("reading {}", path.display()))?;
    let mut lines = Vec::new();
    for (i, line) in BufReader::new(file).lines().enumerate() {
        let line = line.with_context(|| format!("reading {}", path.display()))?;
        if !line.trim().is_empty() {
            let expected = "expected {\"messages\": [..]} or {\"prompt\": .., \"response\": ..}";
            let parsed = serde_json::from_str(&line);
            lines.push(parsed.with_context(|| format!("{}:{}: {expected}", path.display(), i + 1))?);
        }
    }
    Ok(lines)
}

/// Loads the examples of a file, cut to `max_tokens`. Skips examples that have no response token left after a prompt,
/// and returns their number.
pub fn load(path: &Path, text: &TextModel, max_tokens: usize) -> Result<(Vec<Example>, usize)> {
    let lines = read_lines(path)?;
    let mut examples = Vec::with_capacity(lines.len());
    for (i, line) in lines.iter().enumerate() {
        let mut example = tokenize(line, text).with_context(|| format!("{}: example {}", path.display(), i + 1))?;
        example.tokens.truncate(max_tokens);
        example.learned.truncate(max_tokens);
        if example.learned.iter().skip(1).any(|l| *l) {
            examples.push(example);
        }
    }
    if examples.is_empty() {
        bail!("{}: no example with a response within {max_tokens} tokens", path.display());
    }
    let left_out = lines.len() - examples.len();
    Ok((examples, left_out))
}

/// Returns the batches of one epoch, as indices into the examples.
///
/// With `shuffle`, the order of examples is random and depends only on the seed and the epoch. Without it, the file's
/// order is kept (a curriculum). Within windows of 8 batches, examples are grouped by length, to reduce padding.
pub fn epoch(lengths: &[usize], batch: usize, shuffle: bool, seed: u64, epoch: usize) -> Vec<Vec<usize>> {
    const WINDOW: usize = 8;
    let mut random = Random::new(seed, &format!("epoch {epoch}"));
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    if shuffle {
        random.shuffle(&mut order);
    }
    let mut batches = Vec::new();
    for window in order.chunks_mut(WINDOW * batch) {
        window.sort_by_key(|i| lengths[*i]);
        let mut of_window: Vec<Vec<usize>> = window.chunks(batch).map(<[usize]>::to_vec).collect();
        random.shuffle(&mut of_window);
        batches.extend(of_window);
    }
    if batches.len() > 1 {
        // Rows of a smaller last batch would have a larger weight.
        batches.retain(|b| b.len() == batch);
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_line_parse() {
        let pair: Line = serde_json::from_str(r#"{"prompt": "a", "response": "b", "id": 7}"#).unwrap();
        assert_eq!(pair, Line::Pair { prompt: "a".into(), response: "b".into() });
        let chat = r#"{"messages": [{"role": "user", "content": "a"}]}"#;
        assert!(matches!(serde_json::from_str(chat).unwrap(), Line::Messages { .. }));
        assert!(serde_json::from_str::<Line>(r#"{"text": "a"}"#).is_err());
    }

    #[test]
    fn the_last_response_is_found() {
        let learned = vec![false, true, true, false, false, true, true];
        let example = Example { tokens: (0..7).collect(), learned };
        assert_eq!(example.last_response(), (&[0, 1, 2, 3, 4][..], &[5, 6][..]));
    }

    #[test]
    fn an_epoch_is_every_example_once_and_reproducible() {
        let lengths: Vec<usize> = (0..40).map(|i| 10 + i % 7).collect();
        let batches = epoch(&lengths, 4, true, 3, 0);
        let mut all: Vec<usize> = batches.concat();
        all.sort_unstable();
        assert_eq!(all, (0..40).collect::<Vec<_>>());
        assert_eq!(batches, epoch(&lengths, 4, true, 3, 0));
        assert_ne!(batches, epoch(&lengths, 4, true, 3, 1));
        // Without shuffling, no example leaves its window.
        for (at, batch) in epoch(&lengths, 2, false, 0, 0).iter().enumerate() {
            assert!(batch.iter().all(|i| i / 16 == at / 8));
        }
    }
}
