//! A whole cluster in this process: a router, a prefill node with the full model, and two decode nodes. One has the full
//! model itself, the other one the pruned model.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use futures::future::try_join_all;
use overfill_cluster::Shutdown;
use overfill_decode_node::DecodeNode;
use overfill_kv::{BLOCK_TOKENS, Mode};
use overfill_node::LoadState;
use overfill_prefill_node::PrefillNode;
use overfill_proto::v1::{self, generate_event, generate_request, router_client::RouterClient};
use overfill_router::{Config, Router};
use tokio::task::JoinSet;
use tonic::transport::Channel;

use super::forced::{Agreement, Forced};
use crate::bench::{
    models::{ModelArgs, Models},
    nodes::{DecodeLine, PrefillLine, first_fault, greedy},
    router::wait_until_served,
};
use crate::router_client::channel;

/// Deadline of a request.
const DEADLINE: Duration = Duration::from_secs(600);

/// The model of a decode node, and its name in requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoder {
    /// The full model. With mode draft, this is ordinary disaggregated serving.
    Full,
    /// The pruned model.
    Pruned,
}

impl Decoder {
    fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Pruned => "pruned",
        }
    }
}

/// A running cluster.
pub struct Cluster {
    router: RouterClient<Channel>,
    prefill: Arc<LoadState>,
    /// Of the full model and of the pruned model.
    decode: [Arc<LoadState>; 2],
    agreement: Arc<Agreement>,
    shutdown: Shutdown,
    services: JoinSet<Result<()>>,
}

/// Counts of a cluster so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counts {
    /// Forward passes of the full model, on both nodes that have it.
    pub full_passes: u64,
    /// Forward passes of the pruned model.
    pub pruned_passes: u64,
    /// Verdicts on drafts of the pruned model.
    pub verdicts: u64,
    /// Drafts in them.
    pub drafted_tokens: u64,
    /// Drafts that stand.
    pub accepted_tokens: u64,
}

impl Counts {
    /// What has been counted since `earlier`.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            full_passes: self.full_passes - earlier.full_passes,
            pruned_passes: self.pruned_passes - earlier.pruned_passes,
            verdicts: self.verdicts - earlier.verdicts,
            drafted_tokens: self.drafted_tokens - earlier.drafted_tokens,
            accepted_tokens: self.accepted_tokens - earlier.accepted_tokens,
        }
    }
}

