//! Recorded requests, in the formats in which they are published.
//!
//! - JSON lines as of the Mooncake traces (FAST '25): `timestamp` in milliseconds, `input_length`, `output_length`, and
//!   optionally `hash_ids`, the ids of the prompt's blocks of 512 tokens. `overfill bench serve --record` writes them too.
//! - CSV as of the Azure LLM inference traces (2023 and 2024): `TIMESTAMP,ContextTokens,GeneratedTokens`.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

/// Tokens of a block in a Mooncake trace.
const HASHED_TOKENS: usize = 512;
/// First columns of a CSV trace.
const CSV_HEADER: &str = "TIMESTAMP,ContextTokens,GeneratedTokens";
/// Longest prompt or answer.
const MOST_TOKENS: usize = 1 << 24;

/// One recorded request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Record {
    /// Time of arrival in seconds, from any beginning.
    pub at_seconds: f64,
    /// Length of the prompt.
    pub prompt_tokens: usize,
    /// Length of the answer.
    pub output_tokens: usize,
    /// Tokens at the beginning of the prompt that earlier prompts had as well.
    pub cached_tokens: usize,
}

/// Recorded requests in order of arrival.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// At least one request.
    pub records: Vec<Record>,
    /// Time before each request, in mean times between arrivals. Empty if all came at once.
    pub gaps: Vec<f64>,
    /// Requests per second. `None` if all came at once.
    pub rate: Option<f64>,
}

#[derive(Deserialize)]
struct Line {
    timestamp: f64,
    input_length: usize,
    output_length: usize,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

impl Trace {
    /// Reads a trace. `cache_tokens` is the size of the prefix cache for which hits are counted.
    ///
    /// # Errors
    /// The file can't be read, or a line is in neither format.
    pub fn read(file: &Path, cache_tokens: usize) -> Result<Self> {
        let text = std::fs::read_to_string(file).with_context(|| format!("reading the trace {}", file.display()))?;
        Self::parse(&text, cache_tokens).with_context(|| format!("the trace {}", file.display()))
    }

    /// Parses a trace, see [`read`](Self::read).
    ///
    /// # Errors
    /// A line is in neither format, or there is none.
    pub fn parse(text: &str, cache_tokens: usize) -> Result<Self> {
        let mut lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).peekable();
        let csv = lines.next_if(|(_, line)| line.trim_start_matches('\u{feff}').starts_with(CSV_HEADER)).is_some();
        let mut read: Vec<(Record, Vec<u64>)> = Vec::new();
        for (i, line) in lines {
            let parsed = if csv { csv_line(line).map(|record| (record, Vec::new())) } else { json_line(line) };
            let (record, ids) = parsed.with_context(|| format!("line {}", i + 1))?;
            for (field, tokens) in [("prompt", record.prompt_tokens), ("answer", record.output_tokens)] {
                ensure!(
                    tokens <= MOST_TOKENS,
                    "line {}: the {field} must have at most {MOST_TOKENS} tokens, got {tokens}",
                    i + 1
                );
            }
            // Azure's traces have requests without a prompt or an answer. No server computes them.
            if record.prompt_tokens > 0 && record.output_tokens > 0 {
                read.push((record, ids));
            }
        }
        read.sort_by(|a, b| a.0.at_seconds.total_cmp(&b.0.at_seconds));
        let mut cache = Cache::new(cache_tokens / HASHED_TOKENS);
        let records: Vec<Record> = read
            .into_iter()
            .map(|(record, ids)| Record {
                cached_tokens: (cache.visit(&ids) * HASHED_TOKENS).min(record.prompt_tokens),
                ..record
            })
            .collect();
        let (Some(first), Some(last)) = (records.first(), records.last()) else {
            bail!("it has no requests. {CSV_HEADER} or JSON lines are needed")
        };
        let span = last.at_seconds - first.at_seconds;
        if span <= 0.0 {
            return Ok(Self { records, gaps: Vec::new(), rate: None });
        }
        // The trace repeats after one mean time between arrivals.
        let mean = span / (records.len() - 1) as f64;
        let between = records.windows(2).map(|pair| (pair[1].at_seconds - pair[0].at_seconds) / mean);
        let gaps = std::iter::once(1.0).chain(between).collect();
        Ok(Self { gaps, rate: Some(1.0 / mean), records })
    }
}

fn json_line(line: &str) -> Result<(Record, Vec<u64>)> {
    let line: Line = serde_json::from_str(line).context("timestamp, input_length and output_length are needed")?;
    let record = Record {
        at_seconds: line.timestamp / 1e3,
        prompt_tokens: line.input_length,
        output_tokens: line.output_length,
        cached_tokens: 0,
    };
    Ok((record, line.hash_ids))
}

fn csv_line(line: &str) -> Result<Record> {
    let cells: Vec<&str> = line.split(',').map(str::trim).collect();
    let [at, prompt, output, ..] = cells.as_slice() else { bail!("{CSV_HEADER} are needed, got {line:?}") };
    let tokens = |name: &str, cell: &str| -> Result<usize> {
        cell.parse().with_context(|| format!("{name} must be a number, got {cell:?}"))
    };
    Ok(Record {
        at_seconds: time_of(at)
            .with_context(|| format!("TIMESTAMP must be like 2023-11-16 18:17:03.979, got {at:?}"))?,
        prompt_tokens: tokens("ContextTokens", prompt)?,
        output_tokens: tokens("GeneratedTokens", output)?,
        cached_tokens: 0,
    })
}

