//! The time that a KV handoff adds to a prefill between two real nodes.

use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser};
use overfill_cluster::Shutdown;
use overfill_decode_node::DecodeNode;
use overfill_prefill_node::PrefillNode;
use overfill_proto::v1::{
    self, decode_client::DecodeClient, decode_event, prefill_client::PrefillClient, prefill_event,
};
use tonic::Streaming;
use tonic::transport::Channel;

use super::models::{ModelArgs, Models};
use super::report::{Report, median};
use crate::router_client::channel;

/// Parses a prefill node's arguments, so that all other settings get their defaults.
#[derive(Parser)]
pub struct PrefillLine {
    /// The arguments.
    #[command(flatten)]
    pub args: overfill_prefill_node::Args,
}

/// Parses a decode node's arguments.
#[derive(Parser)]
pub struct DecodeLine {
    /// The arguments.
    #[command(flatten)]
    pub args: overfill_decode_node::Args,
}

/// Size of the prefill whose KV is handed over.
#[derive(Args)]
#[command(next_help_heading = "Sizes")]
pub struct OverlapSize {
    /// Prompt length for the overlap measurement.
    #[arg(long, default_value_t = 2048, value_parser = super::count, value_name = "TOKENS")]
    prompt_tokens: usize,
}

/// One request's figures.
pub struct Outcome {
    /// Prefill time as the prefill node measured it.
    pub prefill_seconds: f64,
    /// As the prefill node measured it; zero from simulated nodes.
    pub transfer: v1::TransferStats,
}

/// A minimal client that drives both nodes as a router does.
pub struct Direct {
    prefill: PrefillClient<Channel>,
    decode: DecodeClient<Channel>,
}

/// Greedy sampling.
pub fn greedy() -> v1::SamplingParams {
    v1::SamplingParams { top_p: 1.0, repetition_penalty: 1.0, ..Default::default() }
}

impl Direct {
    /// Connects to one node of each role.
    pub async fn connect(prefill: &str, decode: &str) -> Result<Self> {
        Ok(Self {
            prefill: PrefillClient::new(channel(prefill).await?),
            decode: DecodeClient::new(channel(decode).await?),
        })
    }

    /// Runs one request from the reservation to the last token.
    pub async fn generate(&mut self, prompt: &[u32], max_tokens: u32) -> Result<Outcome> {
        let request = v1::DecodeRequest {
            request_id: "bench".into(),
            prompt_tokens: prompt.to_vec(),
            sampling: Some(greedy()),
            max_tokens,
            deadline_seconds: 600.0,
            ..Default::default()
        };
        let mut decode = self.decode.decode(request).await?.into_inner();
        let Some(decode_event::Event::Reserved(reserved)) = next(&mut decode).await? else {
            bail!("the decode node did not begin with a reservation");
        };
        let request = v1::PrefillRequest {
            request_id: "bench".into(),
            prompt_tokens: prompt.to_vec(),
            sampling: Some(greedy()),
            handoff: Some(v1::HandoffTarget {
                ticket: reserved.ticket,
                kv_endpoint: reserved.kv_endpoint,
                kv_schema: reserved.kv_schema,
                held_tokens: reserved.held_tokens,
            }),
            deadline_seconds: 600.0,
            ..Default::default()
        };
        let mut prefill = self.prefill.prefill(request).await?.into_inner();
        // Both streams are read concurrently, so that no token waits for the other stream.
        let (outcome, ()) = tokio::try_join!(prefilled(&mut prefill), decoded(&mut decode))?;
        Ok(outcome)
    }
}

async fn prefilled(events: &mut Streaming<v1::PrefillEvent>) -> Result<Outcome> {
    let mut outcome = Outcome { prefill_seconds: f64::NAN, transfer: v1::TransferStats::default() };
    while let Some(event) = events.message().await? {
        match event.event {
            Some(prefill_event::Event::FirstToken(first)) => outcome.prefill_seconds = first.prefill_seconds,
            Some(prefill_event::Event::Transferred(stats)) => outcome.transfer = stats,
            _ => {}
        }
    }
    Ok(outcome)
}

