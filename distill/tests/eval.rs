//! Evaluation over the golden pairs of all families: each mode against PyTorch and transformers, and against itself.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use std::path::{Path, PathBuf};

use overfill_distill::eval::{Stages, Way};
use overfill_kv::blocks_for;
use overfill_model::LoadOptions;
use serde::{Deserialize, de::DeserializeOwned};

const PAIRS: [&str; 12] = [
    "llama-tied",
    "llama-untied",
    "llama-depth",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "phi3",
    "smollm3",
    "olmo2",
    "granite",
];

/// Greatest difference of a log-probability, and the distance of the two best tokens below which either may be chosen.
const LOGPROB: f32 = 1e-3;
const CLOSE_CALL: f32 = 0.02;

#[derive(Deserialize)]
struct Cases<C> {
    cases: Vec<C>,
}

#[derive(Deserialize)]
struct Case {
    prompt: Vec<u32>,
    two_stage: Vec<Step>,
    full_only: Vec<Step>,
}

#[derive(Deserialize)]
struct Step {
    token: u32,
    top: Vec<(u32, f32)>,
}

#[derive(Deserialize)]
struct RefreshCase {
    prompt: Vec<u32>,
    /// The token, its log-probability, and the difference from the log-probability of the second best token.
    refresh: Vec<(u32, f32, f32)>,
}

fn golden(pair: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(pair)
}

fn cases<C: DeserializeOwned>(pair: &str, file: &str) -> Vec<C> {
    let cases: Cases<C> = serde_json::from_slice(&std::fs::read(golden(pair).join(file)).unwrap()).unwrap();
    cases.cases
}

/// The pair, with the prompts in its KV, and room for `length` tokens behind each.
fn stages(pair: &str, prompts: &[&[u32]], length: usize) -> Stages {
    let blocks = prompts.iter().map(|prompt| blocks_for(prompt.len() + length)).sum();
    let (full, decode) = (golden(pair).join("full"), golden(pair).join("decode"));
    let mut stages = Stages::load(&full, Some(&decode), &LoadOptions::default(), blocks).unwrap();
    stages.prefill(prompts, &vec![length; prompts.len()]).unwrap();
    stages
}

/// The references are what the served mode is held to, too (`tests/tests/modes.rs`).
#[test]
fn mode_refresh_is_what_pytorch_computes() {
    for pair in &PAIRS[..5] {
        let cases: Vec<RefreshCase> = cases(pair, "refresh.json");
        let prompts: Vec<&[u32]> = cases.iter().map(|case| case.prompt.as_slice()).collect();
        let expected: Vec<Vec<u32>> =
            cases.iter().map(|case| case.refresh.iter().map(|step| step.0).collect()).collect();
        let texts: Vec<&[u32]> = expected.iter().map(Vec::as_slice).collect();
        let longest = expected.iter().map(Vec::len).max().unwrap();
        let mut stages = stages(pair, &prompts, longest);
        let read = stages.read(Way::Refresh, &prompts, &texts).unwrap();
        let most: Vec<usize> = expected.iter().map(Vec::len).collect();
        let (written, _) = stages.write(Way::Refresh, &prompts, &most, &[]).unwrap();
        let draft = stages.read(Way::Draft, &prompts, &texts).unwrap();
        let mut differs = false;
        for (i, case) in cases.iter().enumerate() {
            let mut is_same = true;
            for (at, &(token, logprob, distance)) in case.refresh.iter().enumerate() {
                let found = &read[i][at];
                assert!((found.logprob - logprob).abs() < LOGPROB, "{pair} {i} {at}: {} not {logprob}", found.logprob);
                assert!(found.top[0].0 == token || distance < CLOSE_CALL, "{pair} {i} {at}");
                is_same &= written[i][at] == token || distance >= CLOSE_CALL;
                assert!(!is_same || written[i][at] == token, "{pair} {i} {at}: wrote {}", written[i][at]);
                differs |= (draft[i][at].logprob - logprob).abs() > 10.0 * LOGPROB;
            }
        }
        assert!(differs, "{pair}: mode draft gives the same");
    }
}

/// Prompts of different lengths, in one batch.
fn prompts(cases: &[Case]) -> Vec<&[u32]> {
    cases.iter().map(|case| case.prompt.as_slice()).filter(|prompt| prompt.len() <= 300).collect()
}

