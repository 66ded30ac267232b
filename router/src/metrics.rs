//! The router's metrics.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use overfill_cluster::metrics::{MetricsError, SECONDS_BUCKETS, discovery_success, new_registry, register};
use prometheus::{
    CounterVec, GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry, exponential_buckets,
};

use crate::{GenerateError, history::History, legs::Leg};

/// Values of `finished_reason`.
const ENDS: [&str; 4] = ["stop", "length", "abort", "error"];

/// Counters, gauges and histograms. Series of requests carry `model_name`.
#[derive(Clone)]
pub struct Metrics {
    /// The registry of all metrics.
    pub registry: Registry,
    /// Number of running sequences by `model_name`.
    pub running: IntGaugeVec,
    /// Number of waiting sequences by `model_name`.
    pub waiting: IntGaugeVec,
    /// Number of open connections by `port` (`http`, `grpc`).
    pub connections: IntGaugeVec,
    /// When discovery last succeeded by `source` (`etcd`, `dns`), in seconds since 1970.
    pub discovery_success: IntGaugeVec,
    /// Number of nodes by `role`, `pool` and `state` ([`NodeState`](crate::node::NodeState)).
    pub nodes: IntGaugeVec,
    /// Seconds that one node would take for all queued prompt tokens, by `pool` and `source` (`nodes`, `router`).
    pub prefill_backlog: GaugeVec,
    /// Number of decode nodes that the load would fill, by `pool` and `source` (`nodes`, `router`).
    pub decode_load: GaugeVec,
    /// Number of requests that wait for the first nodes of a model, by `model_name`.
    pub without_nodes: IntGaugeVec,
    /// Seconds per sequence by `leg`, observed when a sequence ends.
    pub legs: HistogramVec,
    /// The last quarter of an hour.
    pub history: Arc<History>,
    /// Running and waiting sequences by `tenant` and `state`.
    pub tenants: IntGaugeVec,
    /// What the full model says about answers.
    pub watch: WatchMetrics,
    refused: IntCounterVec,
    success: IntCounterVec,
    prompt_tokens: IntCounterVec,
    generation_tokens: IntCounterVec,
    migrations: IntCounterVec,
    first_token: HistogramVec,
    inter_token: HistogramVec,
    whole: HistogramVec,
}

impl Metrics {
    /// Creates and registers the metrics.
    pub fn new() -> Result<Self, MetricsError> {
        let r = &new_registry(&[])?;
        let counter = |name, help, labels: &[&str]| register(r, IntCounterVec::new(Opts::new(name, help), labels)?);
        let seconds = |name, help, labels: &[&str]| {
            let options = HistogramOpts::new(name, help).buckets(SECONDS_BUCKETS.to_vec());
            register(r, HistogramVec::new(options, labels)?)
        };
        let gauges = |name, help| register(r, GaugeVec::new(Opts::new(name, help), &["pool", "source"])?);
        let counts = |name, help, labels: &[&str]| register(r, IntGaugeVec::new(Opts::new(name, help), labels)?);
        let model = &["model_name"];
        let metrics = Self {
            running: counts("vllm:num_requests_running", "Sequences on the nodes.", model)?,
            waiting: counts("vllm:num_requests_waiting", "Sequences waiting in the router.", model)?,
            connections: counts("overfill_open_connections", "Open connections of clients by port.", &["port"])?,
            discovery_success: discovery_success(r)?,
            nodes: counts("overfill_nodes", "Known nodes by role, pool and state.", &["role", "pool", "state"])?,
            prefill_backlog: gauges(
                "overfill_prefill_backlog_seconds",
                "Seconds that one node of the pool would take for all queued prompt tokens.",
            )?,
            decode_load: gauges("overfill_decode_load_nodes", "Decode nodes of the pool that the load would fill.")?,
            without_nodes: counts(
                "overfill_requests_without_nodes",
                "Requests that wait for the first nodes of a model.",
                model,
            )?,
            tenants: counts(
                "overfill_tenant_requests",
                "Sequences by tenant and state: running, waiting.",
                &["tenant", "state"],
            )?,
            watch: WatchMetrics::new(r)?,
            refused: counter(
                "overfill_refused_requests_total",
                "Requests answered with an error before their first token, by reason.",
                &["model_name", "reason"],
            )?,
            success: counter(
                "vllm:request_success_total",
                "Sequences ended, by reason: stop, length, abort, error. Refused ones do not count.",
                &["model_name", "finished_reason"],
            )?,
            prompt_tokens: counter("vllm:prompt_tokens_total", "Prompt tokens of requests.", model)?,
            generation_tokens: counter("vllm:generation_tokens_total", "Generated tokens, sent to clients.", model)?,
            migrations: counter(
                "overfill_migrations_total",
                "Requests moved to other nodes, because a node failed or drained.",
                model,
            )?,
            first_token: seconds(
                "vllm:time_to_first_token_seconds",
                "Seconds from arrival to the first token.",
                model,
            )?,
            inter_token: seconds(
                "vllm:inter_token_latency_seconds",
                "Seconds between two tokens of a sequence.",
                model,
            )?,
            whole: seconds("vllm:e2e_request_latency_seconds", "Seconds from arrival to the end.", model)?,
            legs: seconds(
                "overfill_request_leg_seconds",
                "Seconds that a sequence spent in a leg.",
                &["model_name", "leg"],
            )?,
            registry: r.clone(),
            history: Arc::default(),
        };
        metrics.refusals_of("");
        Ok(metrics)
    }

