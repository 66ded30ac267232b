//! Metrics of a node. A metric that means the same as one of vLLM has its name, so dashboards for vLLM work.

use std::time::Duration;

use overfill_cluster::metrics::{
    MetricsError, counter, discovery_success, histogram, int_gauge, new_registry, register,
};
use overfill_transport::FailureReason;
use prometheus::{
    Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    exponential_buckets,
};

/// Values of `finished_reason`.
const ENDS: [&str; 4] = ["stop", "length", "abort", "error"];

/// Metrics that prefill and decode nodes share. Every series has the labels `model_name` and `pool`.
#[derive(Clone, Debug)]
pub struct NodeMetrics {
    /// Registry of all metrics.
    pub registry: Registry,
    /// Requests in the running batch.
    pub requests_running: IntGauge,
    /// Requests accepted but not in the batch.
    pub requests_waiting: IntGauge,
    /// KV blocks by `state`: `held` by requests, `cached` and evictable, `free`.
    pub kv_blocks: IntGaugeVec,
    /// Requests in each engine step.
    pub batch_requests: Histogram,
    /// Tokens computed in each engine step.
    pub step_tokens: Histogram,
    /// Duration of each engine step.
    pub step_seconds: Histogram,
    /// Fraction of the KV blocks that requests hold, 0 to 1. Blocks that are only cached do not count.
    pub kv_cache_usage: Gauge,
    /// Prompt tokens of started requests.
    pub prompt_tokens: IntCounter,
    /// Tokens sampled.
    pub generation_tokens: IntCounter,
    /// Requests ended, by `finished_reason`: `stop`, `length`, `abort`, `error`.
    pub request_success: IntCounterVec,
    /// Seconds from arrival to first token.
    pub time_to_first_token_seconds: Histogram,
    /// Seconds between two tokens of one request.
    pub inter_token_latency_seconds: Histogram,
    /// Seconds from arrival to the end of the request.
    pub e2e_request_latency_seconds: Histogram,
    /// Requests preempted: removed from the batch to free blocks.
    pub preemptions: IntCounter,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_cache_queries: IntCounter,
    /// Prompt tokens found in the prefix cache.
    pub prefix_cache_hits: IntCounter,
    /// Rounds of drafts that the full model has judged.
    pub drafts: IntCounter,
    /// Drafts that the full model was given.
    pub draft_tokens: IntCounter,
    /// Drafts that the full model has accepted.
    pub accepted_tokens: IntCounter,
    /// Routers connected to the node.
    pub routers: IntGauge,
    /// Handoffs between reservation and end.
    pub open_handoffs: IntGauge,
    /// KV bytes held for handoffs whose request has ended.
    pub stranded_bytes: IntGauge,
    /// KV bytes transferred in handoffs.
    pub transfer_bytes: IntCounter,
    /// Seconds from the first frame of a handoff to the confirmed commit.
    pub transfer_seconds: Histogram,
    /// Seconds of the transfer that did not overlap with computing.
    pub transfer_exposed_seconds: Histogram,
    /// Failed handoffs, by `reason`.
    transfer_failures: IntCounterVec,
    /// When discovery last succeeded, by `source`, in seconds since 1970.
    pub discovery_success: IntGaugeVec,
}