#[test]
fn two_stages_write_what_transformers_writes() {
    for pair in PAIRS {
        let cases: Vec<Case> =
            cases::<Case>(pair, "expected.json").into_iter().chain(cases(pair, "long.json")).collect();
        let prompts = prompts(&cases);
        let mut stages = stages(pair, &prompts, 24);
        for way in [Way::Alone, Way::Draft] {
            let (written, _) = stages.write(way, &prompts, &vec![24; prompts.len()], &[]).unwrap();
            let mut same = 0;
            for (case, written) in cases.iter().filter(|case| case.prompt.len() <= 300).zip(&written) {
                let steps = if way == Way::Alone { &case.full_only } else { &case.two_stage };
                for (step, token) in steps.iter().zip(written) {
                    if step.top[0].1 - step.top[1].1 < CLOSE_CALL && *token != step.token {
                        break;
                    }
                    assert_eq!(*token, step.token, "{pair}, {way:?}, a prompt of {} tokens", case.prompt.len());
                    same += 1;
                }
            }
            assert!(same > 24 * prompts.len() / 2, "{pair}: {same} tokens");
        }
    }
}

/// A text that a mode writes is what it finds most likely when it reads the text. Mode exact writes what the full model writes.
#[test]
fn reading_tells_what_is_written() {
    for pair in PAIRS {
        let cases: Vec<Case> =
            cases::<Case>(pair, "expected.json").into_iter().chain(cases(pair, "long.json")).collect();
        let prompts = prompts(&cases);
        let most: Vec<usize> = (0..prompts.len()).map(|i| 60 + 7 * i).collect();
        let mut stages = stages(pair, &prompts, 60 + 7 * prompts.len());
        let mut all = Vec::new();
        for way in [Way::Alone, Way::Draft, Way::Refresh] {
            let (written, _) = stages.write(way, &prompts, &most, &[]).unwrap();
            let texts: Vec<&[u32]> = written.iter().map(Vec::as_slice).collect();
            let read = stages.read(way, &prompts, &texts).unwrap();
            for (i, text) in texts.iter().enumerate() {
                let likeliest: Vec<u32> = read[i].iter().map(|scored| scored.top[0].0).collect();
                assert_eq!(likeliest, *text, "{pair}, {way:?}, prompt {i}");
                assert_eq!(text.len(), most[i]);
            }
            all.push(written);
        }
        assert!(all[0] != all[1] && all[1] != all[2], "{pair}: modes can't be told apart");
        // A token that does occur ends an answer where it occurs first.
        let stop = [all[0][0][40]];
        let whole: Vec<Vec<u32>> = all.swap_remove(0);
        let cut: Vec<Vec<u32>> =
            whole.iter().map(|text| text.split_inclusive(|t| *t == stop[0]).next().unwrap().to_vec()).collect();
        for drafts in [0, 1, 5] {
            for (stop, expected) in [(&[][..], &whole), (&stop[..], &cut)] {
                let (written, drafting) = stages.write(Way::Exact { drafts }, &prompts, &most, stop).unwrap();
                assert_eq!(written, *expected, "{pair}, {drafts} drafts");
                let tokens: usize = written.iter().map(|text| text.len() - 1).sum();
                assert_eq!(drafting.verdict_tokens, tokens);
                assert!(drafting.drafted_tokens <= drafts * drafting.verdicts && drafting.accepted_tokens <= tokens);
                assert!((drafting.drafted_tokens > 0) == (drafts > 0));
            }
        }
        assert_eq!(stages.write(Way::Alone, &prompts, &most, &stop).unwrap().0, cut);
    }
}

#[test]
fn what_can_not_be_computed_is_refused() {
    let prompts = [&[1, 2, 3][..]];
    let refused = |result: anyhow::Result<()>| result.unwrap_err().to_string();
    let mut pair = stages("qwen3", &prompts, 9);
    assert!(refused(pair.prefill(&prompts, &[30])).contains("need 3 KV blocks, there are 1"));
    assert!(refused(pair.prefill(&prompts, &[1 << 20])).contains("the model's context has"));
    assert!(refused(pair.prefill(&[&[]], &[1])).contains("a prompt has no token"));
    let mut alone = Stages::load(&golden("qwen3").join("full"), None, &LoadOptions::default(), 1).unwrap();
    alone.prefill(&prompts, &[9]).unwrap();
    assert!(refused(alone.read(Way::Draft, &prompts, &[&[4, 5]]).map(drop)).contains("no decode model"));
    // Another family's decode model.
    let other = Stages::load(
        &golden("qwen3").join("full"),
        Some(&golden("mistral").join("decode")),
        &LoadOptions::default(),
        1,
    );
    assert!(other.is_err());
}
