//! The golden pairs: expected outputs of the reference implementation, and the comparison with them.

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, de::DeserializeOwned};

use crate::Completion;

/// All pairs in `golden/`.
pub const PAIRS: [&str; 12] = [
    "llama-tied",
    "llama-untied",
    "qwen2",
    "qwen3",
    "llama-depth",
    "mistral",
    "gemma2",
    "gemma3",
    "phi3",
    "smollm3",
    "olmo2",
    "granite",
];

/// Tokens of a KV block.
const BLOCK_TOKENS: usize = 16;

/// How far an answer may be from the reference, in nats.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// Largest difference of a log-probability.
    pub logprob: f32,
    /// If the two most likely tokens are closer than this, another token is accepted from this step on.
    pub close_call: f32,
}

/// With f32 weights, arithmetic and KV.
pub const EXACT: Tolerance = Tolerance { logprob: 1e-3, close_call: 0.02 };

/// With f16 weights, activations and KV.
pub const HALF: Tolerance = Tolerance { logprob: 0.2, close_call: 0.4 };

/// Content of `expected.json` of a pair.
#[derive(Debug, Deserialize)]
pub struct Golden {
    /// Prompts with their expected continuations.
    pub cases: Vec<Case>,
    /// Expected tokenisation of a text.
    pub text: Text,
    /// Expected tokenisation of a chat.
    pub chat: Chat,
}

/// A prompt with its expected continuations.
#[derive(Debug, Deserialize)]
pub struct Case {
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// Steps in two stages: the full model predicts the first token, the pruned model the others.
    pub two_stage: Vec<Step>,
    /// Steps of the full model alone.
    pub full_only: Vec<Step>,
}

/// A greedy step.
#[derive(Debug, Deserialize)]
pub struct Step {
    /// The chosen token.
    pub token: u32,
    /// The five most likely tokens with their log-probabilities, best first.
    pub top: Vec<(u32, f32)>,
}

/// A text and its ids.
#[derive(Debug, Deserialize)]
pub struct Text {
    /// Input of the tokenizer.
    pub text: String,
    /// Expected token ids.
    pub ids: Vec<u32>,
}

/// Messages and their token ids.
#[derive(Debug, Deserialize)]
pub struct Chat {
    /// Messages in the form of the OpenAI API.
    pub messages: serde_json::Value,
    /// Token ids, including the generation prompt.
    pub ids: Vec<u32>,
}

/// Content of `long.json` of a pair: further cases, up to 900 tokens.
#[derive(Deserialize)]
struct LongPrompts {
    cases: Vec<Case>,
}

fn read<T: DeserializeOwned>(pair: &str, file: &str) -> Result<T> {
    let path = folder(pair, file);
    let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    serde_json::from_str(&text).context(path)
}

/// A prompt with its expected continuation in mode refresh.
#[derive(Debug, Deserialize)]
pub struct RefreshCase {
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// The greedy steps: the token, its log-probability, and the distance to that of the second best token.
    pub refresh: Vec<(u32, f32, f32)>,
}

/// Content of `refresh.json` of a pair.
#[derive(Deserialize)]
struct Refresh {
    cases: Vec<RefreshCase>,
}

/// Reads the expected outputs of a pair in mode refresh.
pub fn refresh_cases(pair: &str) -> Result<Vec<RefreshCase>> {
    Ok(read::<Refresh>(pair, "refresh.json")?.cases)
}

/// Checks that an answer in mode refresh matches the reference within [`EXACT`].
pub fn check_refresh(expected: &[(u32, f32, f32)], actual: &Completion) -> Result<()> {
    let got = (actual.tokens.len(), actual.logprobs.len());
    ensure!(got == (expected.len(), expected.len()), "{got:?} tokens and log-probabilities, not {}", expected.len());
    for (i, &(token, logprob, distance)) in expected.iter().enumerate() {
        if actual.tokens[i] != token {
            ensure!(distance < EXACT.close_call, "step {i}: token {} instead of {token}", actual.tokens[i]);
            return Ok(());
        }
        let own = actual.logprobs[i];
        ensure!((own - logprob).abs() <= EXACT.logprob, "step {i}: reported {own}, reference {logprob}");
    }
    Ok(())
}

/// Returns a model folder of a pair. `OVERFILL_GOLDEN` names the folder of all pairs where the repository is not.
pub fn folder(pair: &str, which: &str) -> String {
    let pairs = std::env::var_os("OVERFILL_GOLDEN");
    let mut path = pairs.map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden"), PathBuf::from);
    path.extend([pair, which]);
    path.to_string_lossy().into_owned()
}

