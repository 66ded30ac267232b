//! The summary of all requests.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

use super::client::{Arrivals, Outcome};
use crate::text;

/// Values with their mean and exact percentiles.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Distribution {
    pub count: usize,
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p95: f64,
    pub p99: f64,
    pub max: f64,
    /// All values, sorted.
    #[serde(skip)]
    pub sorted: Vec<f64>,
}

impl Distribution {
    /// `None` if there are no values.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let max = *values.last()?;
        let count = values.len();
        let at = |share: f64| percentile(&values, share);
        Some(Self {
            count,
            mean: values.iter().sum::<f64>() / count as f64,
            p50: at(0.50),
            p90: at(0.90),
            p95: at(0.95),
            p99: at(0.99),
            max,
            sorted: values,
        })
    }
}

/// The percentile by nearest rank. `sorted` must not be empty.
pub fn percentile(sorted: &[f64], share: f64) -> f64 {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// Limits of a good request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Limits {
    pub ttft_limit_seconds: Option<f64>,
    /// Limit for the mean over the tokens after the first.
    pub itl_limit_seconds: Option<f64>,
}

/// A request that got all its tokens.
#[derive(Clone, Debug)]
struct Answer {
    ttft: f64,
    /// Times from token to token, or from event to event.
    gaps: Vec<f64>,
    e2e: f64,
    tokens: usize,
}

impl Answer {
    fn of(outcome: &Outcome) -> Option<Self> {
        let Arrivals { tokens, times } = outcome.result.as_ref().ok()?;
        let since = |later: &Instant, earlier: &Instant| later.duration_since(*earlier).as_secs_f64();
        Some(Self {
            ttft: since(times.first()?, &outcome.sent),
            gaps: times.windows(2).map(|pair| since(&pair[1], &pair[0])).collect(),
            e2e: since(times.last()?, &outcome.sent),
            tokens: *tokens,
        })
    }

    /// Returns whether the request is within both limits. An answer of one token has no ITL.
    fn is_good(&self, limits: &Limits) -> bool {
        let itl = self.gaps.iter().sum::<f64>() / self.tokens.saturating_sub(1).max(1) as f64;
        limits.ttft_limit_seconds.is_none_or(|limit| self.ttft <= limit)
            && limits.itl_limit_seconds.is_none_or(|limit| itl <= limit)
    }
}

/// Good requests.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Goodput {
    #[serde(flatten)]
    pub limits: Limits,
    pub requests: usize,
    /// Fraction of all requests, including failed and unsent ones.
    pub share: f64,
    pub requests_per_second: f64,
}

/// The summary of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// From the first request to the end of the last.
    pub elapsed_seconds: f64,
    pub requests: usize,
    pub succeeded: usize,
    /// Failed requests by kind.
    pub errors: BTreeMap<String, usize>,
    /// This and all following fields count successful requests only.
    pub prompt_tokens: usize,
    pub output_tokens: usize,
    pub requests_per_second: f64,
    pub prompt_tokens_per_second: f64,
    pub output_tokens_per_second: f64,
    pub ttft_seconds: Option<Distribution>,
    pub itl_seconds: Option<Distribution>,
    pub e2e_seconds: Option<Distribution>,
    pub goodput: Option<Goodput>,
}

impl Summary {
    pub fn of(outcomes: &[Outcome], elapsed: Duration, limits: Limits) -> Self {
        let elapsed_seconds = elapsed.as_secs_f64();
        let answers: Vec<Answer> = outcomes.iter().filter_map(Answer::of).collect();
        let mut errors = BTreeMap::new();
        for failure in outcomes.iter().filter_map(|outcome| outcome.result.as_ref().err()) {
            *errors.entry(failure.kind.clone()).or_default() += 1;
        }
        let succeeded = outcomes.iter().filter(|outcome| outcome.result.is_ok());
        let prompt_tokens = succeeded.map(|outcome| outcome.prompt_tokens).sum();
        let output_tokens = answers.iter().map(|answer| answer.tokens).sum();
        let per_second = |count: usize| count as f64 / elapsed_seconds;
        let good = answers.iter().filter(|answer| answer.is_good(&limits)).count();
        Self {
            elapsed_seconds,
            requests: outcomes.len(),
            succeeded: answers.len(),
            errors,
            prompt_tokens,
            output_tokens,
            requests_per_second: per_second(answers.len()),
            prompt_tokens_per_second: per_second(prompt_tokens),
            output_tokens_per_second: per_second(output_tokens),
            ttft_seconds: Distribution::of(answers.iter().map(|answer| answer.ttft).collect()),
            itl_seconds: Distribution::of(answers.iter().flat_map(|answer| answer.gaps.iter().copied()).collect()),
            e2e_seconds: Distribution::of(answers.iter().map(|answer| answer.e2e).collect()),
            goodput: (limits != Limits::default()).then(|| Goodput {
                limits,
                requests: good,
                share: good as f64 / outcomes.len().max(1) as f64,
                requests_per_second: per_second(good),
            }),
        }
    }

