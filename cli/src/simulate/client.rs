//! Clients of the simulated cluster.

use std::{pin::pin, sync::Arc};

use futures::StreamExt as _;
use overfill_kv::SamplingParams;
use overfill_router::{
    GenerateError,
    parts::{Core, Generation, Output, new_request_id},
};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use tokio::time::{Instant, sleep};

use super::{
    clock::Clock,
    node::MODEL,
    record::{End, Record, Request},
};
use crate::plan::cluster::{NodeModel, draw};
use crate::plan::mix::Ask;

/// Ids of the tokens of prompts: those of bytes.
const TOKENS: std::ops::Range<u32> = 3..259;

/// What all clients share.
#[derive(Clone)]
pub struct Client {
    /// The router.
    pub core: Core,
    /// Simulated time.
    pub clock: Clock,
    /// What serving adds.
    pub overheads: Arc<NodeModel>,
    /// Random numbers of the overheads.
    pub rng: Arc<Mutex<StdRng>>,
    /// Gets all requests.
    pub record: Arc<Mutex<Record>>,
    /// Time limit of a request.
    pub deadline_seconds: f64,
}

impl Client {
    /// Sends the request `number` and waits for its end.
    pub async fn request(self, number: u64, ask: Ask) {
        let sent = self.clock.now();
        let mut request = Request {
            sent_seconds: sent,
            prompt_tokens: ask.prompt_tokens,
            output_tokens: ask.output_tokens,
            end: End::Complete,
            error: None,
            ttft_seconds: None,
            mean_itl_seconds: None,
            migrations: 0,
        };
        if let Err(error) = self.send(number, ask, &mut request).await {
            request.end = match request.ttft_seconds {
                None => End::Refused,
                Some(_) => End::Failed,
            };
            request.error = Some(error.to_string());
        }
        self.record.lock().requests.push(request);
    }

    async fn send(&self, number: u64, ask: Ask, request: &mut Request) -> Result<(), GenerateError> {
        let overhead = draw(&self.overheads.request_seconds, 0.0, &mut self.rng.lock());
        let handoff = draw(&self.overheads.handoff_seconds, 0.0, &mut self.rng.lock());
        sleep(self.clock.real(overhead)).await;
        let arrived = Instant::now();
        let time = self.clock.limit(self.deadline_seconds);
        let generation = Generation {
            request_id: new_request_id(),
            model: self.core.model(MODEL, arrived, Some(time)).await?,
            prompt: prompt(number, ask),
            sampling: SamplingParams::greedy(),
            max_tokens: ask.output_tokens as u32,
            stop_token_ids: [].into(),
            stop: Vec::new(),
            include_stop: false,
            skip_special: true,
            shown_special: [].into(),
            prompt_logprobs: false,
            mode: None,
            priority: 0,
            arrived,
            time,
        };
        overfill_router::parts::check_length(&generation.model, generation.prompt.len(), Some(generation.max_tokens))?;
        let tenant = self.core.identify(None, None)?;
        let Some(place) = self.core.enter(&tenant, std::slice::from_ref(&generation))?.pop() else { return Ok(()) };
        let mut outputs = pin!(self.core.generate(place, generation));
        let (mut last, mut count) = (request.sent_seconds, 0_u32);
        while let Some(output) = outputs.next().await {
            match output? {
                Output::Token { .. } => {
                    // From the second token on, all are late by what the handoff adds.
                    let now = self.clock.now() + if count > 0 { handoff } else { 0.0 };
                    let mut record = self.record.lock();
                    match count {
                        0 => {
                            request.ttft_seconds = Some(now - last);
                            record.first_token(now, now - last);
                        }
                        _ => record.token(now, now - last),
                    }
                    (last, count) = (now, count + 1);
                }
                Output::Finished(finished) => request.migrations = finished.timings.migrations,
                Output::PromptLogprobs(_) => {}
            }
        }
        if let Some(first) = request.ttft_seconds.filter(|_| count > 1) {
            request.mean_itl_seconds = Some((last - request.sent_seconds - first) / f64::from(count - 1));
        }
        Ok(())
    }
}

/// A prompt whose first tokens are those of all prompts, as many as the prefix cache should have.
fn prompt(number: u64, ask: Ask) -> Arc<[u32]> {
    let mut state = number;
    let own = std::iter::repeat_with(move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    });
    let shared = (0..ask.cached_tokens as u32).map(|i| i.wrapping_mul(2_654_435_761) >> 16);
    let tokens = shared.chain(own).take(ask.prompt_tokens);
    tokens.map(|n| TOKENS.start + n % (TOKENS.end - TOKENS.start)).collect()
}
