//! Joins a node: connects to it, gets and checks its description, and subscribes to its load reports.

use std::{
    collections::HashMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use overfill_cluster::{
    discovery::Registration,
    net::{self, Dialer},
};
use overfill_kv::{KvSchema, PROTOCOL, ProtocolMismatch, Role};
use overfill_proto::{InvalidField, MAX_MESSAGE_BYTES, v1};
use overfill_text::{TextFiles, TextModel};
use parking_lot::Mutex;
use tokio::time::timeout;
use tokio_stream::StreamExt as _;
use tonic::transport::{Channel, Endpoint};

use crate::node::{Node, NodeInfo, NodeLoad, NodeState};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const DESCRIBE_TIMEOUT: Duration = Duration::from_secs(10);
/// Tokenizers of at least this size are parsed on a blocking thread, in order not to stall async tasks.
const LARGE_TOKENIZER_BYTES: usize = 64 << 10;

/// Why a node is not used.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The connection failed.
    #[error("{0}")]
    Transport(#[from] tonic::transport::Error),
    /// The node returned an error, or its connection broke.
    #[error("{}: {}", .0.code(), .0.message())]
    Status(#[from] Box<tonic::Status>),
    /// The node did not answer in time.
    #[error("no answer within {} s", .0.as_secs_f64())]
    Timeout(Duration),
    /// A field of the node's description is invalid.
    #[error("{0}")]
    Field(#[from] InvalidField),
    /// The node's text files can't be used.
    #[error("{0}")]
    Text(#[from] overfill_text::TextError),
    /// The node's tokenizer is not the one that its schema names.
    #[error("kv_schema.tokenizer_sha256 is {schema}, but tokenizer.json's is {file}")]
    Tokenizer {
        /// The hash in the schema.
        schema: String,
        /// The hash of the file.
        file: String,
    },
    /// The node and this router speak no common version of the protocol.
    #[error("{0} (this router's, the node's)")]
    Protocol(#[from] ProtocolMismatch),
    /// The node ended its load reports without a reason.
    #[error("the node ended its load reports")]
    Ended,
    /// The node is draining: it takes no new requests.
    #[error("the node is draining")]
    Draining,
    /// The node's engine makes no progress.
    #[error("the node's engine makes no progress")]
    Stalled,
    /// Another process is registered at the node's address.
    #[error("the node has restarted")]
    Restarted,
}

impl JoinError {
    /// The state of a node that is not used for this reason.
    pub fn state(&self) -> NodeState {
        match self {
            Self::Transport(_) | Self::Status(_) | Self::Timeout(_) | Self::Ended | Self::Restarted => NodeState::Down,
            Self::Field(_) | Self::Text(_) | Self::Tokenizer { .. } | Self::Protocol(_) => NodeState::Incompatible,
            Self::Draining => NodeState::Draining,
            Self::Stalled => NodeState::Stalled,
        }
    }
}

impl From<tonic::Status> for JoinError {
    fn from(status: tonic::Status) -> Self {
        Self::Status(Box::new(status))
    }
}

/// The stream of a node's load reports.
pub struct Reports(tonic::Streaming<v1::NodeLoad>);

impl Reports {
    /// The next report. `None` if the node has ended the stream. Cancel safe.
    pub async fn next(&mut self) -> Result<Option<NodeLoad>, JoinError> {
        Ok(self.0.message().await?.map(NodeLoad::from))
    }
}

/// Connects to addresses and creates nodes.
pub struct Joiner {
    /// Time without an answer to pings after which a connection is closed.
    node_timeout: Duration,
    dialer: Dialer,
    /// The router's cluster. Nodes of other clusters are not used.
    cluster: String,
    /// Text models in use, by the hash of their files. Nodes with the same files share one.
    texts: Mutex<HashMap<[u8; 32], Weak<TextModel>>>,
    next_key: AtomicU64,
}

impl Joiner {
    /// `node_timeout`: time without an answer to pings after which the connection to a node is closed. `cluster`: name
    /// of the router's cluster; nodes of other clusters are refused.
    pub fn new(node_timeout: Duration, dialer: Dialer, cluster: String) -> Self {
        Self { node_timeout, dialer, cluster, texts: Mutex::default(), next_key: AtomicU64::new(0) }
    }

    /// Joins the node at `url`. If `listed` is given, the node must be the registered process.
    pub async fn join(
        &self,
        url: &str,
        role: Role,
        listed: Option<&Registration>,
    ) -> Result<(Arc<Node>, Reports), JoinError> {
        let configure = |endpoint: Endpoint| {
            endpoint
                .connect_timeout(CONNECT_TIMEOUT)
                // A frozen process keeps its sockets open. Only missing ping answers reveal it and end its streams.
                .http2_keep_alive_interval(self.node_timeout / 3)
                .keep_alive_timeout(self.node_timeout * 2 / 3)
                .keep_alive_while_idle(true)
        };
        let channel = net::channel(&self.dialer, url, configure).await?;
        let limit = JoinError::Timeout(DESCRIBE_TIMEOUT);
        timeout(DESCRIBE_TIMEOUT, self.describe(url, role, listed, channel)).await.map_err(|_| limit)?
    }

    async fn describe(
        &self,
        url: &str,
        role: Role,
        listed: Option<&Registration>,
        channel: Channel,
    ) -> Result<(Arc<Node>, Reports), JoinError> {
        let mut client = v1::node_client::NodeClient::new(channel.clone());
        let described = client.describe(v1::DescribeRequest {}).await?;
        let v1::DescribeResponse { info, load } = described.into_inner();
        let info = info.ok_or_else(|| InvalidField::new("info", "present", "nothing"))?;
        // Checked first: nothing else that a node of another protocol version says can be relied on.
        PROTOCOL.check_peer(info.protocol.unwrap_or_default().into())?;
        let info = NodeInfo::try_from(info)?;
        if info.role != role {
            return Err(InvalidField::new("role", role.as_str(), info.role).into());
        }
        let load = NodeLoad::from(load.unwrap_or_default());
        if info.cluster != self.cluster {
            let name = |cluster: &str| if cluster.is_empty() { "none".to_owned() } else { cluster.to_owned() };
            return Err(InvalidField::new("cluster", name(&self.cluster), name(&info.cluster)).into());
        }
        if let Some(listed) = listed {
            // The address may now belong to a process of another cluster.
            same("incarnation", &listed.incarnation, &info.incarnation)?;
            same("kv_schema", &listed.kv_schema_digest, &info.schema.digest_hex())?;
        }
        if load.draining {
            return Err(JoinError::Draining);
        }
        if load.stalled {
            return Err(JoinError::Stalled);
        }
        let text = match role {
            Role::Prefill => {
                let mut prefill = v1::prefill_client::PrefillClient::new(channel.clone())
                    .max_decoding_message_size(MAX_MESSAGE_BYTES);
                let files = prefill.model_files(v1::ModelFilesRequest {}).await?.into_inner();
                Some(self.text(files, &info.schema).await?)
            }
            Role::Decode => None,
        };
        let key = self.next_key.fetch_add(1, Ordering::Relaxed);
        let node = Node::new(key, url.to_owned(), info, text, channel, load);
        let paired = node.paired().map(|paired| v1::WatchLoadRequest { paired });
        let reports = client.watch_load(paired).await?;
        Ok((Arc::new(node), Reports(reports.into_inner())))
    }

    /// The text model of these files. The same files are parsed only once.
    async fn text(&self, wire: v1::ModelFilesResponse, schema: &KvSchema) -> Result<Arc<TextModel>, JoinError> {
        let some = |bytes: Vec<u8>| (!bytes.is_empty()).then_some(bytes);
        let files = TextFiles {
            tokenizer_json: wire.tokenizer_json,
            tokenizer_config_json: some(wire.tokenizer_config_json),
            chat_template: some(wire.chat_template),
            generation_config_json: some(wire.generation_config_json),
            special_tokens_map_json: some(wire.special_tokens_map_json),
        };
        let digest = digest(&files);
        let known = self.texts.lock().get(&digest).and_then(Weak::upgrade);
        let text = match known {
            Some(text) => text,
            None => {
                let text = Arc::new(match files.tokenizer_json.len() {
                    // Parsing a large vocabulary takes one or two seconds of CPU time.
                    LARGE_TOKENIZER_BYTES.. => {
                        let parsed = tokio::task::spawn_blocking(move || TextModel::from_files(&files)).await;
                        parsed.map_err(|e| overfill_text::TextError::Tokenizer(e.to_string()))??
                    }
                    _ => TextModel::from_files(&files)?,
                });
                let mut texts = self.texts.lock();
                texts.retain(|_, text| text.strong_count() > 0);
                texts.insert(digest, Arc::downgrade(&text));
                drop(texts);
                text
            }
        };
        if text.tokenizer_sha256() != schema.tokenizer_sha256 {
            let file = text.tokenizer_sha256().to_owned();
            return Err(JoinError::Tokenizer { schema: schema.tokenizer_sha256.clone(), file });
        }
        Ok(text)
    }
}

/// Checks that a registered value is the same as in the node's description.
fn same(field: &'static str, listed: &str, described: &str) -> Result<(), JoinError> {
    if listed == described {
        return Ok(());
    }
    Err(InvalidField::new(field, format!("{listed} as registered"), described).into())
}

fn digest(files: &TextFiles) -> [u8; 32] {
    use sha2::{Digest, Sha256};
    let TextFiles {
        tokenizer_json,
        tokenizer_config_json,
        chat_template,
        generation_config_json,
        special_tokens_map_json,
    } = files;
    let mut hash = Sha256::new();
    let optional = [tokenizer_config_json, chat_template, generation_config_json, special_tokens_map_json];
    for bytes in std::iter::once(Some(tokenizer_json)).chain(optional.map(Option::as_ref)) {
        let bytes = bytes.map_or(&[][..], Vec::as_slice);
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    }
    hash.finalize().into()
}
