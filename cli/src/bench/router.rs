//! The latency that the router adds: the same requests to the same nodes, with and without the router.
//!
//! The nodes are simulated and answer at once, so that only the forwarding is measured.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use overfill_cluster::Shutdown;
use overfill_proto::v1::{self, generate_event, generate_request, router_client::RouterClient};
use overfill_router::{Config, Router};
use overfill_simulated::{Options, SimulatedNode};
use tonic::transport::Channel;

use super::nodes::Direct;
use super::report::{Report, median};
use crate::router_client::channel;

/// Tokens of a short and of a long answer. Their difference gives the cost per token, and the rest the cost per request.
const SHORT: u32 = 2;
const LONG: u32 = 258;
/// Requests per run.
const REQUESTS: usize = 100;

/// Alternates direct and routed requests, so that both run under the same load on the machine.
pub async fn measure(runs: usize, report: &mut Report) -> Result<()> {
    let prefill = SimulatedNode::prefill(Options::default()).await?;
    let decode = SimulatedNode::decode(Options::default()).await?;
    let router = Router::bind(Config::local(vec![prefill.url.clone()], vec![decode.url.clone()])).await?;
    let url = format!("http://{}", router.grpc_address());
    let shutdown = Shutdown::new();
    let running = tokio::spawn(router.run(shutdown.clone()));

    let mut direct = Direct::connect(&prefill.url, &decode.url).await?;
    let mut routed = RouterClient::new(channel(&url).await?);
    wait_until_served(&mut routed, 1).await?;
    let mut times = [Vec::new(), Vec::new(), Vec::new(), Vec::new()];
    for _ in 0..runs.max(1) * REQUESTS {
        for (i, tokens) in [SHORT, LONG].into_iter().enumerate() {
            let start = Instant::now();
            direct.generate(&prompt(), tokens).await?;
            times[2 * i].push(start.elapsed().as_secs_f64());
            let start = Instant::now();
            generate(&mut routed, tokens).await?;
            times[2 * i + 1].push(start.elapsed().as_secs_f64());
        }
    }
    let [direct_short, routed_short, direct_long, routed_long] = times.map(median);
    let request = routed_short - direct_short;
    let token = (routed_long - direct_long - request) / f64::from(LONG - SHORT);
    let note = |direct: f64, routed: f64, tokens: u32| {
        format!("{tokens} tokens: {:.0} us direct, {:.0} us through the router", direct * 1e6, routed * 1e6)
    };
    report.add("router, per request", request * 1e6, "us", note(direct_short, routed_short, SHORT));
    report.add("router, per token", token * 1e6, "us", note(direct_long, routed_long, LONG));
    shutdown.begin();
    running.await.context("the router panicked")??;
    Ok(())
}

fn prompt() -> Vec<u32> {
    (0..64).map(|i| 3 + i % 250).collect()
}

/// Waits until the router has connected to the nodes of `models` models.
pub async fn wait_until_served(router: &mut RouterClient<Channel>, models: usize) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while router.list_models(v1::ListModelsRequest {}).await?.into_inner().models.len() < models {
        if Instant::now() >= deadline {
            bail!("the router did not find its nodes within 10 s");
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

async fn generate(router: &mut RouterClient<Channel>, max_tokens: u32) -> Result<()> {
    let request = v1::GenerateRequest {
        prompt: Some(generate_request::Prompt::TokenIds(v1::TokenIds { ids: prompt() })),
        sampling: Some(super::nodes::greedy()),
        max_tokens,
        ignore_eos: true,
        ..Default::default()
    };
    let mut events = router.generate(request).await?.into_inner();
    while let Some(event) = events.message().await? {
        if let Some(generate_event::Event::Finished(finished)) = event.event {
            if finished.completion_tokens != max_tokens {
                bail!("{} tokens instead of {max_tokens}", finished.completion_tokens);
            }
            return Ok(());
        }
    }
    bail!("the router ended the stream early")
}
