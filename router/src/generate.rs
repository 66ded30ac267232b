//! Runs one sequence: attempts and retries until it ends.

use std::{collections::BTreeMap, pin::pin, sync::Arc, time::Duration};

use async_stream::try_stream;
use futures::{Stream, StreamExt as _};
use overfill_kv::{FinishReason, Role};
use parking_lot::Mutex;
use tokio::time::Instant;
use tower::retry::budget::{Budget as _, TpsBudget};
use tracing::{Instrument as _, debug, field::Empty, info_span, warn};

use crate::{
    GenerateError,
    admission::{Admission, Ask, Place},
    affinity::Affinity,
    attempt::{Attempt, AttemptEvent},
    catalog::Catalog,
    legs::{Leg, LegTimes, Legs},
    metrics::{Metrics, RequestFailure},
    node::ServedModel,
    nodes::Nodes,
    prompt::TextPool,
    request::{Generation, Output, Timings},
    retry::{Retries, Retry},
    scaling::{PoolWork, pool_work},
    sequence::Sequence,
    settings::RequestSettings,
    tenants::{self, ApiKeys, Tenant},
    waiting::Waiting,
    watch::Watch,
};

/// Prompt blocks whose prefill node is remembered: 64 Ki blocks are a million tokens.
const AFFINITY_BLOCKS: usize = 1 << 16;
/// Time window of the retry budget.
const BUDGET_WINDOW: Duration = Duration::from_secs(10);
/// Number of retries that each new request adds to the budget.
const BUDGET_PER_REQUEST: f32 = 0.2;

/// The router's state that all requests share.
#[derive(Clone)]
pub struct Core {
    /// All node addresses and the nodes that are up.
    pub nodes: Nodes,
    /// The models that clients can request.
    pub catalog: Catalog,
    /// Admission control.
    pub admission: Admission,
    /// The router's metrics.
    pub metrics: Arc<Metrics>,
    /// Default time limit of a request.
    pub default_time: Duration,
    /// Renders chat templates and tokenizes prompts.
    pub text_pool: TextPool,
    /// What requests may change, and how the answers of chats are parsed.
    pub settings: Arc<RequestSettings>,
    /// Start of the router.
    pub started: Instant,
    keys: Option<ApiKeys>,
    affinity: Arc<Mutex<Affinity>>,
    max_queue: Duration,
    max_attempts: u32,
    progress_timeout: Duration,
    /// The sequences that wait in this router.
    pub waiting: Waiting,
    /// Has the full model score some answers.
    pub watch: Watch,
    /// Retry budget. It prevents retries from overloading a failing cluster. Retries beyond the budget wait.
    budget: Arc<TpsBudget>,
}

impl Core {
    /// The state of a router with these nodes and settings.
    pub fn new(nodes: Nodes, metrics: Arc<Metrics>, config: &crate::Config) -> Self {
        let waiting = Waiting::default();
        Self {
            catalog: Catalog::new(nodes.clone(), &config.served_models, config.max_waiting, waiting.clone()),
            nodes,
            watch: Watch::new(config.requests.watch_share, metrics.clone()),
            admission: Admission::new(config.max_running, config.max_waiting),
            metrics,
            default_time: config.default_deadline,
            text_pool: TextPool::default(),
            settings: Arc::new(config.requests.clone()),
            started: Instant::now(),
            keys: config.api_keys.clone(),
            affinity: Arc::new(Mutex::new(Affinity::new(AFFINITY_BLOCKS))),
            max_queue: config.max_queue,
            max_attempts: config.max_attempts,
            progress_timeout: config.progress_timeout,
            waiting,
            budget: Arc::new(TpsBudget::new(BUDGET_WINDOW, config.min_retries_per_second, BUDGET_PER_REQUEST)),
        }
    }

    /// The model `name`. An empty name stands for the only model. If no node serves it yet, waits for at most `time`
    /// (`None`: the default time limit), and at most as long as a request may wait for a node.
    pub async fn model(
        &self,
        name: &str,
        arrived: Instant,
        time: Option<Duration>,
    ) -> Result<Arc<ServedModel>, GenerateError> {
        let time = time.unwrap_or(self.default_time).min(self.max_queue);
        self.catalog.find(name, arrived + time).await
    }

    /// Work of every pool, by role and name of the pool. `itl_limit_seconds` is the limit of the inter-token latency, if
    /// there is one.
    pub fn pool_work(&self, itl_limit_seconds: Option<f64>) -> BTreeMap<(Role, String), PoolWork> {
        let waiting = |model: &str, reason| self.waiting.work(model, reason);
        pool_work(&self.nodes.view(), &waiting, itl_limit_seconds)
    }

