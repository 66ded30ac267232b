//! A prefill node and a decode node in this process, driven as by a router.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use overfill_cluster::Shutdown;
use overfill_decode_node::DecodeNode;
use overfill_kv::{BlockPool, SamplingParams};
use overfill_model::{LoadOptions, Rows};
use overfill_node::{LoadState, NodeConfig, TransportConfig};
use overfill_prefill_node::PrefillNode;
use overfill_proto::v1::{
    self, decode_client::DecodeClient, decode_event::Event as Decoded, node_client::NodeClient,
    prefill_client::PrefillClient, prefill_event::Event as Prefilled,
};
use overfill_tests::{golden::folder, wait::PATIENCE};
use tokio::{task::JoinHandle, time::timeout};
use tonic::{Streaming, transport::Channel};

/// Settings of the nodes.
#[derive(Clone, Debug)]
pub struct Sizes {
    pub prefill_blocks: usize,
    pub decode_blocks: usize,
    pub max_batch_tokens: usize,
    pub max_running: usize,
    pub max_waiting: usize,
    pub step_timeout: Duration,
    /// Decode node's model: `decode`, or `full` for the full model on both nodes.
    pub decoder: &'static str,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            prefill_blocks: 256,
            decode_blocks: 256,
            max_batch_tokens: 64,
            max_running: 32,
            max_waiting: 64,
            step_timeout: PATIENCE,
            decoder: "decode",
        }
    }
}

/// A prefill node and a decode node.
pub struct Pair {
    pub prefill: PrefillClient<Channel>,
    pub decode: DecodeClient<Channel>,
    pub decode_node: NodeClient<Channel>,
    pub prefill_load: Arc<LoadState>,
    pub decode_load: Arc<LoadState>,
    pub prefill_pool: BlockPool,
    pub decode_pool: BlockPool,
    pub producer: String,
    /// Address of the decode node's admin port.
    pub decode_admin: String,
    shutdown: Shutdown,
    nodes: Vec<JoinHandle<Result<()>>>,
}

/// A request to both nodes.
#[derive(Clone, Debug)]
pub struct Ask {
    pub prompt: Vec<u32>,
    pub max_tokens: u32,
    pub sampling: SamplingParams,
    pub stop: Vec<u32>,
    /// Number of tokens at the end of the prompt that are earlier output.
    pub generated: u32,
}

impl Ask {
    pub fn greedy(prompt: &[u32], max_tokens: u32) -> Self {
        Self { prompt: prompt.to_vec(), max_tokens, sampling: SamplingParams::greedy(), stop: Vec::new(), generated: 0 }
    }
}

/// Result of a request.
#[derive(Clone, Debug)]
pub struct Answer {
    pub tokens: Vec<u32>,
    /// Log-probabilities of the tokens, if requested.
    pub logprobs: Vec<f32>,
    pub finish: v1::FinishReason,
    pub cached_tokens: u32,
    pub held_tokens: u32,
    pub transferred_bytes: u64,
}

fn node_config(pair: &str, model: &str, kv_blocks: usize, rows: Rows, sizes: &Sizes) -> Result<NodeConfig> {
    let any = "127.0.0.1:0".parse()?;
    Ok(NodeConfig {
        model: folder(pair, model).into(),
        served_model_name: None,
        variants: Vec::new(),
        node_id: None,
        pool: None,
        cluster: String::new(),
        load: LoadOptions { rows, ..LoadOptions::default() },
        kv_blocks,
        listen: any,
        admin: any,
        advertise_grpc: None,
        advertise_host: None,
        max_waiting: sizes.max_waiting,
        default_deadline: PATIENCE,
        drain_timeout: PATIENCE,
        step_timeout: sizes.step_timeout,
        transport: TransportConfig::default(),
        tls: None,
        etcd: None,
    })
}

impl Pair {
    /// Starts both nodes over a golden pair.
    pub async fn start(name: &str, sizes: Sizes) -> Result<Self> {
        let prefill = PrefillNode::bind(overfill_prefill_node::Config {
            node: node_config(name, "full", sizes.prefill_blocks, Rows::Many, &sizes)?,
            max_batch_tokens: sizes.max_batch_tokens,
            step_target: Duration::from_secs(1),
            max_running: sizes.max_running,
            open_kv_share: 0.5,
            open_idle: PATIENCE,
        })
        .await?;
        let decode = DecodeNode::bind(overfill_decode_node::Config {
            node: node_config(name, sizes.decoder, sizes.decode_blocks, Rows::Few, &sizes)?,
            kv_listen: "127.0.0.1:0".parse()?,
            advertise_kv: None,
            max_running: sizes.max_running,
        })
        .await?;
        let shutdown = Shutdown::new();
        let (prefill_at, decode_at) = (prefill.ready_line().grpc, decode.ready_line().grpc);
        let decode_admin = decode.ready_line().admin.context("admin")?.to_string();
        let (prefill_load, decode_load) = (prefill.load(), decode.load());
        let (prefill_pool, decode_pool) = (prefill.pool(), decode.pool());
        let (first, second) = (shutdown.clone(), shutdown.clone());
        let nodes = vec![
            tokio::spawn(async move { Ok(Box::pin(prefill.run(first)).await?) }),
            tokio::spawn(async move { Ok(Box::pin(decode.run(second)).await?) }),
        ];
        let mut node = NodeClient::connect(format!("http://{prefill_at}")).await?;
        let prefill = PrefillClient::connect(format!("http://{prefill_at}")).await?;
        let decode = DecodeClient::connect(format!("http://{decode_at}")).await?;
        let decode_node = NodeClient::connect(format!("http://{decode_at}")).await?;
        let info = node.describe(v1::DescribeRequest {}).await?.into_inner().info.context("info")?;
        let producer = info.kv_schema.context("schema")?.full_model;
        Ok(Self {
            prefill,
            decode,
            decode_node,
            prefill_load,
            decode_load,
            prefill_pool,
            decode_pool,
            producer,
            decode_admin,
            shutdown,
            nodes,
        })
    }

