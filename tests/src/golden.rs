//! The golden pairs: what a reference implementation gives, and how close is close enough.

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, de::DeserializeOwned};

use crate::Completion;

/// Every pair in `golden/`.
pub const PAIRS: [&str; 5] = ["llama-tied", "llama-untied", "qwen2", "qwen3", "llama-depth"];

/// Largest distance of a log-probability, with float32 weights, arithmetic and KV.
pub const TOLERANCE: f32 = 1e-3;

/// From the first step whose two best are closer than this, another token is no fault.
const CLOSE_CALL: f32 = 0.02;

/// One pair's `expected.json`.
#[derive(Debug, Deserialize)]
pub struct Golden {
    /// Prompts and what follows them.
    pub cases: Vec<Case>,
    /// A text and its ids.
    pub text: Text,
    /// Messages and the ids that the chat template gives.
    pub chat: Chat,
}

/// One prompt.
#[derive(Debug, Deserialize)]
pub struct Case {
    /// Token ids.
    pub prompt: Vec<u32>,
    /// The full model prefills and gives the first token, the pruned model the rest.
    pub two_stage: Vec<Step>,
    /// The full model gives all.
    pub full_only: Vec<Step>,
}

/// One greedy step.
#[derive(Debug, Deserialize)]
pub struct Step {
    /// The token chosen.
    pub token: u32,
    /// The five likeliest with their log-probabilities, best first.
    pub top: Vec<(u32, f32)>,
}

/// A text and its ids.
#[derive(Debug, Deserialize)]
pub struct Text {
    /// As given to the tokenizer.
    pub text: String,
    /// As the tokenizer gives them.
    pub ids: Vec<u32>,
}

/// Messages and their ids.
#[derive(Debug, Deserialize)]
pub struct Chat {
    /// As in the OpenAI API.
    pub messages: serde_json::Value,
    /// With the prompt for an answer at the end.
    pub ids: Vec<u32>,
}

/// One pair's `long.json`: more cases, up to 900 tokens.
#[derive(Deserialize)]
struct LongPrompts {
    cases: Vec<Case>,
}

fn read<T: DeserializeOwned>(pair: &str, file: &str) -> Result<T> {
    let path = folder(pair, file);
    let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    serde_json::from_str(&text).context(path)
}

/// A model folder of a pair.
pub fn folder(pair: &str, which: &str) -> String {
    let mut path = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    path.extend(["golden", pair, which]);
    path.to_string_lossy().into_owned()
}

impl Golden {
    /// Reads a pair's expectations.
    pub fn load(pair: &str) -> Result<Self> {
        let mut golden: Self = read(pair, "expected.json")?;
        golden.cases.extend(read::<LongPrompts>(pair, "long.json")?.cases);
        Ok(golden)
    }

    /// Arguments of `overfill up` that serve the pair as `small`, and its full model alone as `big`.
    pub fn up_args(pair: &str) -> Vec<String> {
        let (full, decode) = (folder(pair, "full"), folder(pair, "decode"));
        let args = ["--full", &full, "--decode", &format!("small={decode}"), "--decode", &format!("big={full}")];
        // The references are of f32. Small pools keep many clusters at once within a small machine's memory.
        let settings = ["--weights", "f32", "--kv-dtype", "f32", "--kv-pool-tokens", "16384"];
        args.into_iter().chain(settings).map(str::to_owned).collect()
    }
}

/// Is an answer what the reference gives, within the tolerance?
pub fn check(expected: &[Step], actual: &Completion) -> Result<()> {
    ensure!(actual.tokens.len() == expected.len(), "{} tokens, not {}", actual.tokens.len(), expected.len());
    ensure!(actual.top.len() == expected.len(), "{} log-probabilities, not {}", actual.top.len(), expected.len());
    for (i, step) in expected.iter().enumerate() {
        let reported: HashMap<u32, f32> = actual.top[i].iter().copied().collect();
        let worst_reported = actual.top[i].last().map_or(f32::NEG_INFINITY, |&(_, logprob)| logprob);
        for &(token, logprob) in &step.top {
            // Two of nearly the same probability may change places at the end of the list.
            let distance = match reported.get(&token) {
                Some(reported) => (reported - logprob).abs(),
                None => (worst_reported - logprob).abs(),
            };
            ensure!(distance <= TOLERANCE, "step {i}: token {token} is {distance} from the reference {logprob}");
        }
        if actual.tokens[i] != step.token {
            let close = step.top.len() > 1 && step.top[0].1 - step.top[1].1 < CLOSE_CALL;
            ensure!(close, "step {i}: token {} instead of {}", actual.tokens[i], step.token);
            return Ok(());
        }
        let own = actual.logprobs.get(i).copied().unwrap_or(f32::NAN);
        ensure!((own - step.top[0].1).abs() <= TOLERANCE, "step {i}: reported {own}, reference {}", step.top[0].1);
    }
    Ok(())
}