    /// Creates the series of a model, so that they are exported with value 0 before the first event.
    pub fn model_known(&self, model: &str) {
        self.refusals_of(model);
        for end in ENDS {
            self.success.with_label_values(&[model, end]);
        }
        for counter in [&self.prompt_tokens, &self.generation_tokens, &self.migrations] {
            counter.with_label_values(&[model]);
        }
        for histogram in [&self.first_token, &self.inter_token, &self.whole] {
            histogram.with_label_values(&[model]);
        }
        self.watch.model_known(model);
        for leg in Leg::ALL {
            self.legs.with_label_values(&[model, leg.as_str()]);
        }
    }

    fn refusals_of(&self, model: &str) {
        for reason in GenerateError::REASONS {
            self.refused.with_label_values(&[model, reason]);
        }
    }

    /// Counts a request, or a sequence of one, that is answered with an error before its first token. `model` is empty if
    /// the router does not know the model.
    pub fn refused(&self, model: &str, reason: &str) {
        debug_assert!(GenerateError::REASONS.contains(&reason), "{reason}");
        self.refused.with_label_values(&[model, reason]).inc();
    }

    /// Counts a sequence of `model` that is computed again on other nodes.
    pub fn migrated(&self, model: &str) {
        self.migrations.with_label_values(&[model]).inc();
    }

    /// Metrics of one new sequence. Dropping them before [`RequestMetrics::finished`] means that the client disconnected.
    /// `failure`: shared by the sequences of the request.
    pub fn request(self: &Arc<Self>, model: &str, prompt_tokens: usize, failure: RequestFailure) -> RequestMetrics {
        self.prompt_tokens.with_label_values(&[model]).inc_by(prompt_tokens as u64);
        RequestMetrics {
            first_token: self.first_token.with_label_values(&[model]),
            inter_token: self.inter_token.with_label_values(&[model]),
            generation_tokens: self.generation_tokens.with_label_values(&[model]),
            metrics: self.clone(),
            model: model.to_owned(),
            failure,
            begun: false,
            ended: false,
        }
    }
}

/// Metrics of [`crate::watch`].
#[derive(Clone)]
pub struct WatchMetrics {
    answers: IntCounterVec,
    tokens: IntCounterVec,
    agreed: IntCounterVec,
    /// Sums of negative log-probabilities: under the decode model, under the full model.
    nats: [CounterVec; 2],
    parted_at: HistogramVec,
}

impl WatchMetrics {
    /// Values of `result`.
    const RESULTS: [&str; 4] = ["equal", "parted", "dropped", "failed"];

    fn new(r: &Registry) -> Result<Self, MetricsError> {
        let counter = |name, help, labels: &[&str]| register(r, IntCounterVec::new(Opts::new(name, help), labels)?);
        let nats = |name, help| register(r, CounterVec::new(Opts::new(name, help), &["model_name"])?);
        let options = HistogramOpts::new(
            "overfill_watch_parted_at_tokens",
            "Number of the first token of a watched answer that the full model would not have chosen.",
        );
        Ok(Self {
            answers: counter(
                "overfill_watch_answers_total",
                "Watched answers by result: equal to the full model's choices, parted, dropped (not scored), failed.",
                &["model_name", "result"],
            )?,
            tokens: counter(
                "overfill_watch_tokens_total",
                "Tokens of scored answers that the decode model has chosen.",
                &["model_name"],
            )?,
            agreed: counter(
                "overfill_watch_agreed_tokens_total",
                "The part of overfill_watch_tokens_total that the full model would have chosen too.",
                &["model_name"],
            )?,
            nats: [
                nats(
                    "overfill_watch_decode_nats_total",
                    "Sum of the negative log-probabilities of these tokens under the decode model.",
                )?,
                nats(
                    "overfill_watch_full_nats_total",
                    "Sum of the negative log-probabilities of these tokens under the full model.",
                )?,
            ],
            parted_at: register(
                r,
                HistogramVec::new(options.buckets(exponential_buckets(2.0, 2.0, 13)?), &["model_name"])?,
            )?,
        })
    }

