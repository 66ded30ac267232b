//! Streams calibration samples from a text or JSONL file.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
};

use anyhow::{Context, Result, bail};
use overfill_text::TextModel;
use serde_json::Value;

use crate::data::{Line, tokenize};

/// Calls `sample` with up to `samples` token sequences of at most `sample_tokens` tokens. Returns the number of calls.
///
/// A `.jsonl` or `.json` file has one sample per line (`text`, `messages`, or `prompt` and `response`), cut to length.
/// Any other file is one text, cut into samples of full length. A shorter rest is used only if it is the only sample.
pub fn stream(
    path: &Path,
    text: &TextModel,
    samples: usize,
    sample_tokens: usize,
    mut sample: impl FnMut(&[u32]) -> Result<()>,
) -> Result<usize> {
    let file = File::open(path).with_context(|| format!("reading {}", path.display()))?;
    let jsonl = path.extension().is_some_and(|e| e == "jsonl" || e == "json");
    let mut reader = BufReader::new(file);
    let (mut pending, mut seen, mut number) = (Vec::new(), 0, 0);
    let mut line = String::new();
    while seen < samples {
        line.clear();
        if reader.read_line(&mut line).with_context(|| format!("reading {}", path.display()))? == 0 {
            break;
        }
        number += 1;
        if jsonl {
            if line.trim().is_empty() {
                continue;
            }
            let mut tokens = line_tokens(&line, text).with_context(|| format!("{}:{number}", path.display()))?;
            tokens.truncate(sample_tokens);
            if !tokens.is_empty() {
                sample(&tokens)?;
                seen += 1;
            }
            continue;
        }
        pending.extend(text.encode(&line, false)?);
        while pending.len() >= sample_tokens && seen < samples {
            sample(&pending[..sample_tokens])?;
            pending.drain(..sample_tokens);
            seen += 1;
        }
    }
    if seen == 0 && !pending.is_empty() {
        sample(&pending)?;
        seen = 1;
    }
    if seen == 0 {
        bail!("{}: no text to calibrate on", path.display());
    }
    Ok(seen)
}

fn line_tokens(line: &str, text: &TextModel) -> Result<Vec<u32>> {
    let value: Value = serde_json::from_str(line)?;
    if let Some(plain) = value["text"].as_str() {
        return Ok(text.encode(plain, true)?);
    }
    let line: Line = serde_json::from_value(value)
        .context("expected {\"text\": ..}, {\"messages\": [..]} or {\"prompt\": .., \"response\": ..}")?;
    Ok(tokenize(&line, text)?.tokens)
}
