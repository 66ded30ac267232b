//! `overfill bench serve`: puts load on a running server over OpenAI's API, and reports latency and throughput.

pub mod client;
pub mod load;
mod plot;
mod record;
pub mod summary;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use client::{Api, Outcome, Prompts};
use load::{Lengths, Workload};
use summary::{Limits, Summary};

use crate::router_client::ApiKey;

const AFTER_HELP: &str = "\
TTFT is the time to the first token, ITL the time between tokens. A good request meets both limits.

Examples, while a cluster runs (overfill up):
  overfill bench serve --requests 50 --concurrency 4
  overfill bench serve --rate 4 --duration-seconds 30 --prompt-tokens lognormal:200,500,1500 --output-tokens uniform:16,256
  overfill bench serve --rate 4 --ttft-limit-seconds 1 --itl-limit-seconds 0.1 --plot run.svg
  overfill bench serve --rate 4 --requests 500 --record run.jsonl
Any server that speaks OpenAI's API:
  overfill bench serve --http-url http://127.0.0.1:8000 --model NAME --prompts text";

/// The target and the kind of load.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct ServeArgs {
    /// URL of the server's HTTP API, without /v1.
    #[arg(
        long,
        env = "OVERFILL_HTTP_URL",
        default_value = "http://127.0.0.1:8080",
        value_name = "URL",
        help_heading = "Connection"
    )]
    http_url: String,
    /// CA certificates (PEM file). The router's certificate must be signed by one of them. Needed for https:// URLs.
    #[arg(long, env = "OVERFILL_TLS_CA", value_name = "FILE", help_heading = "Connection")]
    tls_ca: Option<PathBuf>,
    /// API key of the client.
    #[command(flatten, next_help_heading = "Connection")]
    key: ApiKey,
    /// Name of the served model. A router that serves only one needs no name.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "NAME", help_heading = "Connection")]
    model: String,
    /// Closed loop: number of concurrent requests. A new request starts when one ends.
    #[arg(long, default_value_t = 8, value_parser = super::count, value_name = "REQUESTS", help_heading = "Load")]
    concurrency: usize,
    /// Open loop: requests per second, with random (Poisson) arrivals. Replaces --concurrency.
    #[arg(long, conflicts_with = "concurrency", value_parser = super::positive, help_heading = "Load")]
    rate: Option<f64>,
    /// Open loop: maximum number of concurrent requests. An arrival above it is not sent and counts as failed.
    #[arg(long, default_value_t = 512, value_parser = super::count, value_name = "REQUESTS", help_heading = "Load")]
    max_in_flight: usize,
    /// Number of measured requests.
    #[arg(long, default_value_t = 100, value_parser = super::count, value_name = "COUNT", help_heading = "Load")]
    requests: usize,
    /// Duration of the load. Replaces --requests.
    #[arg(
        long,
        conflicts_with = "requests",
        value_parser = super::seconds,
        value_name = "SECONDS",
        help_heading = "Load"
    )]
    duration_seconds: Option<f64>,
    /// Number of unmeasured requests, sent one at a time before the load.
    #[arg(long, default_value_t = 2, value_name = "COUNT", help_heading = "Load")]
    warm_up_requests: usize,
    /// How prompts are sent: as token ids or as text to /v1/completions, or as a message to /v1/chat/completions. A text has
    /// one common word per token.
    #[arg(long, value_enum, default_value_t = Prompts::Ids, value_name = "FORM", help_heading = "Prompts and answers")]
    prompts: Prompts,
    /// Prompt length in tokens: N, uniform:LOW,HIGH or lognormal:MEDIAN,P95[,MAX].
    #[arg(long, default_value_t = Lengths::Fixed(512), value_name = "LENGTH", help_heading = "Prompts and answers")]
    prompt_tokens: Lengths,
    /// Answer length in tokens, in the same forms.
    #[arg(long, default_value_t = Lengths::Fixed(128), value_name = "LENGTH", help_heading = "Prompts and answers")]
    output_tokens: Lengths,
    /// Number of token ids that prompts are drawn from, starting at id 0.
    #[arg(
        long,
        default_value_t = 256,
        value_parser = clap::value_parser!(u32).range(1..),
        value_name = "IDS",
        help_heading = "Prompts and answers"
    )]
    vocabulary: u32,
    /// Random seed. The same seed gives the same prompts, lengths and arrival times.
    #[arg(long, default_value_t = 0, help_heading = "Prompts and answers")]
    seed: u64,
    /// Time limit of a request. A request that takes longer counts as failed.
    #[arg(
        long,
        default_value_t = 600.0,
        value_parser = super::seconds,
        value_name = "SECONDS",
        help_heading = "Limits"
    )]
    timeout_seconds: f64,
    /// TTFT limit of a good request.
    #[arg(long, value_parser = super::seconds, value_name = "SECONDS", help_heading = "Limits")]
    ttft_limit_seconds: Option<f64>,
    /// Limit for the mean ITL of a good request.
    #[arg(long, value_parser = super::seconds, value_name = "SECONDS", help_heading = "Limits")]
    itl_limit_seconds: Option<f64>,
    /// Print JSON.
    #[arg(long, help_heading = "Output")]
    json: bool,
    /// Also plot TTFT, ITL and throughput into this SVG file.
    #[arg(long, value_name = "FILE.svg", help_heading = "Output")]
    plot: Option<PathBuf>,
    /// Also write arrival, lengths and latencies of each request to this file, as a trace for `overfill plan`.
    #[arg(long, value_name = "FILE.jsonl", help_heading = "Output")]
    record: Option<PathBuf>,
}