    /// The summary as tables.
    pub fn table(&self) -> String {
        let latencies = [("TTFT", &self.ttft_seconds), ("ITL", &self.itl_seconds), ("E2E", &self.e2e_seconds)];
        let rows: Vec<[String; 7]> = latencies
            .into_iter()
            .filter_map(|(name, d)| Some((name, d.as_ref()?)))
            .map(|(name, d)| {
                let [mean, p50, p90, p95, p99, max] = [d.mean, d.p50, d.p90, d.p95, d.p99, d.max].map(text::seconds);
                [name.into(), mean, p50, p90, p95, p99, max]
            })
            .collect();
        let mut out = text::table(["LATENCY", "MEAN", "P50", "P90", "P95", "P99", "MAX"], &rows);
        let mut rows = vec![
            ["requests".into(), self.succeeded.to_string(), format!("{:.2}/s", self.requests_per_second)],
            ["prompt tokens".into(), self.prompt_tokens.to_string(), format!("{:.1}/s", self.prompt_tokens_per_second)],
            ["output tokens".into(), self.output_tokens.to_string(), format!("{:.1}/s", self.output_tokens_per_second)],
        ];
        if let Some(good) = &self.goodput {
            let rate = format!("{:.2}/s, {:.1} % of all requests", good.requests_per_second, 100.0 * good.share);
            rows.push(["good requests".into(), good.requests.to_string(), rate]);
        }
        for (kind, count) in &self.errors {
            rows.push([format!("failed: {kind}"), count.to_string(), String::new()]);
        }
        out += "\n";
        out += &text::table(["THROUGHPUT", "COUNT", "RATE"], &rows);
        out += &format!("\n{} requests in {}\n", self.requests, text::seconds(self.elapsed_seconds));
        out
    }
}

#[cfg(test)]
mod tests {
    use super::super::client::Failure;
    use super::*;

    /// A request whose tokens arrive at these times after sending, in milliseconds.
    fn answered(tokens: &[u64]) -> Outcome {
        let sent = Instant::now();
        let at = |ms: &u64| sent + Duration::from_millis(*ms);
        let times: Vec<Instant> = tokens.iter().map(at).collect();
        Outcome { sent, prompt_tokens: 10, result: Ok(Arrivals { tokens: times.len(), times }) }
    }

    fn failed(kind: &str) -> Outcome {
        let failure = Failure { kind: kind.into(), message: String::new() };
        Outcome { result: Err(failure), ..answered(&[0]) }
    }

    fn limits(ttft: Option<f64>, itl: Option<f64>) -> Limits {
        Limits { ttft_limit_seconds: ttft, itl_limit_seconds: itl }
    }

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let d = Distribution::of((1..=100).rev().map(f64::from).collect()).unwrap();
        assert_eq!((d.p50, d.p90, d.p95, d.p99, d.max), (50.0, 90.0, 95.0, 99.0, 100.0));
        assert_eq!((d.count, d.mean), (100, 50.5));
        let d = Distribution::of(vec![3.0, 1.0, 2.0]).unwrap();
        assert_eq!((d.p50, d.p90, d.p99), (2.0, 3.0, 3.0));
        let d = Distribution::of(vec![7.0]).unwrap();
        assert_eq!((d.p50, d.p99, d.max), (7.0, 7.0, 7.0));
        assert_eq!(Distribution::of(Vec::new()), None);
    }

    #[test]
    fn a_request_is_good_within_both_limits() {
        // First token after 100 ms, then gaps of 20, 20 and 50 ms: the mean ITL is 30 ms.
        let answer = Answer::of(&answered(&[100, 120, 140, 190])).unwrap();
        for (ttft, itl, good) in [
            (None, None, true),
            (Some(0.1), Some(0.03), true),
            (Some(0.099), None, false),
            (Some(0.099), Some(0.03), false),
            (None, Some(0.029), false),
            (Some(0.1), Some(0.029), false),
        ] {
            assert_eq!(answer.is_good(&limits(ttft, itl)), good, "{ttft:?}, {itl:?}");
        }
        let single = Answer::of(&answered(&[100])).unwrap();
        assert!(single.is_good(&limits(None, Some(0.0))));
    }

    #[test]
    fn failures_lower_the_goodput_and_no_latency() {
        let outcomes = [answered(&[100, 110]), answered(&[300, 310]), failed("HTTP 429"), failed("HTTP 429")];
        let summary = Summary::of(&outcomes, Duration::from_secs(2), limits(Some(0.2), None));
        assert_eq!((summary.requests, summary.succeeded), (4, 2));
        assert_eq!(summary.errors, [("HTTP 429".to_owned(), 2)].into());
        assert_eq!((summary.prompt_tokens, summary.output_tokens), (20, 4));
        assert_eq!((summary.requests_per_second, summary.output_tokens_per_second), (1.0, 2.0));
        let goodput = summary.goodput.as_ref().unwrap();
        assert_eq!((goodput.requests, goodput.share, goodput.requests_per_second), (1, 0.25, 0.5));
        let ttft = summary.ttft_seconds.as_ref().unwrap();
        assert_eq!((ttft.count, ttft.p50, ttft.max), (2, 0.1, 0.3));
        assert_eq!(summary.itl_seconds.as_ref().unwrap().count, 2);
        assert!(summary.table().contains("failed: HTTP 429  2"), "{}", summary.table());
    }

    #[test]
    fn without_limits_there_is_no_goodput_and_without_answers_no_latency() {
        let summary = Summary::of(&[failed("timeout")], Duration::from_secs(1), Limits::default());
        assert_eq!((summary.goodput.is_none(), summary.ttft_seconds.is_none()), (true, true));
    }
}