impl Golden {
    /// Reads the expected outputs of a pair.
    pub fn load(pair: &str) -> Result<Self> {
        let mut golden: Self = read(pair, "expected.json")?;
        golden.cases.extend(read::<LongPrompts>(pair, "long.json")?.cases);
        Ok(golden)
    }

    /// Arguments of `overfill up` that serve the pair as `small`, and its full model alone as `big`.
    pub fn up_args(pair: &str) -> Vec<String> {
        Self::up_args_in(pair, "f32")
    }

    /// As [`Self::up_args`], with weights and KV of one type.
    pub fn up_args_in(pair: &str, dtype: &str) -> Vec<String> {
        let (full, decode) = (folder(pair, "full"), folder(pair, "decode"));
        let args = ["--full", &full, "--decode", &format!("small={decode}"), "--decode", &format!("big={full}")];
        // The references are computed in f32. Small pools let many clusters fit in the memory of a small machine.
        let settings = ["--weights", dtype, "--kv-dtype", dtype, "--kv-pool-tokens", "16384"];
        args.into_iter().chain(settings).map(str::to_owned).collect()
    }
}

/// Checks that an answer matches the reference within [`EXACT`].
pub fn check(expected: &[Step], actual: &Completion) -> Result<()> {
    check_within(EXACT, expected, actual)
}

/// Checks that an answer matches the reference within `tolerance`.
pub fn check_within(tolerance: Tolerance, expected: &[Step], actual: &Completion) -> Result<()> {
    ensure!(actual.tokens.len() == expected.len(), "{} tokens, not {}", actual.tokens.len(), expected.len());
    ensure!(actual.top.len() == expected.len(), "{} log-probabilities, not {}", actual.top.len(), expected.len());
    for (i, step) in expected.iter().enumerate() {
        let reported: HashMap<u32, f32> = actual.top[i].iter().copied().collect();
        let worst_reported = actual.top[i].last().map_or(f32::NEG_INFINITY, |&(_, logprob)| logprob);
        for &(token, logprob) in &step.top {
            // Tokens of nearly equal probability may swap at the end of the list.
            let distance = match reported.get(&token) {
                Some(reported) => (reported - logprob).abs(),
                None => (worst_reported - logprob).abs(),
            };
            ensure!(
                distance <= tolerance.logprob,
                "step {i}: token {token} is {distance} from the reference {logprob}"
            );
        }
        if actual.tokens[i] != step.token {
            let close = step.top.len() > 1 && step.top[0].1 - step.top[1].1 < tolerance.close_call;
            ensure!(close, "step {i}: token {} instead of {}", actual.tokens[i], step.token);
            return Ok(());
        }
        let own = actual.logprobs.get(i).copied().unwrap_or(f32::NAN);
        ensure!(
            (own - step.top[0].1).abs() <= tolerance.logprob,
            "step {i}: reported {own}, reference {}",
            step.top[0].1
        );
    }
    Ok(())
}

/// Sliding window of a pair's decode model in tokens.
pub fn window(pair: &str) -> Result<usize> {
    let config: serde_json::Value = read(pair, "decode/config.json")?;
    config["sliding_window"].as_u64().map(|window| window as usize).with_context(|| format!("{pair} has no window"))
}

/// Bytes of KV in f32 that the handoff of a prompt takes, if the decode node holds `held_blocks` blocks: in each layer, those
/// of the other blocks that have a token which the first decode step attends to, and the last block.
pub fn handoff_bytes(pair: &str, prompt_tokens: usize, held_blocks: usize) -> Result<u64> {
    let config: serde_json::Value = read(pair, "decode/config.json")?;
    let size = |field: &str| config[field].as_u64().with_context(|| format!("{pair}: {field}"));
    let (layers, window) = (size("num_hidden_layers")? as usize, window(pair)?);
    let blocks = prompt_tokens.div_ceil(BLOCK_TOKENS);
    let due = |layer: usize, block: usize| {
        let is_full = config["layer_types"][layer] == "full_attention";
        let end = prompt_tokens.min((block + 1) * BLOCK_TOKENS);
        // The step at position `prompt_tokens` attends to that position and `window - 1` before it.
        is_full || block + 1 == blocks || end - 1 + window > prompt_tokens
    };
    let due = (0..layers).flat_map(|layer| (held_blocks..blocks).filter(move |block| due(layer, *block))).count();
    Ok(due as u64 * 2 * size("num_key_value_heads")? * size("head_dim")? * BLOCK_TOKENS as u64 * 4)
}