async fn decoded(events: &mut Streaming<v1::DecodeEvent>) -> Result<()> {
    loop {
        match next(events).await? {
            Some(decode_event::Event::Finished(_)) => return Ok(()),
            Some(_) => {}
            None => bail!("the decode node ended the stream early"),
        }
    }
}

async fn next(events: &mut Streaming<v1::DecodeEvent>) -> Result<Option<decode_event::Event>> {
    Ok(events.message().await?.and_then(|event| event.event))
}

/// Measures the time that a handoff adds to the prefill of a long prompt, between two nodes in this process. The nodes run
/// the first two of `models`; a single model runs on both.
pub async fn measure(
    models: &Models,
    args: &ModelArgs,
    size: &OverlapSize,
    runs: usize,
    report: &mut Report,
) -> Result<()> {
    let (_, full) = models.list.first().context("no model")?;
    let (_, decode) = models.list.get(1).or(models.list.first()).context("no model")?;
    let line = |model: &Path| -> Result<Vec<String>> {
        let model = model.to_str().context("the model's path is not UTF-8")?;
        let (device, weights, kv) = (args.device.to_string(), args.weights.to_string(), args.kv_dtype.to_string());
        let pool = (4 * (size.prompt_tokens + 64)).to_string();
        let line = ["node", "--model", model, "--device", &device, "--weights", &weights, "--kv-dtype", &kv];
        Ok(line.into_iter().chain(["--kv-pool-tokens", &pool]).map(str::to_owned).collect())
    };
    let config = PrefillLine::try_parse_from(line(full)?)?.args.validate().map_err(first_fault)?;
    let prefill = PrefillNode::bind(config).await?;
    let config = DecodeLine::try_parse_from(line(decode)?)?.args.validate().map_err(first_fault)?;
    let decode = DecodeNode::bind(config).await?;
    let urls = [prefill.ready_line().grpc, decode.ready_line().grpc].map(|address| format!("http://{address}"));
    let shutdown = Shutdown::new();
    let prefill = tokio::spawn(prefill.run(shutdown.clone()));
    let decode = tokio::spawn(decode.run(shutdown.clone()));

    let mut direct = Direct::connect(&urls[0], &urls[1]).await?;
    let mut outcomes = Vec::new();
    for run in 0..=runs {
        // Each run has a different prompt, so that nothing comes from a prefix cache.
        let prompt: Vec<u32> = (0..size.prompt_tokens).map(|i| 1 + (i * 13 + run * 101) as u32 % 199).collect();
        let outcome = direct.generate(&prompt, 2).await?;
        // The first run warms up memory and connections.
        if run > 0 {
            outcomes.push(outcome);
        }
    }
    let of = |value: fn(&Outcome) -> f64| median(outcomes.iter().map(value).collect());
    let prefill_seconds = of(|o| o.prefill_seconds);
    let exposed = of(|o| o.transfer.exposed_seconds);
    let bytes = of(|o| o.transfer.bytes as f64);
    report.add("prefill with handoff", prefill_seconds, "s", format!("{} tokens", size.prompt_tokens));
    report.add("KV handed over", bytes / f64::from(1 << 20), "MiB", "");
    report.add("handoff, not hidden", exposed * 1e3, "ms", "time after the last layer was computed");
    report.add("handoff, share of prefill", 100.0 * exposed / prefill_seconds, "%", "");
    shutdown.begin();
    prefill.await.context("the prefill node panicked")??;
    decode.await.context("the decode node panicked")??;
    Ok(())
}

/// The first of the faults of a node's settings.
pub fn first_fault(faults: Vec<overfill_cluster::ConfigError>) -> anyhow::Error {
    faults.into_iter().next().map_or_else(|| anyhow::anyhow!("unusable settings"), Into::into)
}