    fn model_known(&self, model: &str) {
        for result in Self::RESULTS {
            self.answers.with_label_values(&[model, result]);
        }
        for counter in [&self.tokens, &self.agreed] {
            counter.with_label_values(&[model]);
        }
        for counter in &self.nats {
            counter.with_label_values(&[model]);
        }
        self.parted_at.with_label_values(&[model]);
    }

    /// Counts an answer that no node has scored.
    pub fn dropped(&self, model: &str) {
        self.answers.with_label_values(&[model, "dropped"]).inc();
    }

    /// Counts an answer whose score makes no sense.
    pub fn failed(&self, model: &str) {
        self.answers.with_label_values(&[model, "failed"]).inc();
    }

    /// Counts a scored answer: its tokens, those that agree, the sums of negative log-probabilities under the decode and the
    /// full model, and the number of the first token that does not agree.
    pub fn scored(&self, model: &str, tokens: u64, agreed: u64, nats: [f64; 2], parted_at: Option<u64>) {
        let result = if parted_at.is_some() { "parted" } else { "equal" };
        self.answers.with_label_values(&[model, result]).inc();
        self.tokens.with_label_values(&[model]).inc_by(tokens);
        self.agreed.with_label_values(&[model]).inc_by(agreed);
        for (counter, nats) in self.nats.iter().zip(nats) {
            counter.with_label_values(&[model]).inc_by(nats);
        }
        if let Some(parted_at) = parted_at {
            self.parted_at.with_label_values(&[model]).observe(parted_at as f64);
        }
    }
}

/// Whether a sequence of a request has failed. Its other sequences then end with it, and no client has left.
#[derive(Clone, Default)]
pub struct RequestFailure(Arc<AtomicBool>);

/// Metrics of one sequence. Series are looked up once, so that counting a token is cheap.
pub struct RequestMetrics {
    metrics: Arc<Metrics>,
    model: String,
    first_token: prometheus::Histogram,
    inter_token: prometheus::Histogram,
    generation_tokens: prometheus::IntCounter,
    failure: RequestFailure,
    /// Whether the sequence has tokens.
    begun: bool,
    ended: bool,
}

impl RequestMetrics {
    /// Counts a token. `after`: time since the previous token, or since the request for the first token.
    pub fn token(&mut self, after: Duration) {
        let first = !std::mem::replace(&mut self.begun, true);
        self.generation_tokens.inc();
        if first { &self.first_token } else { &self.inter_token }.observe(after.as_secs_f64());
        self.metrics.history.token(first, after);
    }

    /// Counts a sequence that failed with this reason. Before its first token it counts as refused only.
    pub fn failed(&mut self, reason: &str, after: Duration) {
        self.failure.0.store(true, Ordering::Relaxed);
        if self.begun {
            return self.finished("error", after);
        }
        self.ended = true;
        self.metrics.refused(&self.model, reason);
    }

    /// Counts a sequence that ended with `reason`. `after`: time since the request.
    pub fn finished(&mut self, reason: &str, after: Duration) {
        debug_assert!(ENDS.contains(&reason), "{reason}");
        self.ended = true;
        self.metrics.success.with_label_values(&[self.model.as_str(), reason]).inc();
        self.metrics.whole.with_label_values(&[&self.model]).observe(after.as_secs_f64());
        self.metrics.history.ended();
    }
}

impl Drop for RequestMetrics {
    fn drop(&mut self) {
        let end = match (self.failure.0.load(Ordering::Relaxed), self.begun) {
            _ if self.ended => return,
            (false, _) => "abort",
            (true, true) => "error",
            // The request counts as refused.
            (true, false) => return,
        };
        self.metrics.success.with_label_values(&[self.model.as_str(), end]).inc();
    }
}