/// Runs the subcommand. Returns an error if no request succeeded.
pub async fn run(args: ServeArgs) -> Result<()> {
    let (ca, key) = (args.tls_ca.as_deref(), args.key.authorization()?);
    let timeout = Duration::from_secs_f64(args.timeout_seconds);
    let api = Arc::new(Api::new(&args.http_url, ca, key, &args.model, args.prompts, timeout)?);
    let mut workload = Workload::new(args.prompt_tokens, args.output_tokens, args.vocabulary, args.seed);
    for request in workload.by_ref().take(args.warm_up_requests) {
        let outcome = api.complete(request).await;
        if let Err(failure) = outcome.result {
            bail!("the warm-up failed: {}: {}", failure.kind, failure.message);
        }
    }
    tracing::info!(warm_up_requests = args.warm_up_requests, "warm-up done, starting the load");
    let start = Instant::now();
    let outcomes = args.load(&api, workload, start).await?;
    let limits = Limits { ttft_limit_seconds: args.ttft_limit_seconds, itl_limit_seconds: args.itl_limit_seconds };
    let summary = Summary::of(&outcomes, start.elapsed(), limits);
    // One message of each kind of error is logged.
    for kind in summary.errors.keys() {
        let of_kind = outcomes.iter().filter_map(|o| o.result.as_ref().err()).find(|failure| failure.kind == *kind);
        if let Some(failure) = of_kind {
            tracing::warn!(kind, count = summary.errors[kind], example = failure.message, "requests failed");
        }
    }
    if args.json {
        println!("{}", serde_json::to_string(&summary)?);
    } else {
        print!("{}", summary.table());
    }
    if let Some(file) = &args.plot {
        plot::write(file, &summary, &outcomes, start)
            .map_err(|e| anyhow::anyhow!("drawing {}: {e}", file.display()))?;
    }
    if let Some(file) = &args.record {
        let text = record::lines(&outcomes, start);
        std::fs::write(file, text).with_context(|| format!("writing {}", file.display()))?;
    }
    if summary.succeeded == 0 {
        bail!("none of {} requests succeeded", summary.requests);
    }
    Ok(())
}

impl ServeArgs {
    /// Sends all requests and waits until they end.
    async fn load(&self, api: &Arc<Api>, workload: Workload, start: Instant) -> Result<Vec<Outcome>> {
        let most = self.rate.map_or(self.concurrency, |_| self.max_in_flight);
        let places = Arc::new(Semaphore::new(most));
        // Arrival times need a seed that differs from the prompts' seed.
        let mut gaps = self.rate.map(|rate| load::gaps(rate, !self.seed));
        let end = self.duration_seconds.map(|seconds| start + Duration::from_secs_f64(seconds));
        let count = self.duration_seconds.map_or(self.requests, |_| super::MOST_COUNT);
        let (mut running, mut outcomes, mut arrival) = (JoinSet::new(), Vec::new(), start);
        for request in workload.take(count) {
            if let Some(gap) = gaps.as_mut().and_then(Iterator::next) {
                arrival += gap;
                sleep_until(end.map_or(arrival, |end| end.min(arrival))).await;
            }
            // In a closed loop, waits until another request ends, which takes at most its time limit.
            let place = match self.rate {
                Some(_) => places.clone().try_acquire_owned().ok(),
                None => Some(places.clone().acquire_owned().await.context("the places are never closed")?),
            };
            if end.is_some_and(|end| Instant::now() >= end) {
                break;
            }
            match place {
                None => outcomes.push(client::not_sent(request.prompt.len(), most)),
                Some(place) => {
                    let api = api.clone();
                    running.spawn(async move {
                        let outcome = api.complete(request).await;
                        drop(place);
                        outcome
                    });
                }
            }
            while let Some(done) = running.try_join_next() {
                outcomes.push(done.context("a client panicked")?);
            }
        }
        while let Some(done) = running.join_next().await {
            outcomes.push(done.context("a client panicked")?);
        }
        Ok(outcomes)
    }
}
