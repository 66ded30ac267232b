//! The way of one request: from attempt to attempt, tokens to text, until its end.

use std::{pin::pin, sync::Arc, time::Duration};

use async_stream::try_stream;
use futures::{Stream, StreamExt as _};
use overfill_kv::{FinishReason, Role};
use overfill_text::{Detokenizer, StopMatcher, TextError};
use parking_lot::Mutex;
use tokio::time::{Instant, timeout_at};
use tower::retry::budget::{Budget as _, TpsBudget};
use tracing::{Instrument as _, debug, info_span, warn};

use crate::{
    GenerateError,
    admission::{Admission, Ask, Place},
    affinity::Affinity,
    attempt::{Attempt, AttemptError, AttemptEvent, Plan},
    catalog::Catalog,
    legs::{Leg, LegTimes, Legs},
    metrics::{Metrics, RequestMetrics},
    node::ServedModel,
    nodes::Nodes,
    prompt::TextPool,
    request::{Finished, Generation, Output, StopCause, Timings},
    tenants::{self, ApiKeys, Tenant},
};

/// Prompt blocks whose prefill node is remembered: 64 Ki blocks are a million tokens.
const AFFINITY_BLOCKS: usize = 1 << 16;
/// Wait at least this long before the same nodes are asked again.
const RETRY_PAUSE: Duration = Duration::from_millis(20);
/// And at most this long, even if nothing seems to have changed.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Over this time the budget of retries is reckoned.
const BUDGET_WINDOW: Duration = Duration::from_secs(10);
/// Retries that every new request adds to it.
const BUDGET_PER_REQUEST: f32 = 0.2;

/// What all requests share.
#[derive(Clone)]
pub struct Core {
    /// The nodes.
    pub nodes: Nodes,
    /// The models that clients may name.
    pub catalog: Catalog,
    /// Who may run.
    pub admission: Admission,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Time a request has, unless it says otherwise.
    pub default_time: Duration,
    /// Makes prompts of texts.
    pub text_pool: TextPool,
    keys: Option<ApiKeys>,
    affinity: Arc<Mutex<Affinity>>,
    max_queue: Duration,
    max_attempts: u32,
    progress_timeout: Duration,
    /// Keeps a cluster that fails from being kept failing by retries: beyond it they wait.
    budget: Arc<TpsBudget>,
}

impl Core {
    /// From the parts of a router.
    pub fn new(nodes: Nodes, metrics: Arc<Metrics>, config: &crate::Config) -> Self {
        Self {
            catalog: Catalog::new(nodes.clone(), &config.served_models, config.max_waiting),
            nodes,
            admission: Admission::new(config.max_running, config.max_waiting),
            metrics,
            default_time: config.default_deadline,
            text_pool: TextPool::default(),
            keys: config.api_keys.clone(),
            affinity: Arc::new(Mutex::new(Affinity::new(AFFINITY_BLOCKS))),
            max_queue: config.max_queue,
            max_attempts: config.max_attempts,
            progress_timeout: config.progress_timeout,
            budget: Arc::new(TpsBudget::new(BUDGET_WINDOW, config.min_retries_per_second, BUDGET_PER_REQUEST)),
        }
    }

    /// The model of this name; with an empty name, the only one. A request that has `time` waits for it, at most as long as
    /// for a node.
    pub async fn model(
        &self,
        name: &str,
        arrived: Instant,
        time: Option<Duration>,
    ) -> Result<Arc<ServedModel>, GenerateError> {
        let time = time.unwrap_or(self.default_time).min(self.max_queue);
        self.catalog.find(name, arrived + time).await
    }

    /// Who asks, by these headers.
    pub fn identify(&self, authorization: Option<&str>, tenant: Option<&str>) -> Result<Arc<Tenant>, GenerateError> {
        tenants::identify(self.keys.as_ref(), authorization, tenant)
    }

