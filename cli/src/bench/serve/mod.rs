//! `overfill bench serve`: loads a running router over its OpenAI API, and reports what its clients see.

mod client;
mod load;
mod plot;
mod summary;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use client::{Api, Outcome};
use load::{Lengths, Workload};
use summary::{Limits, Summary};

use crate::router_client::ApiKey;

/// Loads a running router over its OpenAI API.
#[derive(Args)]
pub struct ServeArgs {
    /// The router's HTTP address, without /v1.
    #[arg(long, env = "OVERFILL_HTTP_URL", default_value = "http://127.0.0.1:8080")]
    http_url: String,
    /// File with the certificates (PEM) that the router's must be signed by, for an address that begins with https://.
    #[arg(long, env = "OVERFILL_TLS_CA")]
    tls_ca: Option<PathBuf>,
    /// Who asks.
    #[command(flatten)]
    key: ApiKey,
    /// Which model; may be left out where only one is served.
    #[arg(long, default_value = "")]
    model: String,
    /// Closed loop: so many requests are under way at any time, a new one begins when one ends.
    #[arg(long, default_value_t = 8, value_parser = super::count)]
    concurrency: usize,
    /// Open loop instead: requests per second, arriving at random (Poisson), however many are under way.
    #[arg(long, conflicts_with = "concurrency", value_parser = super::positive)]
    rate: Option<f64>,
    /// Open loop: an arrival that finds so many under way is not sent, and counts as failed.
    #[arg(long, default_value_t = 512, value_parser = super::count)]
    max_in_flight: usize,
    /// Requests that are measured.
    #[arg(long, default_value_t = 100, value_parser = super::count)]
    requests: usize,
    /// Send requests for so long, instead of a number of them.
    #[arg(long, conflicts_with = "requests", value_parser = super::seconds)]
    duration_seconds: Option<f64>,
    /// Requests that are sent before, one after the other, and not measured.
    #[arg(long, default_value_t = 2)]
    warm_up_requests: usize,
    /// Tokens of a prompt: N, uniform:LOW,HIGH, or lognormal:MEDIAN,P95[,MOST].
    #[arg(long, default_value_t = Lengths::Fixed(512))]
    prompt_tokens: Lengths,
    /// Tokens of an output, in the same forms.
    #[arg(long, default_value_t = Lengths::Fixed(128))]
    output_tokens: Lengths,
    /// Prompt tokens are drawn from the ids below this.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    vocabulary: u32,
    /// The same seed gives the same prompts, lengths and arrivals.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// A request that takes longer has failed.
    #[arg(long, default_value_t = 600.0, value_parser = super::seconds)]
    timeout_seconds: f64,
    /// A good request has its first token by then.
    #[arg(long, value_parser = super::seconds)]
    ttft_limit_seconds: Option<f64>,
    /// A good request has its other tokens at such distances, in the mean.
    #[arg(long, value_parser = super::seconds)]
    itl_limit_seconds: Option<f64>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Also draw TTFT, ITL and throughput into this SVG file.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

/// Runs the subcommand. An error if no request succeeded.
pub async fn run(args: ServeArgs) -> Result<()> {
    let (ca, key) = (args.tls_ca.as_deref(), args.key.authorization()?);
    let timeout = Duration::from_secs_f64(args.timeout_seconds);
    let api = Arc::new(Api::new(&args.http_url, ca, key, &args.model, timeout)?);
    let mut workload = Workload::new(args.prompt_tokens, args.output_tokens, args.vocabulary, args.seed);
    for request in workload.by_ref().take(args.warm_up_requests) {
        let outcome = api.complete(request).await;
        if let Err(failure) = outcome.result {
            bail!("the warm-up failed: {}: {}", failure.kind, failure.message);
        }
    }
    tracing::info!(warm_up_requests = args.warm_up_requests, "warm; measuring");
    let start = Instant::now();
    let outcomes = args.load(&api, workload, start).await?;
    let limits = Limits { ttft_limit_seconds: args.ttft_limit_seconds, itl_limit_seconds: args.itl_limit_seconds };
    let summary = Summary::of(&outcomes, start.elapsed(), limits);
    // One example of each kind says more than its name.
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
    if summary.succeeded == 0 {
        bail!("none of {} requests succeeded", summary.requests);
    }
    Ok(())
}

impl ServeArgs {
    /// Sends all requests and waits for their ends.
    async fn load(&self, api: &Arc<Api>, workload: Workload, start: Instant) -> Result<Vec<Outcome>> {
        let most = self.rate.map_or(self.concurrency, |_| self.max_in_flight);
        let places = Arc::new(Semaphore::new(most));
        // Not the numbers that the prompts are drawn by.
        let mut gaps = self.rate.map(|rate| load::gaps(rate, !self.seed));
        let end = self.duration_seconds.map(|seconds| start + Duration::from_secs_f64(seconds));
        let count = self.duration_seconds.map_or(self.requests, |_| super::MOST_COUNT);
        let (mut running, mut outcomes, mut arrival) = (JoinSet::new(), Vec::new(), start);
        for request in workload.take(count) {
            if let Some(gap) = gaps.as_mut().and_then(Iterator::next) {
                arrival += gap;
                sleep_until(end.map_or(arrival, |end| end.min(arrival))).await;
            }
            // In a closed loop its turn comes when one ends, which each does within its time-out.
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