    /// Whether requests need an API key.
    pub fn has_keys(&self) -> bool {
        self.keys.is_some()
    }

    /// The tenants that metrics tell apart: those of the API keys. Without keys, clients choose names, and all count as one.
    pub fn counted_tenants(&self) -> Vec<Arc<str>> {
        self.keys.as_ref().map_or_else(|| vec!["".into()], ApiKeys::names)
    }

    /// The tenant of a request with these headers.
    pub fn identify(&self, authorization: Option<&str>, tenant: Option<&str>) -> Result<Arc<Tenant>, GenerateError> {
        tenants::identify(self.keys.as_ref(), authorization, tenant)
    }

    /// Queues all of these generations, which must be of one model, or returns an error.
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

    /// Generates a sequence. Dropping the stream ends the request on every node.
    pub fn generate(
        &self,
        place: Place,
        generation: Generation,
    ) -> impl Stream<Item = Result<Output, GenerateError>> + Send + use<> {
        self.generate_after(LegTimes::default(), RequestFailure::default(), place, generation)
    }

    /// Generates a sequence. `spent`: time that the request has already spent in earlier legs. `failure`: shared by the
    /// sequences of the request.
    pub fn generate_after(
        &self,
        spent: LegTimes,
        failure: RequestFailure,
        place: Place,
        generation: Generation,
    ) -> impl Stream<Item = Result<Output, GenerateError>> + Send + use<> {
        let core = self.clone();
        let mut metrics = core.metrics.request(&generation.model.name, generation.prompt.len(), failure);
        let arrived = generation.arrived;
        let span = info_span!(
            "sequence",
            request = %generation.request_id,
            model = generation.model.name,
            prompt_tokens = generation.prompt.len(),
            generated_tokens = Empty,
            finish_reason = Empty,
            prefill_node = Empty,
            decode_node = Empty,
            migrations = Empty,
        );
        let mut legs = Legs::observed(span.clone(), spent, core.metrics.legs.clone(), &generation.model.name);
        legs.enter(Leg::Queue);
        try_stream! {
            let mut outputs = pin!(core.outputs(place, generation, legs));
            let mut last = arrived;
            while let Some(output) = outputs.next().instrument(span.clone()).await {
                match &output {
                    Ok(Output::Token { .. }) => {
                        let now = Instant::now();
                        metrics.token(now - last);
                        last = now;
                    }
                    Ok(Output::Finished(finished)) => {
                        span.record("generated_tokens", finished.completion_tokens);
                        span.record("finish_reason", finished.reason.as_str());
                        span.record("prefill_node", &finished.timings.prefill_node);
                        span.record("decode_node", &finished.timings.decode_node);
                        span.record("migrations", finished.timings.migrations);
                        metrics.finished(finished.reason.as_str(), arrived.elapsed());
                    }
                    Ok(Output::PromptLogprobs(_)) => {}
                    Err(e) => {
                        span.in_scope(|| log(e));
                        metrics.failed(e.reason(), arrived.elapsed());
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
        let default = self.settings.modes.of(&generation.model.name).flatten();
        let mode = Some(generation.mode.or(default).unwrap_or_default());
        let mut generation = Generation { mode, ..generation };
        let mut watched = self.watch.begin(&mut generation);
        let generation = Arc::new(generation);
        try_stream! {
            let waiter = self.waiting.begin(&generation);
            let mut running = place.run().await?;
            let mut sequence = Sequence::new(generation.clone())?;
            self.budget.deposit();
            let (nodes, budget, wait_end) = (self.nodes.clone(), self.budget.clone(), self.queue_end(&generation));
            let mut retries = Retries::new(nodes, budget, self.max_attempts, wait_end, waiter);
            retries.placed();
            loop {
                legs.enter(Leg::Reserve);
                let plan = sequence.plan(retries.begin(), self.progress_timeout);
                let mut begun = false;
                let failure = match Attempt::new(&self.nodes.view(), &self.affinity, plan) {
                    Err(failure) => failure,
                    Ok(attempt) => {
                        retries.found_nodes();
                        let mut attempt = Box::new(attempt);
                        if !attempt.hands_over() {
                            legs.enter(Leg::PrefillQueue);
                        }
                        loop {
                            let event = match attempt.next().await {
                                Ok(event) => event,
                                Err(failure) => break failure,
                            };
                            let end = match event {
                                AttemptEvent::Reserved { node, held_tokens } => {
                                    attempt.choose_prefill_again(&self.nodes.view(), &self.affinity);
                                    retries.placed();
                                    legs.enter(Leg::PrefillQueue);
                                    sequence.timings.decode_node = node;
                                    sequence.timings.decode_held_tokens = held_tokens;
                                    None
                                }
                                AttemptEvent::Started { node, cached_tokens } => {
                                    retries.placed();
                                    legs.enter(Leg::Prefill);
                                    begun = true;
                                    sequence.timings.prefill_node = node;
                                    sequence.timings.prefill_cached_tokens = cached_tokens;
                                    None
                                }
                                AttemptEvent::PromptLogprobs(logprobs) => {
                                    sequence.scored();
                                    yield Output::PromptLogprobs(logprobs);
                                    None
                                }
                                // Only the prompt's log-probabilities were requested. The token is discarded.
                                AttemptEvent::Token(..) if generation.max_tokens == 0 => Some((FinishReason::Length, None)),
                                AttemptEvent::Token(mut token, stage) => {
                                    if let Some(watched) = &mut watched {
                                        watched.token(&mut token, stage);
                                    }
                                    sequence.producer.get_or_insert_with(|| attempt.producer().to_owned());
                                    let (text, end) = sequence.push(token.token)?;
                                    match (stage, &end) {
                                        (Role::Prefill, None) => legs.enter(Leg::Handoff),
                                        (Role::Decode, None) => legs.enter(Leg::Decode),
                                        (Role::Prefill | Role::Decode, Some(_)) => legs.leave(),
                                    }
                                    running.token();
                                    retries.progressed(generation.deadline().min(Instant::now() + self.max_queue));
                                    yield Output::Token { token, text, stage };
                                    end
                                }
                                AttemptEvent::Ready(stats) => {
                                    legs.enter(Leg::FirstDecodeStep);
                                    sequence.timings.handoff = stats;
                                    if let Some(stats) = stats {
                                        let Timings { prefill_node, decode_node, .. } = &sequence.timings;
                                        self.metrics.history.handoff(prefill_node, decode_node, stats);
                                    }
                                    None
                                }
                                AttemptEvent::Judged { drafted, accepted } => {
                                    sequence.timings.drafted_tokens += drafted;
                                    sequence.timings.accepted_tokens += accepted;
                                    None
                                }
                                AttemptEvent::Chosen(token, stage) => {
                                    let (text, end) = sequence.push(token.token)?;
                                    match &end {
                                        None => legs.enter(Leg::Decode),
                                        Some(_) => legs.leave(),
                                    }
                                    running.token();
                                    retries.progressed(generation.deadline().min(Instant::now() + self.max_queue));
                                    yield Output::Token { token, text, stage };
                                    end
                                }
                                AttemptEvent::Asked => None,
                                AttemptEvent::Closed => {
                                    let plan = sequence.plan(Vec::new(), self.progress_timeout);
                                    match attempt.reopen(&self.nodes.view(), &self.affinity, plan) {
                                        Ok(()) => None,
                                        Err(failure) => break failure,
                                    }
                                }
                                AttemptEvent::Finished(reason) => Some((reason, None)),
                            };
                            if let Some(end) = end {
                                legs.leave();
                                let finished = sequence.finish(end, legs.times())?;
                                if let Some(watched) = watched.take() {
                                    let producer = sequence.producer.as_deref().unwrap_or_default();
                                    let node = &finished.timings.prefill_node;
                                    let (view, output) = (self.nodes.view(), sequence.output());
                                    self.watch.ended(&view, watched, &generation, output, producer, node);
                                }
                                // Release the nodes before the client has read the last output.
                                drop((attempt, running, legs));
                                yield Output::Finished(Box::new(finished));
                                return;
                            }
                        }
                    }
                };
                // The wait for the next attempt counts as `Reserve`, not as part of the failed leg.
                legs.enter(Leg::Reserve);
                match retries.after(&generation, failure, begun).await? {
                    Retry::Again => {}
                    Retry::Migrated => {
                        sequence.timings.migrations += 1;
                        self.metrics.migrated(&generation.model.name);
                    }
                }
            }
        }
    }
}

/// Logs why a sequence failed.
fn log(error: &GenerateError) {
    match error {
        GenerateError::Invalid { .. } => debug!(%error, "request refused"),
        // Metrics count these. One warning per request would add to the load of an overloaded router.
        GenerateError::NoRoom { .. } | GenerateError::QueueFull { .. } | GenerateError::Late { .. } => {
            debug!(%error, "request rejected because of load");
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