/// Seconds since a fixed time of `2023-11-16 18:17:03.979`, with or without an offset at the end. The offset is ignored:
/// all lines of a trace have the same.
fn time_of(text: &str) -> Option<f64> {
    let (date, time) = text.split_once([' ', 'T'])?;
    let time = time.trim_end_matches('Z').split(['+', '-']).next()?;
    let number = |text: &str| text.parse::<f64>().ok().filter(|n| *n >= 0.0);
    let date: Vec<f64> = date.split('-').map(number).collect::<Option<_>>()?;
    let time: Vec<f64> = time.split(':').map(number).collect::<Option<_>>()?;
    let (&[year, month, day], &[hours, minutes, seconds]) = (date.as_slice(), time.as_slice()) else { return None };
    // Days of a calendar whose years begin in March, so that the leap day is the last one.
    let (years, months) = if month > 2.0 { (year, month - 3.0) } else { (year - 1.0, month + 9.0) };
    let leap_days = (years / 4.0).floor() - (years / 100.0).floor() + (years / 400.0).floor();
    let days = 365.0 * years + leap_days + ((153.0 * months + 2.0) / 5.0).floor() + day;
    Some(((days * 24.0 + hours) * 60.0 + minutes) * 60.0 + seconds)
}

/// A cache of blocks from which the least recently used ones fall out.
struct Cache {
    capacity: usize,
    clock: u64,
    used: HashMap<u64, u64>,
    order: BTreeMap<u64, u64>,
}

impl Cache {
    fn new(capacity: usize) -> Self {
        Self { capacity, clock: 0, used: HashMap::new(), order: BTreeMap::new() }
    }

    /// Uses the blocks of a prompt. Returns how many leading ones were cached.
    fn visit(&mut self, ids: &[u64]) -> usize {
        let hits = ids.iter().take_while(|id| self.used.contains_key(id)).count();
        // The end of a prompt falls out before its beginning, without which it is useless.
        for id in ids.iter().rev() {
            self.clock += 1;
            if let Some(before) = self.used.insert(*id, self.clock) {
                self.order.remove(&before);
            }
            self.order.insert(self.clock, *id);
        }
        while self.used.len() > self.capacity {
            let Some((_, id)) = self.order.pop_first() else { break };
            self.used.remove(&id);
        }
        hits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mooncakes_lines_have_times_lengths_and_hits() {
        let text = "{\"timestamp\": 1000, \"input_length\": 1300, \"output_length\": 5, \"hash_ids\": [1, 2, 3]}\n\n\
                    {\"timestamp\": 0, \"input_length\": 600, \"output_length\": 9, \"hash_ids\": [1, 7]}\n\
                    {\"timestamp\": 4000, \"input_length\": 1300, \"output_length\": 5, \"hash_ids\": [1, 2, 3]}";
        let trace = Trace::parse(text, 1 << 20).unwrap();
        let seen: Vec<_> = trace.records.iter().map(|r| (r.prompt_tokens, r.cached_tokens)).collect();
        assert_eq!(seen, [(600, 0), (1300, 512), (1300, 1300)]);
        assert_eq!((trace.rate, trace.gaps), (Some(0.5), vec![1.0, 0.5, 1.5]));
        // In a cache of two blocks, only the beginning is left.
        let small = Trace::parse(text, 1024).unwrap();
        assert_eq!(small.records[2].cached_tokens, 1024);
    }

    #[test]
    fn azures_lines_have_dates() {
        let text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-02-28 23:59:59.5000000,4808,10\n\
                    2024-03-01 00:00:00.5+00:00,3180,0\n2024-03-01T00:00:01.5Z,110,27\n";
        let trace = Trace::parse(text, 0).unwrap();
        // 2024 has a 29th of February. A request without an answer is left out.
        let seconds = trace.records[1].at_seconds - trace.records[0].at_seconds;
        assert_eq!((trace.records.len(), seconds), (2, 86_402.0));
    }

    #[test]
    fn faults_name_the_line_and_what_is_needed() {
        let fault = |text: &str| format!("{:#}", Trace::parse(text, 0).unwrap_err());
        assert!(fault("").contains("no requests"));
        assert!(fault("{}").starts_with("line 1: timestamp, input_length and output_length are needed"));
        let csv = |line: &str| fault(&format!("{CSV_HEADER}\n{line}"));
        assert!(csv("2024-02-28,1,2").starts_with("line 2: TIMESTAMP must be like"));
        assert!(csv("2024-02-28 00:00:00,x,2").contains("ContextTokens must be a number, got \"x\""));
        assert!(csv("1,2").contains("are needed"));
    }

    #[test]
    fn requests_at_one_moment_have_no_rate() {
        let text = "{\"timestamp\":5,\"input_length\":1,\"output_length\":1}";
        let trace = Trace::parse(text, 0).unwrap();
        assert_eq!((trace.rate, trace.gaps.len(), trace.records.len()), (None, 0, 1));
    }
}