    /// A place in the queue for each of these, which are of one model, or for none.
    pub fn enter(&self, tenant: &Arc<Tenant>, generations: &[Generation]) -> Result<Vec<Place>, GenerateError> {
        let ask = |generation: &Generation| Ask {
            priority: generation.priority,
            prompt_tokens: generation.prompt.len(),
            max_tokens: generation.max_tokens,
            run_by: self.queue_end(generation),
            end_by: generation.deadline(),
        };
        let Some(first) = generations.first() else { return Ok(Vec::new()) };
        self.admission.enter(&first.model.name, tenant, &generations.iter().map(ask).collect::<Vec<_>>())
    }

    fn queue_end(&self, generation: &Generation) -> Instant {
        generation.deadline().min(generation.arrived + self.max_queue)
    }

    /// Generates. Everything lives in the stream: dropping it ends the request on every node.
    pub fn generate(
        &self,
        place: Place,
        generation: Generation,
    ) -> impl Stream<Item = Result<Output, GenerateError>> + Send + use<> {
        self.generate_after(LegTimes::default(), place, generation)
    }

    /// Generates, after the request has `spent` time in the first legs.
    pub fn generate_after(
        &self,
        spent: LegTimes,
        place: Place,
        generation: Generation,
    ) -> impl Stream<Item = Result<Output, GenerateError>> + Send + use<> {
        let core = self.clone();
        let mut metrics = core.metrics.request(&generation.model.name, generation.prompt.len());
        let arrived = generation.arrived;
        let span = info_span!("sequence", request = %generation.request_id);
        let mut legs = Legs::observed(span.clone(), spent, core.metrics.legs.clone(), &generation.model.name);
        legs.enter(Leg::Queue);
        try_stream! {
            let mut outputs = pin!(core.outputs(place, generation, legs));
            let mut last = arrived;
            let mut first = true;
            while let Some(output) = outputs.next().instrument(span.clone()).await {
                match &output {
                    Ok(Output::Token { .. }) => {
                        let now = Instant::now();
                        metrics.token(first, now - last);
                        (first, last) = (false, now);
                    }
                    Ok(Output::Finished(finished)) => {
                        count_end(&mut metrics, finished, arrived);
                    }
                    Ok(Output::PromptLogprobs(_)) => {}
                    Err(e) => {
                        span.in_scope(|| log(e));
                        metrics.finished("error", arrived.elapsed());
                    }
                }
                yield output?;
            }
        }
    }