impl NodeMetrics {
    /// Creates and registers all metrics of a node of `pool` that serves `model`.
    pub fn new(model: &str, pool: &str) -> Result<Self, MetricsError> {
        let registry = new_registry(&[("model_name", model), ("pool", pool)])?;
        let r = &registry;
        let metrics = Self {
            requests_running: int_gauge(r, "vllm:num_requests_running", "Requests in the running batch.")?,
            requests_waiting: int_gauge(r, "vllm:num_requests_waiting", "Requests waiting for room.")?,
            kv_cache_usage: register(
                r,
                Gauge::new("vllm:kv_cache_usage_perc", "Fraction of the KV blocks held by requests, 0 to 1.")?,
            )?,
            kv_blocks: register(
                r,
                IntGaugeVec::new(
                    Opts::new("overfill_kv_blocks", "KV blocks by state: held by requests, cached, free."),
                    &["state"],
                )?,
            )?,
            batch_requests: sizes(r, "overfill_batch_requests", "Requests in an engine step.")?,
            step_tokens: sizes(r, "vllm:iteration_tokens_total", "Tokens computed in an engine step.")?,
            step_seconds: histogram(r, "overfill_step_seconds", "Seconds that an engine step took.")?,
            prompt_tokens: counter(r, "vllm:prompt_tokens_total", "Prompt tokens of started requests.")?,
            generation_tokens: counter(r, "vllm:generation_tokens_total", "Generated tokens.")?,
            request_success: register(
                r,
                IntCounterVec::new(
                    Opts::new("vllm:request_success_total", "Requests ended, by reason."),
                    &["finished_reason"],
                )?,
            )?,
            time_to_first_token_seconds: histogram(
                r,
                "vllm:time_to_first_token_seconds",
                "Seconds from arrival to the first token.",
            )?,
            inter_token_latency_seconds: histogram(
                r,
                "vllm:inter_token_latency_seconds",
                "Seconds between two tokens of a request.",
            )?,
            e2e_request_latency_seconds: histogram(
                r,
                "vllm:e2e_request_latency_seconds",
                "Seconds from arrival to the end.",
            )?,
            preemptions: counter(r, "vllm:num_preemptions_total", "Requests removed from the batch to free blocks.")?,
            prefix_cache_queries: counter(r, "vllm:prefix_cache_queries_total", "Prompt tokens looked up.")?,
            prefix_cache_hits: counter(r, "vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.")?,
            drafts: counter(
                r,
                "vllm:spec_decode_num_drafts_total",
                "Rounds of drafts that the full model has judged.",
            )?,
            draft_tokens: counter(
                r,
                "vllm:spec_decode_num_draft_tokens_total",
                "Drafts that the full model was given.",
            )?,
            accepted_tokens: counter(
                r,
                "vllm:spec_decode_num_accepted_tokens_total",
                "Drafts that the full model has accepted.",
            )?,
            routers: int_gauge(r, "overfill_routers", "Routers connected to the node.")?,
            open_handoffs: int_gauge(r, "overfill_open_handoffs", "Handoffs between reservation and end.")?,
            stranded_bytes: int_gauge(
                r,
                "overfill_stranded_bytes",
                "KV bytes held for handoffs whose request has ended.",
            )?,
            transfer_bytes: counter(r, "overfill_transfer_bytes_total", "KV bytes transferred in handoffs.")?,
            transfer_seconds: histogram(
                r,
                "overfill_transfer_seconds",
                "Seconds from a handoff's first frame to its confirmed commit.",
            )?,
            transfer_exposed_seconds: histogram(
                r,
                "overfill_transfer_exposed_seconds",
                "Seconds of a handoff after the prefill was computed.",
            )?,
            transfer_failures: register(
                r,
                IntCounterVec::new(
                    Opts::new("overfill_transfer_failures_total", "Handoffs that failed, by reason."),
                    &["reason"],
                )?,
            )?,
            discovery_success: discovery_success(r)?,
            registry,
        };
        // Exported with value 0, so that `rate` sees the first event.
        for reason in FailureReason::ALL {
            metrics.transfer_failures.with_label_values(&[reason.as_str()]);
        }
        for reason in ENDS {
            metrics.request_success.with_label_values(&[reason]);
        }
        Ok(metrics)
    }

    /// Records an engine step that computed `tokens` tokens of `requests` requests.
    pub fn step(&self, requests: usize, tokens: usize, took: Duration) {
        self.batch_requests.observe(requests as f64);
        self.step_tokens.observe(tokens as f64);
        self.step_seconds.observe(took.as_secs_f64());
    }

    /// Counts a failed handoff.
    pub fn transfer_failed(&self, reason: FailureReason) {
        self.transfer_failures.with_label_values(&[reason.as_str()]).inc();
    }

    /// Counts an ended request with its `finished_reason`.
    pub fn finished(&self, reason: &str) {
        debug_assert!(ENDS.contains(&reason), "{reason}");
        self.request_success.with_label_values(&[reason]).inc();
    }
}

/// A histogram of counts: buckets 1, 2, 4, ... 16384.
fn sizes(registry: &Registry, name: &str, help: &str) -> Result<Histogram, MetricsError> {
    let buckets = exponential_buckets(1.0, 2.0, 15)?;
    register(registry, Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_valid_and_carry_the_model() {
        let metrics = NodeMetrics::new("tiny", "small").unwrap();
        metrics.finished("stop");
        let text = prometheus::TextEncoder::new().encode_to_string(&metrics.registry.gather()).unwrap();
        // The order of labels differs from run to run.
        let has = |name: &str, value: &str, labels: &[&str]| {
            text.lines().any(|line| {
                let labelled = line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{'));
                labelled && line.ends_with(value) && labels.iter().all(|label| line.contains(label))
            })
        };
        let common = [r#"model_name="tiny""#, r#"pool="small""#];
        assert!(has("vllm:num_requests_running", "} 0", &common), "{text}");
        let labels = [r#"finished_reason="stop""#, common[0], common[1]];
        assert!(has("vllm:request_success_total", "} 1", &labels), "{text}");
        let labels = [r#"finished_reason="error""#, common[0], common[1]];
        assert!(has("vllm:request_success_total", "} 0", &labels), "{text}");
        for reason in FailureReason::ALL {
            let label = format!("reason=\"{}\"", reason.as_str());
            assert!(has("overfill_transfer_failures_total", "} 0", &[&label]), "{text}");
        }
    }
}
