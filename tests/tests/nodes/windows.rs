//! Models whose layers have sliding windows: what is sent, kept, and found again.

use anyhow::{Result, ensure};
use futures::future::try_join_all;
use overfill_kv::BLOCK_TOKENS;
use overfill_tests::{
    Golden,
    golden::{handoff_bytes, window},
};

use crate::{
    mixed,
    pair::{Ask, Pair, Sizes},
    prompt,
};

/// One pair has a window in all layers, the others in some.
const PAIRS: [&str; 3] = ["mistral", "gemma2", "gemma3"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_what_windows_show_is_sent() -> Result<()> {
    for name in PAIRS {
        let (pair, fresh) = (Pair::start(name, Sizes::default()).await?, Pair::start(name, Sizes::default()).await?);
        let Some(case) = Golden::load(name)?.cases.into_iter().find(|case| case.prompt.len() == 900) else {
            anyhow::bail!("{name} has no prompt of 900 tokens");
        };
        let before = |tokens: usize| (tokens + 1 - window(name).unwrap_or(0)) / BLOCK_TOKENS;
        let unneeded = if name == "mistral" { before(900) } else { 0 };
        let first = pair.run(&Ask::greedy(&case.prompt, 24)).await?;
        ensure!(first.transferred_bytes == handoff_bytes(name, 900, 0)?, "{name}: {first:?}");
        ensure!(first.held_tokens as usize == unneeded * BLOCK_TOKENS, "{name}: {first:?}");

        // All blocks of the conversation so far are there, as far as a longer one needs them.
        let longer = [&case.prompt[..], &first.tokens, &prompt(3, 20)].concat();
        // Of a shorter one, layers with windows need what was not sent.
        let shorter = case.prompt[..500].to_vec();
        for (prompt, held) in [(longer, 900 / BLOCK_TOKENS), (shorter, before(500))] {
            let ask = Ask::greedy(&prompt, 24);
            let (answer, alone) = (pair.run(&ask).await?, fresh.run(&ask).await?);
            let tokens = prompt.len();
            ensure!(answer.tokens == alone.tokens, "{name}, {tokens}: {answer:?}, not {alone:?}");
            ensure!(answer.held_tokens as usize == held * BLOCK_TOKENS, "{name}, {tokens}: {answer:?}");
            ensure!(answer.transferred_bytes == handoff_bytes(name, tokens, held)?, "{name}, {tokens}: {answer:?}");
        }
        for pair in [pair, fresh] {
            pair.wait_idle().await?;
            pair.end().await?;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn taken_out_of_the_batch_windows_show_the_same() -> Result<()> {
    // Each request needs four blocks, or up to ten.
    for (name, decode_blocks) in [("mistral", 7), ("gemma2", 14)] {
        let asks: Vec<Ask> =
            (0..6).map(|i| Ask { prompt: prompt(i, 60 + i), ..mixed(6, 90)[i as usize].clone() }).collect();
        let roomy = Pair::start(name, Sizes::default()).await?;
        let expected = try_join_all(asks.iter().map(|ask| roomy.run(ask))).await?;
        roomy.end().await?;
        let tight = Pair::start(name, Sizes { decode_blocks, ..Sizes::default() }).await?;
        let actual = try_join_all(asks.iter().map(|ask| tight.run(ask))).await?;
        for (i, (expected, actual)) in expected.iter().zip(&actual).enumerate() {
            ensure!(expected.tokens == actual.tokens, "{name}, {i}: {expected:?} with room, {actual:?} without");
        }
        ensure!(tight.decode_load.metrics().preemptions.get() > 0, "{name}: no request was preempted");
        tight.wait_idle().await?;
        tight.end().await?;
    }
    Ok(())
}

/// A window of 40 tokens lies in at most four blocks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_window_is_all_that_is_kept() -> Result<()> {
    let ask = Ask::greedy(&prompt(1, 300), 500);
    let roomy = Pair::start("mistral", Sizes::default()).await?;
    let expected = roomy.run(&ask).await?;
    roomy.end().await?;
    let tight = Pair::start("mistral", Sizes { decode_blocks: 4, ..Sizes::default() }).await?;
    let actual = tight.run(&ask).await?;
    ensure!(actual.tokens == expected.tokens, "{expected:?} with room, {actual:?} without");
    ensure!(tight.decode_load.metrics().preemptions.get() == 0, "a request that fits was preempted");
    tight.wait_idle().await?;
    tight.end().await
}