    fn outputs(
        self,
        place: Place,
        generation: Generation,
        mut legs: Legs,
    ) -> impl Stream<Item = Result<Output, GenerateError>> + Send {
        let generation = Arc::new(generation);
        try_stream! {
            let g = &*generation;
            let deadline = g.deadline();
            let queue_end = self.queue_end(g);
            let mut running = place.run().await?;
            let mut progress = Progress::new(g)?;
            progress.timings.queue_seconds = g.arrived.elapsed().as_secs_f64();
            self.budget.deposit();
            let mut changes = self.nodes.changes();
            let mut avoid: Vec<u64> = Vec::new();
            let mut attempts = 0;
            let mut refusal = String::new();
            // Reset by every token: a long text may survive more failures than one prompt may cause.
            let mut wait_end = queue_end;
            loop {
                legs.enter(Leg::Reserve);
                changes.mark_unchanged();
                let plan = progress.plan(&generation, avoid.clone(), self.progress_timeout);
                let mut begun = false;
                let failure = match Attempt::new(&self.nodes.view(), &self.affinity, plan) {
                    Err(e) => e,
                    Ok(attempt) => {
                        let mut attempt = Box::new(attempt);
                        if !attempt.hands_over() {
                            legs.enter(Leg::PrefillQueue);
                        }
                        loop {
                            let event = match attempt.next().await {
                                Ok(event) => event,
                                Err(e) => break e,
                            };
                            let finished = match event {
                                AttemptEvent::Token(token, stage) => {
                                    if g.max_tokens == 0 {
                                        Some(progress.finish(FinishReason::Length, None)?)
                                    } else {
                                        let (text, end) = progress.token(token.token)?;
                                        match (stage, &end) {
                                            (_, Some(_)) => legs.leave(),
                                            (Role::Prefill, None) => legs.enter(Leg::Handoff),
                                            (Role::Decode, None) => legs.enter(Leg::Decode),
                                        }
                                        running.token();
                                        wait_end = deadline.min(Instant::now() + self.max_queue);
                                        yield Output::Token { token, text, stage };
                                        end.map(|(reason, stop)| progress.finish(reason, stop)).transpose()?
                                    }
                                }
                                AttemptEvent::Finished(reason) => Some(progress.finish(reason, None)?),
                                AttemptEvent::PromptLogprobs(logprobs) => {
                                    progress.prompt_logprobs = false;
                                    yield Output::PromptLogprobs(logprobs);
                                    None
                                }
                                AttemptEvent::Reserved { node, held_tokens } => {
                                    legs.enter(Leg::PrefillQueue);
                                    progress.timings.decode_node = node;
                                    progress.timings.decode_held_tokens = held_tokens;
                                    None
                                }
                                AttemptEvent::Started { node, cached_tokens } => {
                                    legs.enter(Leg::Prefill);
                                    begun = true;
                                    progress.timings.prefill_node = node;
                                    progress.timings.prefill_cached_tokens = cached_tokens;
                                    None
                                }
                                AttemptEvent::Ready(stats) => {
                                    legs.enter(Leg::FirstDecodeStep);
                                    progress.timings.handoff = stats;
                                    None
                                }
                            };
                            if let Some(mut finished) = finished {
                                legs.leave();
                                finished.timings.legs = legs.times();
                                // The nodes are free now, however slowly the client reads.
                                drop((attempt, running, legs));
                                yield Output::Finished(finished);
                                return;
                            }
                        }
                    }
                };
                // A decode node is looked for again; until then the leg that failed is over.
                legs.enter(Leg::Reserve);
                let error = match failure {
                    AttemptError::Deadline => Err(GenerateError::Deadline(g.time))?,
                    AttemptError::Refused(message) => Err(GenerateError::Invalid { field: None, message })?,
                    AttemptError::Failed { nodes, message } => {
                        attempts += 1;
                        if attempts >= self.max_attempts {
                            Err(GenerateError::Failed { attempts, last: message.clone() })?;
                        }
                        warn!(error = %message, attempts, "attempt failed, trying again");
                        while !self.budget.withdraw() {
                            if Instant::now() >= wait_end {
                                let last = format!("{message} (and too many other requests failed, too)");
                                Err(GenerateError::Failed { attempts, last })?;
                            }
                            tokio::time::sleep(RETRY_PAUSE).await;
                        }
                        // A node that ended before it took the request up has cost nothing that was done.
                        if begun {
                            progress.timings.migrations += 1;
                            self.metrics.migrated(&g.model.name);
                        }
                        avoid.extend(nodes);
                        continue;
                    }
                    AttemptError::Moved { node, message } => {
                        debug!(%message, "moved away");
                        progress.timings.migrations += 1;
                        self.metrics.migrated(&g.model.name);
                        avoid.push(node);
                        continue;
                    }
                    AttemptError::NoRoom { node, message } => {
                        debug!(%message, "no room");
                        refusal = format!(": {message}");
                        avoid.push(node);
                        continue;
                    }
                    AttemptError::NoNode(role) if avoid.is_empty() => GenerateError::Unavailable(self.nodes.trouble(role)),
                    AttemptError::NoNode(role) => {
                        // Those avoided are better than none. When two were, of which one had failed, the other may be
                        // the only one of its role.
                        let avoided = avoid.len();
                        avoid.retain(|key| !self.nodes.view().of(role).iter().any(|node| node.key == *key));
                        if !avoid.is_empty() && avoid.len() < avoided {
                            continue;
                        }
                        GenerateError::NoRoom { waited: g.arrived.elapsed(), detail: refusal.clone() }
                    }
                };
                avoid.clear();
                if Instant::now() >= wait_end {
                    Err(error)?;
                }
                tokio::time::sleep_until(wait_end.min(Instant::now() + RETRY_PAUSE)).await;
                // Whatever ended the wait, the next attempt shows what has become of it.
                let _ = timeout_at(wait_end.min(Instant::now() + RETRY_INTERVAL), changes.changed()).await;
            }
        }
    }
}