    pub fn decode_request(&self, ask: &Ask) -> v1::DecodeRequest {
        v1::DecodeRequest {
            request_id: "test".into(),
            prompt_tokens: ask.prompt.clone(),
            sampling: Some((&ask.sampling).into()),
            max_tokens: ask.max_tokens,
            stop_token_ids: ask.stop.clone(),
            deadline_seconds: 0.0,
            generated_tokens: ask.generated,
            producer: self.producer.clone(),
            incarnation: String::new(),
            mode: v1::Mode::Draft.into(),
            model: String::new(),
        }
    }

    pub fn prefill_request(&self, ask: &Ask, reserved: Option<v1::Reserved>) -> v1::PrefillRequest {
        v1::PrefillRequest {
            request_id: "test".into(),
            prompt_tokens: ask.prompt.clone(),
            sampling: Some((&ask.sampling).into()),
            handoff: reserved.map(|reserved| v1::HandoffTarget {
                ticket: reserved.ticket,
                kv_endpoint: reserved.kv_endpoint,
                kv_schema: reserved.kv_schema,
                held_tokens: reserved.held_tokens,
            }),
            prompt_logprobs: false,
            deadline_seconds: 0.0,
            generated_tokens: ask.generated,
            incarnation: String::new(),
            lease: Vec::new(),
        }
    }

    /// Starts a request on the decode node and waits for its reservation.
    pub async fn reserve(&self, ask: &Ask) -> Result<(Streaming<v1::DecodeEvent>, v1::Reserved)> {
        let mut stream = self.decode.clone().decode(self.decode_request(ask)).await?.into_inner();
        match next_decoded(&mut stream).await? {
            Decoded::Reserved(reserved) => Ok((stream, reserved)),
            other => bail!("{other:?} instead of a reservation"),
        }
    }

    /// Runs a request to its end.
    pub async fn run(&self, ask: &Ask) -> Result<Answer> {
        let (mut decoding, reserved) = self.reserve(ask).await?;
        let held_tokens = reserved.held_tokens;
        let request = self.prefill_request(ask, Some(reserved));
        let mut prefilling = self.prefill.clone().prefill(request).await?.into_inner();
        let Prefilled::Started(started) = next_prefilled(&mut prefilling).await? else { bail!("not started") };
        let Prefilled::FirstToken(first) = next_prefilled(&mut prefilling).await? else { bail!("no first token") };
        let Prefilled::Transferred(sent) = next_prefilled(&mut prefilling).await? else { bail!("not transferred") };
        ensure!(timeout(PATIENCE, prefilling.message()).await??.is_none(), "an event after the last");
        let Decoded::Ready(ready) = next_decoded(&mut decoding).await? else { bail!("not ready") };
        let received = ready.transfer.context("stats")?;
        ensure!(received.bytes == sent.bytes, "{} bytes sent, {} received", sent.bytes, received.bytes);
        let mut tokens = vec![first.token.context("token")?];
        let finish = loop {
            match next_decoded(&mut decoding).await? {
                Decoded::Token(token) => tokens.push(token),
                Decoded::Finished(finished) => break finished.reason(),
                other => bail!("{other:?} among the tokens"),
            }
        };
        let (cached_tokens, transferred_bytes) = (started.cached_tokens, sent.bytes);
        let logprobs = tokens.iter().map(|token| token.logprob).collect();
        let tokens = tokens.iter().map(|token| token.token).collect();
        Ok(Answer { tokens, logprobs, finish, cached_tokens, held_tokens, transferred_bytes })
    }

    /// Waits until both nodes hold no resources for requests.
    pub async fn wait_idle(&self) -> Result<()> {
        let idle = async {
            loop {
                let (p, d) = (self.prefill_load.load(), self.decode_load.load());
                let blocks = self.prefill_pool.in_use() + self.decode_pool.in_use();
                let counted = p.running + p.waiting + p.open_handoffs + d.running + d.waiting + d.open_handoffs;
                if blocks + counted == 0 && p.queued_tokens + p.stranded_bytes + d.stranded_bytes == 0 {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        if timeout(PATIENCE, idle).await.is_err() {
            let (p, d) = (self.prefill_load.load(), self.decode_load.load());
            let (pb, db) = (self.prefill_pool.in_use(), self.decode_pool.in_use());
            bail!("not idle: prefill {p:?} with {pb} blocks, decode {d:?} with {db} blocks");
        }
        Ok(())
    }

    /// Starts the shutdown of both nodes.
    pub fn begin_shutdown(&self) {
        self.shutdown.begin();
    }

    /// Shuts both nodes down and waits for their successful end.
    pub async fn end(self) -> Result<()> {
        self.shutdown.begin();
        drop((self.prefill, self.decode));
        for node in self.nodes {
            timeout(PATIENCE, node).await.context("a node does not end")???;
        }
        Ok(())
    }
}

pub async fn next_decoded(stream: &mut Streaming<v1::DecodeEvent>) -> Result<Decoded> {
    let event = timeout(PATIENCE, stream.message()).await.context("waiting for the decode node")??;
    event.and_then(|event| event.event).context("the decode stream has ended")
}

pub async fn next_prefilled(stream: &mut Streaming<v1::PrefillEvent>) -> Result<Prefilled> {
    let event = timeout(PATIENCE, stream.message()).await.context("waiting for the prefill node")??;
    event.and_then(|event| event.event).context("the prefill stream has ended")
}
