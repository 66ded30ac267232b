//! Both nodes in one process, without a router: batching, handoff, cancellation, preemption, shutdown.

mod pair;
mod windows;

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use futures::future::try_join_all;
use overfill_kv::SamplingParams;
use overfill_proto::v1::{self, FinishReason, decode_event::Event as Decoded, prefill_event::Event as Prefilled};
use overfill_tests::{
    Golden,
    golden::{EXACT, PAIRS},
    wait::PATIENCE,
};
use pair::{Ask, Pair, Sizes, next_decoded, next_prefilled};
use tokio::time::Instant;
use tonic::Code;

/// Returns a prompt of `length` tokens. Prompts with different `salt` differ from the first token on.
fn prompt(salt: u32, length: u32) -> Vec<u32> {
    (0..length).map(|i| 2 + (salt * 37 + i * 11 + i * i * salt) % 300).collect()
}

/// Returns requests of many lengths. Half of them are sampled.
fn mixed(count: u32, max_tokens: u32) -> Vec<Ask> {
    let ask = |i: u32| {
        let mut ask = Ask::greedy(&prompt(i, 1 + i * 9), max_tokens);
        if i % 2 == 1 {
            ask.sampling = SamplingParams { seed: u64::from(i), presence_penalty: 0.5, ..SamplingParams::default() };
        }
        ask
    };
    (0..count).map(ask).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn golden_pairs_give_the_references_tokens() -> Result<()> {
    for name in PAIRS {
        let pair = Pair::start(name, Sizes::default()).await?;
        for (i, case) in Golden::load(name)?.cases.iter().enumerate() {
            let mut ask = Ask::greedy(&case.prompt, case.two_stage.len() as u32);
            ask.sampling.logprobs = Some(0);
            let answer = pair.run(&ask).await?;
            let actual = answer.tokens.iter().zip(&answer.logprobs);
            for (step, (expected, (token, logprob))) in case.two_stage.iter().zip(actual).enumerate() {
                if expected.token != *token {
                    let margin = expected.top[0].1 - expected.top[1].1;
                    ensure!(margin < 0.02, "{name}, case {i}, step {step}: {token}, not {}", expected.token);
                    break;
                }
                let distance = (expected.top[0].1 - logprob).abs();
                ensure!(distance < EXACT.logprob, "{name}, case {i}, step {step}: log-probability off by {distance}");
            }
            ensure!(answer.tokens.len() == case.two_stage.len() && answer.finish == FinishReason::Length);
        }
        pair.wait_idle().await?;
        pair.end().await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn among_sixteen_others_a_request_gives_the_same_tokens() -> Result<()> {
    let pair = Pair::start("llama-tied", Sizes::default()).await?;
    let asks = mixed(17, 40);
    let mut alone = Vec::new();
    for ask in &asks {
        alone.push(pair.run(ask).await?.tokens);
    }
    let together = try_join_all(asks.iter().map(|ask| pair.run(ask))).await?;
    for (i, (alone, together)) in alone.iter().zip(&together).enumerate() {
        ensure!(*alone == together.tokens, "request {i}: {alone:?} alone, {:?} among others", together.tokens);
    }
    pair.wait_idle().await?;
    pair.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_token_is_the_last_one() -> Result<()> {
    let pair = Pair::start("llama-tied", Sizes::default()).await?;
    let mut ask = Ask::greedy(&prompt(3, 21), 12);
    let whole = pair.run(&ask).await?.tokens;
    let Some(at) = (2..whole.len()).find(|i| !whole[..*i].contains(&whole[*i])) else {
        bail!("no new token: {whole:?}")
    };
    ask.stop = vec![whole[at]];
    let answer = pair.run(&ask).await?;
    ensure!(answer.tokens == whole[..=at] && answer.finish == FinishReason::Stop, "{answer:?}");
    pair.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migrated_request_goes_on_as_if_nothing_had_happened() -> Result<()> {
    // Both nodes use one model. With a pruned decoder, the migrated output's KV would come from the full model instead.
    let pair = Pair::start("llama-tied", Sizes { decoder: "full", ..Sizes::default() }).await?;
    for sampling in [
        SamplingParams { seed: 7, frequency_penalty: 0.9, repetition_penalty: 1.3, ..SamplingParams::default() },
        SamplingParams { presence_penalty: 1.5, ..SamplingParams::greedy() },
    ] {
        let whole = Ask { sampling, ..Ask::greedy(&prompt(4, 37), 40) };
        let expected = pair.run(&whole).await?.tokens;
        for at in [1, 13, 30] {
            let mut rest = whole.clone();
            rest.prompt.extend(&expected[..at]);
            rest.generated = at as u32;
            rest.max_tokens -= at as u32;
            let actual = pair.run(&rest).await?.tokens;
            ensure!(actual == expected[at..], "after {at}: {actual:?}, not {:?}", &expected[at..]);
        }
    }
    pair.wait_idle().await?;
    pair.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_sides_reuse_a_prefix() -> Result<()> {
    let pair = Pair::start("llama-tied", Sizes::default()).await?;
    let ask = Ask::greedy(&prompt(5, 100), 8);
    let first = pair.run(&ask).await?;
    ensure!((first.cached_tokens, first.held_tokens) == (0, 0), "{first:?}");
    let again = pair.run(&ask).await?;
    // 100 tokens are six full blocks and a partial one.
    ensure!((again.cached_tokens, again.held_tokens) == (96, 96), "{again:?}");
    ensure!(again.tokens == first.tokens, "{first:?}, then {again:?}");
    ensure!(again.transferred_bytes * 7 == first.transferred_bytes, "{first:?}, then {again:?}");
    // A prompt with the same beginning and another end gives the same answer as without a cache.
    let mut longer = ask.clone();
    longer.prompt.truncate(50);
    longer.prompt.extend(prompt(6, 70));
    let shared = pair.run(&longer).await?;
    ensure!((shared.cached_tokens, shared.held_tokens) == (48, 48), "{shared:?}");
    let fresh = Pair::start("llama-tied", Sizes::default()).await?;
    ensure!(fresh.run(&longer).await?.tokens == shared.tokens);
    pair.wait_idle().await?;
    fresh.end().await?;
    pair.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelled_at_any_phase_everything_is_free() -> Result<()> {
    let sizes = Sizes { decode_blocks: 40, prefill_blocks: 40, max_batch_tokens: 16, ..Sizes::default() };
    let pair = Pair::start("llama-tied", sizes).await?;
    let ask = Ask::greedy(&prompt(1, 300), 300);

    // Cancel a reservation before the handoff.
    let reserved = pair.reserve(&ask).await?;
    ensure!(pair.decode_pool.in_use() == 19);
    drop(reserved);
    pair.wait_idle().await?;

    // Cancel a waiting request and the requests it waits for.
    let (holds, _) = pair.reserve(&ask).await?;
    let (holds_too, _) = pair.reserve(&ask).await?;
    let waits = pair.decode.clone().decode(pair.decode_request(&ask)).await?;
    ensure!(pair.decode_load.load().waiting == 1, "{:?}", pair.decode_load.load());
    drop(waits);
    drop((holds, holds_too));
    pair.wait_idle().await?;

    // Cancel during prefill and handoff, once on each side first. (A prefill cancelled before it connects does not end
    // the reservation; the decode stream does.)
    for decode_goes_first in [true, false] {
        let (decoding, reserved) = pair.reserve(&ask).await?;
        let request = pair.prefill_request(&ask, Some(reserved));
        let mut prefilling = pair.prefill.clone().prefill(request).await?.into_inner();
        let Prefilled::Started(_) = next_prefilled(&mut prefilling).await? else { bail!("not started") };
        match decode_goes_first {
            true => drop(decoding),
            false => drop((prefilling, decoding)),
        }
        pair.wait_idle().await?;
    }

    // Cancel during decoding.
    let (mut decoding, reserved) = pair.reserve(&ask).await?;
    let request = pair.prefill_request(&ask, Some(reserved));
    let mut prefilling = pair.prefill.clone().prefill(request).await?.into_inner();
    while !matches!(next_prefilled(&mut prefilling).await?, Prefilled::Transferred(_)) {}
    while !matches!(next_decoded(&mut decoding).await?, Decoded::Token(_)) {}
    drop(decoding);
    pair.wait_idle().await?;
    pair.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn among_cancellations_the_others_get_their_tokens() -> Result<()> {
    let roomy = Pair::start("llama-tied", Sizes::default()).await?;
    let asks: Vec<Ask> = mixed(12, 50).into_iter().cycle().take(36).collect();
    let mut expected = Vec::new();
    for ask in &asks[..12] {
        expected.push(roomy.run(ask).await?.tokens);
    }
    roomy.end().await?;
    let sizes =
        Sizes { decode_blocks: 24, prefill_blocks: 16, max_batch_tokens: 32, max_running: 6, ..Sizes::default() };
    let tight = Pair::start("llama-tied", sizes).await?;
    let run = |i: usize| {
        let (tight, ask, expected) = (&tight, &asks[i], &expected[i % 12]);
        async move {
            if i.is_multiple_of(3) {
                // Cancels after a number of events of the decode node: the reservation, the handoff, tokens.
                let (mut decoding, reserved) = tight.reserve(ask).await?;
                let request = tight.prefill_request(ask, Some(reserved));
                let _prefilling = tight.prefill.clone().prefill(request).await?;
                for _ in 0..i % 7 {
                    next_decoded(&mut decoding).await?;
                }
                return Ok(());
            }
            let actual = tight.run(ask).await?.tokens;
            ensure!(actual == *expected, "request {i}: {actual:?}, not {expected:?}");
            Ok(())
        }
    };
    try_join_all((0..asks.len()).map(run)).await?;
    tight.wait_idle().await?;
    tight.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn taken_out_of_the_batch_a_request_gives_the_same_tokens() -> Result<()> {
    let roomy = Pair::start("llama-tied", Sizes::default()).await?;
    let asks: Vec<Ask> =
        (0..6).map(|i| Ask { prompt: prompt(i, 20 + i), ..mixed(6, 90)[i as usize].clone() }).collect();
    let expected = try_join_all(asks.iter().map(|ask| roomy.run(ask))).await?;
    roomy.end().await?;
    // Each request needs seven or eight blocks at its end.
    let tight = Pair::start("llama-tied", Sizes { decode_blocks: 12, ..Sizes::default() }).await?;
    let actual = try_join_all(asks.iter().map(|ask| tight.run(ask))).await?;
    for (i, (expected, actual)) in expected.iter().zip(&actual).enumerate() {
        ensure!(expected.tokens == actual.tokens, "request {i}: {expected:?} with room, {actual:?} without");
    }
    ensure!(tight.decode_load.metrics().preemptions.get() > 0, "no request was preempted");
    tight.wait_idle().await?;
    tight.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prompts_without_room_wait_their_turn() -> Result<()> {
    let pair = Pair::start("llama-tied", Sizes { prefill_blocks: 5, max_batch_tokens: 32, ..Sizes::default() }).await?;
    let asks: Vec<Ask> = (0..8).map(|i| Ask::greedy(&prompt(i, 60 + i), 6)).collect();
    let answers = try_join_all(asks.iter().map(|ask| pair.run(ask))).await?;
    let roomy = Pair::start("llama-tied", Sizes::default()).await?;
    for (ask, answer) in asks.iter().zip(&answers) {
        ensure!(roomy.run(ask).await?.tokens == answer.tokens);
    }
    pair.wait_idle().await?;
    roomy.end().await?;
    pair.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prompt_logprobs_do_not_depend_on_chunks_or_cache() -> Result<()> {
    let mut seen = Vec::new();
    for max_batch_tokens in [16, 512] {
        let pair = Pair::start("qwen2", Sizes { max_batch_tokens, ..Sizes::default() }).await?;
        let mut request = pair.prefill_request(&Ask::greedy(&prompt(2, 75), 2), None);
        request.prompt_logprobs = true;
        if let Some(sampling) = &mut request.sampling {
            sampling.logprobs = Some(2);
        }
        for _ in 0..2 {
            let mut stream = pair.prefill.clone().prefill(request.clone()).await?.into_inner();
            let Prefilled::Started(started) = next_prefilled(&mut stream).await? else { bail!("not started") };
            ensure!(started.cached_tokens == 0);
            let Prefilled::PromptLogprobs(prompt) = next_prefilled(&mut stream).await? else { bail!("no logprobs") };
            let Prefilled::FirstToken(first) = next_prefilled(&mut stream).await? else { bail!("no first token") };
            let ids: Vec<u32> = prompt.tokens.iter().map(|t| t.token).collect();
            ensure!(ids == request.prompt_tokens[1..], "{ids:?}");
            ensure!(prompt.tokens.iter().all(|t| t.top.len() == 2 && t.logprob < 0.0));
            let logprobs: Vec<f32> = prompt.tokens.iter().chain(&first.token).map(|t| t.logprob).collect();
            seen.push(logprobs);
        }
        pair.wait_idle().await?;
        pair.end().await?;
    }
    for other in &seen[1..] {
        ensure!(seen[0].iter().zip(other).all(|(a, b)| (a - b).abs() < 1e-4), "{seen:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_served_is_refused_by_name() -> Result<()> {
    let pair = Pair::start("llama-tied", Sizes { decode_blocks: 8, max_waiting: 1, ..Sizes::default() }).await?;
    let ask = Ask::greedy(&prompt(1, 100), 20);
    let refused = |status: Option<tonic::Status>, code, part: &str| -> Result<()> {
        let Some(status) = status else { bail!("not refused: {part}") };
        ensure!(status.code() == code && status.message().contains(part), "{status:?}");
        Ok(())
    };
    let mut request = pair.decode_request(&ask);
    request.max_tokens = 29;
    let status = pair.decode.clone().decode(request).await.err();
    refused(status, Code::InvalidArgument, "max_tokens must be in [2, 28]")?;

    let (decoding, mut reserved) = pair.reserve(&ask).await?;
    if let Some(schema) = &mut reserved.kv_schema {
        schema.full_model = "another".into();
    }
    let request = pair.prefill_request(&ask, Some(reserved));
    let status = pair.prefill.clone().prefill(request).await.err();
    refused(status, Code::FailedPrecondition, "kv schema mismatch: full_model")?;

    // One request holds the blocks, one waits, and the third exceeds the queue limit.
    let waits = pair.decode.clone().decode(pair.decode_request(&ask)).await?;
    let status = pair.decode.clone().decode(pair.decode_request(&ask)).await.err();
    refused(status, Code::ResourceExhausted, "1 requests are waiting")?;
    drop((decoding, waits));
    pair.wait_idle().await?;
    pair.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_its_deadline_a_request_is_ended_everywhere() -> Result<()> {
    let pair = Pair::start("llama-tied", Sizes::default()).await?;
    let mut request = pair.decode_request(&Ask::greedy(&prompt(1, 40), 20));
    request.deadline_seconds = 0.2;
    let mut stream = pair.decode.clone().decode(request).await?.into_inner();
    let Decoded::Reserved(reserved) = next_decoded(&mut stream).await? else { bail!("not reserved") };
    // No sender connects before the deadline.
    let Err(e) = next_decoded(&mut stream).await else { bail!("an event without KV") };
    let code = e.downcast_ref::<tonic::Status>().map(tonic::Status::code);
    ensure!(code == Some(Code::DeadlineExceeded), "{e:?}");
    pair.wait_idle().await?;
    // The ticket is no longer valid.
    let late = pair.prefill_request(&Ask::greedy(&prompt(1, 40), 20), Some(reserved));
    let mut prefilling = pair.prefill.clone().prefill(late).await?.into_inner();
    let ended = loop {
        match next_prefilled(&mut prefilling).await {
            Ok(Prefilled::Transferred(stats)) => bail!("{stats:?} over a void ticket"),
            Ok(_) => {}
            Err(e) => break e,
        }
    };
    let code = ended.downcast_ref::<tonic::Status>().map(tonic::Status::code);
    ensure!(code == Some(Code::Unavailable), "{ended:?}");
    pair.wait_idle().await?;
    pair.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_runs_at_shutdown_is_finished() -> Result<()> {
    let pair = Pair::start("llama-tied", Sizes::default()).await?;
    let ask = Ask::greedy(&prompt(1, 40), 400);
    let (mut decoding, reserved) = pair.reserve(&ask).await?;
    let request = pair.prefill_request(&ask, Some(reserved));
    let mut prefilling = pair.prefill.clone().prefill(request).await?.into_inner();
    while !matches!(next_prefilled(&mut prefilling).await?, Prefilled::Transferred(_)) {}
    pair.begin_shutdown();
    let mut tokens = 1;
    loop {
        match next_decoded(&mut decoding).await? {
            Decoded::Token(_) => tokens += 1,
            Decoded::Finished(_) => break,
            _ => {}
        }
    }
    ensure!(tokens == 400, "{tokens} tokens");
    drop((decoding, prefilling));
    pair.end().await
}

/// Steps take longer than the node's step timeout here, which looks like an engine that hangs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_does_not_get_on_is_not_ready() -> Result<()> {
    let pair = Pair::start("llama-tied", Sizes { step_timeout: Duration::from_micros(1), ..Sizes::default() }).await?;
    let admin = &pair.decode_admin;
    ensure!(ready(admin).await? == 503, "a node that no router has joined is ready");
    // A router joins, and says that it has a prefill node for this node only after the node has reported its load.
    let (say, said) = tokio::sync::mpsc::channel(1);
    let said = tokio_stream::wrappers::ReceiverStream::new(said);
    let mut joined = pair.decode_node.clone().watch_load(said).await?.into_inner();
    say.send(v1::WatchLoadRequest { paired: false }).await?;
    ensure!(joined.message().await?.is_some(), "no load report");
    ensure!(ready(admin).await? == 503, "a node that no router would send requests is ready");
    say.send(v1::WatchLoadRequest { paired: true }).await?;
    let deadline = Instant::now() + PATIENCE;
    while ready(admin).await? != 200 {
        ensure!(Instant::now() < deadline, "an idle node is not ready");
    }
    drop((joined, say));
    let ask = Ask::greedy(&prompt(1, 40), 900);
    let deadline = Instant::now() + PATIENCE;
    let work = async {
        loop {
            if let Err(error) = pair.run(&ask).await {
                return error;
            }
        }
    };
    let watch = async {
        while ready(admin).await? != 503 {
            ensure!(Instant::now() < deadline, "a node that hangs is ready");
        }
        Ok(())
    };
    tokio::select! {
        error = work => return Err(error),
        seen = watch => seen?,
    }
    pair.wait_idle().await?;
    ensure!(ready(admin).await? == 200, "a node that works again is not ready");
    pair.end().await
}

/// Returns the status code of `/ready`.
async fn ready(admin: &str) -> Result<u16> {
    let url = format!("http://{admin}/ready");
    let status = move || match ureq::get(&url).timeout(PATIENCE).call() {
        Ok(response) | Err(ureq::Error::Status(_, response)) => Ok(response.status()),
        Err(error) => Err(error.into()),
    };
    tokio::task::spawn_blocking(status).await?
}