/// Logs why a sequence has failed.
fn log(error: &GenerateError) {
    match error {
        GenerateError::Invalid { .. } => debug!(%error, "request refused"),
        // Counted; under overload a line for each would be one load more.
        GenerateError::NoRoom { .. } | GenerateError::QueueFull { .. } | GenerateError::Late { .. } => {
            debug!(%error, "request turned away");
        }
        GenerateError::ContextLength { .. }
        | GenerateError::UnknownModel { .. }
        | GenerateError::Overloaded { .. }
        | GenerateError::Limited { .. }
        | GenerateError::Unauthenticated
        | GenerateError::Unavailable(_)
        | GenerateError::Deadline(_)
        | GenerateError::Failed { .. }
        | GenerateError::Internal(_) => warn!(%error, "request failed"),
    }
}

fn count_end(metrics: &mut RequestMetrics, finished: &Finished, arrived: Instant) {
    metrics.finished(finished.reason.as_str(), arrived.elapsed());
}

/// How far a request has come, over all attempts.
struct Progress<'a> {
    request: &'a Generation,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    output: Vec<u32>,
    prompt_logprobs: bool,
    first_token: Option<Instant>,
    last_token: Instant,
    timings: Timings,
}

type End = (FinishReason, Option<StopCause>);

impl<'a> Progress<'a> {
    fn new(request: &'a Generation) -> Result<Self, TextError> {
        Ok(Self {
            detokenizer: request.model.text.detokenizer(&request.prompt, request.skip_special)?,
            stops: StopMatcher::new(request.stop.clone(), request.include_stop),
            output: Vec::new(),
            prompt_logprobs: request.prompt_logprobs,
            first_token: None,
            last_token: request.arrived,
            timings: Timings::default(),
            request,
        })
    }

    fn plan(&self, generation: &Arc<Generation>, avoid: Vec<u64>, progress_timeout: Duration) -> Plan {
        let tokens = match self.output.is_empty() {
            true => generation.prompt.clone(),
            false => generation.prompt.iter().chain(&self.output).copied().collect(),
        };
        Plan {
            generation: generation.clone(),
            tokens,
            generated: self.output.len() as u32,
            // Scoring alone takes one token's computation, whose result is not used.
            remaining: (generation.max_tokens - self.output.len() as u32).max(1),
            prompt_logprobs: self.prompt_logprobs,
            avoid,
            progress_timeout,
        }
    }

    /// Takes the next token: its text, and the end if this is it.
    fn token(&mut self, id: u32) -> Result<(String, Option<End>), TextError> {
        self.last_token = Instant::now();
        self.first_token.get_or_insert(self.last_token);
        self.output.push(id);
        if self.request.stop_token_ids.contains(&id) {
            let own = !self.request.model.eos_token_ids.contains(&id);
            return Ok((String::new(), Some((FinishReason::Stop, own.then_some(StopCause::Token(id))))));
        }
        let (text, found) = self.stops.push(&self.detokenizer.push(id)?);
        if let Some(found) = found {
            let cause = StopCause::Text(self.request.stop[found.stop].clone());
            return Ok((text, Some((FinishReason::Stop, Some(cause)))));
        }
        let full = self.output.len() as u32 >= self.request.max_tokens;
        Ok((text, full.then_some((FinishReason::Length, None))))
    }

    fn finish(&mut self, reason: FinishReason, stop: Option<StopCause>) -> Result<Finished, TextError> {
        let text = match stop {
            Some(StopCause::Text(_)) => String::new(),
            // The held-back end of a character may complete a stop text no more: it is a replacement character.
            _ => self.stops.push(&self.detokenizer.flush()?).0 + &self.stops.flush(),
        };
        let since = |at: Instant| (at - self.request.arrived).as_secs_f64();
        let completion_tokens = self.output.len() as u32;
        let mut timings = self.timings.clone();
        if let Some(first) = self.first_token {
            timings.ttft_seconds = since(first);
            timings.mean_itl_seconds =
                (self.last_token - first).as_secs_f64() / f64::from(completion_tokens.max(2) - 1);
        }
        timings.total_seconds = since(Instant::now());
        let prompt_tokens = self.request.prompt.len() as u32;
        Ok(Finished { reason, stop, text, prompt_tokens, completion_tokens, timings })
    }
}