impl Cluster {
    /// Starts a cluster for up to `sequences` sequences of `tokens` tokens each. The first of `models` is the full model, the
    /// second one the pruned model.
    pub async fn start(models: &Models, args: &ModelArgs, sequences: usize, tokens: usize) -> Result<Self> {
        let [(_, full), (_, pruned)] = models.list.as_slice() else {
            bail!("two models are needed, the full one and its pruned one; there are {}", models.list.len());
        };
        // Twice what all sequences need: half of a prefill node's KV is for prefills that stay open, and all of it holds the
        // prompts of earlier requests too.
        let pool_tokens = 4 * sequences * (tokens + 2 * BLOCK_TOKENS);
        let line = |model: &Path, name: &str| -> Result<Vec<String>> {
            let model = model.to_str().context("the model's path is not UTF-8")?;
            let settings = [
                ("--model", model.to_owned()),
                ("--served-model-name", name.to_owned()),
                ("--device", args.device.to_string()),
                ("--weights", args.weights.to_string()),
                ("--kv-dtype", args.kv_dtype.to_string()),
                ("--kv-pool-tokens", pool_tokens.to_string()),
                ("--max-running", sequences.to_string()),
            ];
            let flags = settings.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]);
            Ok(std::iter::once("node".to_owned()).chain(flags).collect())
        };
        let config = PrefillLine::try_parse_from(line(full, "full")?)?.args.validate().map_err(first_fault)?;
        let prefill = PrefillNode::bind(config).await?;
        let mut decode_nodes = Vec::new();
        for (model, decoder) in [(full, Decoder::Full), (pruned, Decoder::Pruned)] {
            let line = line(model, decoder.name())?;
            let config = DecodeLine::try_parse_from(line)?.args.validate().map_err(first_fault)?;
            decode_nodes.push(DecodeNode::bind(config).await?);
        }
        let [of_full, of_pruned] =
            <[DecodeNode; 2]>::try_from(decode_nodes).map_err(|_| anyhow::anyhow!("not two decode nodes"))?;
        let url = |line: overfill_cluster::ReadyLine| format!("http://{}", line.grpc);
        let decode_urls = vec![url(of_full.ready_line()), url(of_pruned.ready_line())];
        let router = Router::bind(Config::local(vec![url(prefill.ready_line())], decode_urls)).await?;
        let router_url = format!("http://{}", router.grpc_address());

        let (shutdown, agreement) = (Shutdown::new(), Arc::new(Agreement::default()));
        let (prefill_load, decode) = (prefill.load(), [of_full.load(), of_pruned.load()]);
        let mut services = JoinSet::new();
        let [one, two, three, four] = std::array::from_fn(|_| shutdown.clone());
        let forced = agreement.clone();
        services.spawn(async move { Ok(prefill.run(one).await?) });
        services.spawn(async move { Ok(of_full.run(two).await?) });
        services.spawn(async move {
            let wrap = |inner| Forced { inner, agreement: forced };
            Ok(of_pruned.run_with(three, wrap).await?)
        });
        services.spawn(async move { Ok(router.run(four).await?) });
        let mut router = RouterClient::new(channel(&router_url).await?);
        wait_until_served(&mut router, 2).await?;
        Ok(Self { router, prefill: prefill_load, decode, agreement, shutdown, services })
    }

    /// What the pruned model is made to agree with.
    pub fn agreement(&self) -> &Agreement {
        &self.agreement
    }

    /// The counts so far, once nothing runs. A node may notice the end of a request later than its client.
    ///
    /// # Errors
    /// A node does not come to rest.
    pub async fn counts(&self) -> Result<Counts> {
        let loads = || self.decode.iter().chain([&self.prefill]);
        let is_running = |load: &Arc<LoadState>| load.metrics().requests_running.get() > 0;
        let deadline = Instant::now() + DEADLINE;
        while loads().any(|load| {
            load.refresh_metrics();
            is_running(load)
        }) {
            ensure!(Instant::now() < deadline, "the nodes do not come to rest");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(self.counted())
    }

    fn counted(&self) -> Counts {
        let passes = |load: &LoadState| load.metrics().step_seconds.get_sample_count();
        let [full, pruned] = &self.decode;
        let metrics = pruned.metrics();
        Counts {
            full_passes: passes(&self.prefill) + passes(full),
            pruned_passes: passes(pruned),
            verdicts: metrics.drafts.get(),
            drafted_tokens: metrics.draft_tokens.get(),
            accepted_tokens: metrics.accepted_tokens.get(),
        }
    }

    /// Sends a request for each prompt, all at once. Returns the answers, of `tokens` tokens each.
    pub async fn answer(
        &self,
        decoder: Decoder,
        mode: Mode,
        prompts: &[Vec<u32>],
        tokens: usize,
    ) -> Result<Vec<Vec<u32>>> {
        let mode = match mode {
            Mode::Draft => v1::Mode::Draft,
            Mode::Refresh => v1::Mode::Refresh,
            Mode::Exact => v1::Mode::Exact,
        };
        let request = |prompt: &Vec<u32>| v1::GenerateRequest {
            model: decoder.name().into(),
            prompt: Some(generate_request::Prompt::TokenIds(v1::TokenIds { ids: prompt.clone() })),
            sampling: Some(greedy()),
            max_tokens: tokens as u32,
            ignore_eos: true,
            deadline_seconds: DEADLINE.as_secs_f64(),
            mode: mode.into(),
            ..Default::default()
        };
        let answers = prompts.iter().map(|prompt| answer(self.router.clone(), request(prompt)));
        let answers = try_join_all(answers).await?;
        for answer in &answers {
            ensure!(answer.len() == tokens, "an answer has {} tokens instead of {tokens}", answer.len());
        }
        Ok(answers)
    }

    /// Ends all services.
    pub async fn end(mut self) -> Result<()> {
        drop(self.router);
        self.shutdown.begin();
        while let Some(ended) = self.services.join_next().await {
            ended.context("a service panicked")??;
        }
        Ok(())
    }
}

async fn answer(mut router: RouterClient<Channel>, request: v1::GenerateRequest) -> Result<Vec<u32>> {
    let mut events = router.generate(request).await?.into_inner();
    let mut tokens = Vec::new();
    while let Some(event) = events.message().await? {
        match event.event {
            Some(generate_event::Event::Token(token)) => tokens.extend(token.token.map(|token| token.token)),
            Some(generate_event::Event::Finished(_)) => return Ok(tokens),
            _ => {}
        }
    }
    bail!("the router ended the stream early")
}
