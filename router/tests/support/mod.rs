//! A router with simulated nodes, and a small HTTP client.

#![allow(dead_code, missing_docs)]

use std::{net::SocketAddr, time::Duration};

use overfill_cluster::{ConfigError, Shutdown};
use overfill_proto::v1::router_client::RouterClient;
use overfill_router::{Args, Config, Router};
use overfill_simulated::{Options, SimulatedNode};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::transport::Channel;

pub struct Rig {
    pub prefill: Vec<SimulatedNode>,
    pub decode: Vec<SimulatedNode>,
    pub http: SocketAddr,
    pub grpc: SocketAddr,
    shutdown: Shutdown,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.shutdown.begin();
    }
}

/// One node of each role.
pub async fn rig(options: Options) -> Rig {
    let options = std::slice::from_ref(&options);
    rig_with(options, options, |_| {}).await
}

pub async fn rig_with(prefill: &[Options], decode: &[Options], change: impl FnOnce(&mut Config)) -> Rig {
    let mut rig = unready_rig(prefill, decode, change).await;
    let nodes = prefill.len() + decode.len();
    let mut client = rig.client().await;
    // The router connects to its nodes in the background.
    wait_for(async || {
        let list = client.list_nodes(overfill_proto::v1::ListNodesRequest {}).await.unwrap().into_inner().nodes;
        list.iter().filter(|n| n.healthy).count() == nodes
    })
    .await;
    rig.prefill.shrink_to_fit();
    rig
}

pub async fn unready_rig(prefill: &[Options], decode: &[Options], change: impl FnOnce(&mut Config)) -> Rig {
    let (mut prefills, mut decodes) = (Vec::new(), Vec::new());
    for options in prefill {
        prefills.push(SimulatedNode::prefill(options.clone()).await.unwrap());
    }
    for options in decode {
        decodes.push(SimulatedNode::decode(options.clone()).await.unwrap());
    }
    let urls = |nodes: &[SimulatedNode]| nodes.iter().map(|n| n.url.clone()).collect();
    let mut config = Config::local(urls(&prefills), urls(&decodes));
    change(&mut config);
    let router = Router::bind(config).await.unwrap();
    let (http, grpc) = (router.http_address(), router.grpc_address());
    let shutdown = Shutdown::new();
    shutdown.spawn("router", router.run(shutdown.clone()));
    Rig { prefill: prefills, decode: decodes, http, grpc, shutdown }
}

/// The settings of a router with these flags.
pub fn flags(list: &[&str]) -> Result<Config, Vec<ConfigError>> {
    use clap::{Args as _, FromArgMatches as _};
    let urls = ["--prefill-url", "http://127.0.0.1:1", "--decode-url", "http://127.0.0.1:1"];
    let command = Args::augment_args(clap::Command::new("router"));
    let matches = command.get_matches_from([&["router"], &urls[..], list].concat());
    Args::from_arg_matches(&matches).unwrap().validate()
}

/// Polls until `condition` holds.
pub async fn wait_for(mut condition: impl AsyncFnMut() -> bool) {
    let limit = tokio::time::Instant::now() + Duration::from_secs(60);
    while !condition().await {
        assert!(tokio::time::Instant::now() < limit, "the condition did not come true");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The value of a header. Empty if there is none.
    pub fn header(&self, name: &str) -> &str {
        let start = format!("{name}: ");
        self.head.lines().find_map(|line| line.strip_prefix(&start)).unwrap_or_default()
    }

    /// The events of a stream whose events have names. Checks that each name is the event's type.
    pub fn named_events(&self) -> Vec<Value> {
        let event = |text: &str| {
            let (name, data) = text.strip_prefix("event: ").unwrap().split_once("\ndata: ").unwrap();
            let event: Value = serde_json::from_str(data).unwrap();
            assert_eq!(event["type"], name);
            event
        };
        assert!(self.body.ends_with("\n\n"), "{}", self.body);
        self.body.trim_end().split("\n\n").map(event).collect()
    }

    /// The events of a stream. Checks that the stream ends with `[DONE]`, which is not included.
    pub fn events(&self) -> Vec<Value> {
        let mut data: Vec<&str> = self.body.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{}", self.body);
        data.into_iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

impl Rig {
    pub async fn client(&self) -> RouterClient<Channel> {
        RouterClient::connect(format!("http://{}", self.grpc)).await.unwrap()
    }

    /// Sends a request and returns the connection.
    pub async fn send(&self, method: &str, path: &str, body: &str) -> TcpStream {
        self.send_with(method, path, &[("content-type", "application/json")], body.as_bytes()).await
    }

    /// Sends a request with these headers and returns the connection.
    pub async fn send_with(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> TcpStream {
        let mut connection = TcpStream::connect(self.http).await.unwrap();
        let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n"
        );
        connection.write_all(head.as_bytes()).await.unwrap();
        // The router may answer before it has read everything.
        let _ = connection.write_all(body).await;
        connection
    }

    pub async fn get(&self, path: &str) -> Answer {
        receive(self.send("GET", path, "").await).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Answer {
        receive(self.send("POST", path, &body.to_string()).await).await
    }

    pub async fn complete(&self, body: Value) -> Answer {
        self.post("/v1/completions", body).await
    }

    pub fn active(&self) -> usize {
        self.prefill.iter().chain(&self.decode).map(SimulatedNode::active).sum()
    }

    /// The value of one series of /metrics, or the sum of all series with this name. 0 if there is none.
    pub async fn metric(&self, series: &str) -> f64 {
        self.find_metric(series).await.unwrap_or(0.0)
    }

    /// As [`metric`](Self::metric). `None` if there is no such series.
    pub async fn find_metric(&self, series: &str) -> Option<f64> {
        let text = self.get("/metrics").await.body;
        let values = text.lines().filter_map(|line| {
            let rest = line.strip_prefix(series)?;
            rest.starts_with([' ', '{']).then(|| rest.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
        });
        values.reduce(|sum, value| sum + value)
    }
}

pub async fn receive(mut connection: TcpStream) -> Answer {
    let mut bytes = Vec::new();
    connection.read_to_end(&mut bytes).await.unwrap();
    let split = bytes.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
    let head = String::from_utf8(bytes[..split].to_vec()).unwrap().to_lowercase();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let mut rest = &bytes[split + 4..];
    let mut body = Vec::new();
    if head.contains("transfer-encoding: chunked") {
        loop {
            let end = rest.windows(2).position(|w| w == b"\r\n").expect("a whole chunked body");
            let size = usize::from_str_radix(std::str::from_utf8(&rest[..end]).unwrap(), 16).unwrap();
            if size == 0 {
                break;
            }
            body.extend_from_slice(&rest[end + 2..end + 2 + size]);
            rest = &rest[end + 4 + size..];
        }
    } else {
        body.extend_from_slice(rest);
    }
    Answer { status, head, body: String::from_utf8(body).unwrap() }
}
