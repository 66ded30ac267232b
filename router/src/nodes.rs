//! Membership: who is there, kept up to date by one task per address.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use overfill_cluster::Shutdown;
use overfill_kv::KvSchema;
use overfill_proto::{MAX_MESSAGE_BYTES, v1};
use overfill_text::{TextFiles, TextModel};
use parking_lot::{Mutex, RwLock};
use rand::Rng as _;
use tokio::{sync::watch, time::timeout};
use tonic::transport::{Channel, Endpoint};
use tracing::{info, warn};

use crate::node::{Node, View};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const DESCRIBE_TIMEOUT: Duration = Duration::from_secs(10);
/// A silent node is asked whether it lives this often, and given up after as long again.
const KEEPALIVE: Duration = Duration::from_secs(5);
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// All nodes. Clones share them.
#[derive(Clone)]
pub struct Nodes {
    inner: Arc<Inner>,
}

struct Inner {
    states: Mutex<BTreeMap<String, State>>,
    view: RwLock<Arc<View>>,
    /// Counts changes of the view and of any load: what waits for room looks again.
    changed: watch::Sender<u64>,
    texts: Mutex<HashMap<[u8; 32], Arc<TextModel>>>,
    next_key: AtomicU64,
}

#[derive(Clone)]
struct State {
    role: v1::Role,
    node: Option<Arc<Node>>,
    error: String,
}

/// Why a node is not used.
#[derive(Debug, thiserror::Error)]
enum JoinError {
    #[error("{0}")]
    Transport(#[from] tonic::transport::Error),
    #[error("{}: {}", .0.code(), .0.message())]
    Status(#[from] Box<tonic::Status>),
    #[error("no answer within {} s", .0.as_secs_f64())]
    Timeout(Duration),
    #[error("{field} must be {limit}, got {value}")]
    Field { field: &'static str, limit: String, value: String },
    #[error("{0}")]
    Text(#[from] overfill_text::TextError),
    #[error("kv_schema.tokenizer_sha256 is {schema}, but tokenizer.json's is {file}")]
    Tokenizer { schema: String, file: String },
    #[error("the node ended its load reports")]
    Ended,
    #[error("the node is draining")]
    Draining,
}

impl From<tonic::Status> for JoinError {
    fn from(status: tonic::Status) -> Self {
        Self::Status(Box::new(status))
    }
}

impl Nodes {
    /// Follows the nodes at these addresses until the shutdown begins.
    pub fn follow(prefill_urls: &[String], decode_urls: &[String], shutdown: &Shutdown) -> Self {
        let roles = prefill_urls.iter().map(|u| (u, v1::Role::Prefill));
        let all: Vec<_> = roles.chain(decode_urls.iter().map(|u| (u, v1::Role::Decode))).collect();
        let state = |role| State { role, node: None, error: "not yet reached".into() };
        let nodes = Self {
            inner: Arc::new(Inner {
                states: Mutex::new(all.iter().map(|(url, role)| ((*url).clone(), state(*role))).collect()),
                view: RwLock::default(),
                changed: watch::Sender::new(0),
                texts: Mutex::default(),
                next_key: AtomicU64::new(0),
            }),
        };
        for (url, role) in all {
            let (nodes, url, token) = (nodes.clone(), url.clone(), shutdown.token());
            shutdown.spawn("node", async move {
                token.run_until_cancelled(nodes.follow_one(url, role)).await;
            });
        }
        nodes
    }

    /// The nodes that are up now.
    pub fn view(&self) -> Arc<View> {
        self.inner.view.read().clone()
    }

    /// Changes whenever a node comes, goes, or reports its load.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changed.subscribe()
    }

    /// Every address with what is known of it, for people.
    pub fn list(&self) -> Vec<v1::Node> {
        let states = self.inner.states.lock().clone();
        let view = self.view();
        let list = states.into_iter().map(|(url, state)| {
            let error = match &state.node {
                Some(node) => unpaired(node, &view).unwrap_or_default(),
                None => state.error,
            };
            let info = state.node.as_ref().map_or_else(
                || v1::NodeInfo { role: state.role.into(), ..Default::default() },
                |node| node.info.clone(),
            );
            v1::Node {
                url,
                info: Some(info),
                load: state.node.as_ref().map(|node| node.load()),
                healthy: state.node.is_some() && error.is_empty(),
                error,
            }
        });
        list.collect()
    }

    /// Why no request for a model of `role` can be served, as far as one can say.
    pub fn trouble(&self, role: v1::Role) -> String {
        let name = if role == v1::Role::Prefill { "prefill" } else { "decode" };
        let list = self.list();
        let mine = list.iter().filter(|n| n.info.as_ref().is_some_and(|i| i.role() == role) && !n.error.is_empty());
        let detail: Vec<_> = mine.take(3).map(|n| format!("{}: {}", n.url, n.error)).collect();
        if detail.is_empty() {
            return format!("no {name} node takes requests");
        }
        format!("no {name} node takes requests ({})", detail.join("; "))
    }

    async fn follow_one(self, url: String, role: v1::Role) {
        let mut backoff = BACKOFF_MIN;
        let mut last_error = String::new();
        loop {
            match self.join(&url, role).await {
                Ok((node, mut reports)) => {
                    backoff = BACKOFF_MIN;
                    last_error.clear();
                    info!(%url, role = role.as_str_name(), model = %node.info.model, incarnation = %node.info.incarnation, "node joined");
                    self.set(&url, Ok(node.clone()));
                    if let Some(why) = (role == v1::Role::Decode).then(|| unpaired(&node, &self.view())).flatten() {
                        warn!(%url, error = %why, "node has no partner");
                    }
                    let error = loop {
                        match reports.message().await {
                            Ok(Some(load)) => {
                                node.set_load(load);
                                self.inner.changed.send_modify(|n| *n += 1);
                            }
                            Ok(None) => break JoinError::Ended,
                            Err(status) => break status.into(),
                        }
                    };
                    warn!(%url, %error, "node left");
                    self.set(&url, Err(error.to_string()));
                }
                Err(error) => {
                    let error = overfill_cluster::process::one_line(&error);
                    if error != last_error {
                        warn!(%url, %error, "node cannot join");
                        last_error.clone_from(&error);
                    }
                    self.set(&url, Err(error));
                }
            }
            let jitter: f64 = rand::rng().random_range(0.5..1.0);
            tokio::time::sleep(backoff.mul_f64(jitter)).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    async fn join(&self, url: &str, role: v1::Role) -> Result<(Arc<Node>, tonic::Streaming<v1::NodeLoad>), JoinError> {
        let channel = Endpoint::from_shared(url.to_owned())?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .keep_alive_while_idle(true)
            .connect()
            .await?;
        let limit = JoinError::Timeout(DESCRIBE_TIMEOUT);
        timeout(DESCRIBE_TIMEOUT, self.describe(url, role, channel)).await.map_err(|_| limit)?
    }

    async fn describe(
        &self,
        url: &str,
        role: v1::Role,
        channel: Channel,
    ) -> Result<(Arc<Node>, tonic::Streaming<v1::NodeLoad>), JoinError> {
        let mut prefill =
            v1::prefill_client::PrefillClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let mut decode = v1::decode_client::DecodeClient::new(channel.clone());
        let described = match role {
            v1::Role::Prefill => prefill.describe(v1::DescribeRequest {}).await?,
            _ => decode.describe(v1::DescribeRequest {}).await?,
        };
        let v1::DescribeResponse { info, load } = described.into_inner();
        let info = info.ok_or(JoinError::Field { field: "info", limit: "present".into(), value: "nothing".into() })?;
        if info.role() != role {
            let value = info.role().as_str_name().to_owned();
            return Err(JoinError::Field { field: "role", limit: role.as_str_name().into(), value });
        }
        if load.is_some_and(|load| load.draining) {
            return Err(JoinError::Draining);
        }
        let schema = KvSchema::try_from(info.kv_schema.clone().unwrap_or_default()).map_err(|e| JoinError::Field {
            field: e.field,
            limit: e.limit,
            value: e.value,
        })?;
        let text = match role {
            v1::Role::Prefill => {
                let files = prefill.model_files(v1::ModelFilesRequest {}).await?.into_inner();
                Some(self.text(files, &schema).await?)
            }
            _ => None,
        };
        let reports = match role {
            v1::Role::Prefill => prefill.watch_load(v1::WatchLoadRequest {}).await?,
            _ => decode.watch_load(v1::WatchLoadRequest {}).await?,
        };
        let key = self.inner.next_key.fetch_add(1, Ordering::Relaxed);
        let node = Node::new(key, url.to_owned(), info, schema, text, channel, load.unwrap_or_default());
        Ok((Arc::new(node), reports.into_inner()))
    }

    /// The text model of these files; the same files are parsed once.
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
        let known = self.inner.texts.lock().get(&digest).cloned();
        let text = match known {
            Some(text) => text,
            None => {
                // Parsing a large vocabulary takes a second or two of computing.
                let parsed = tokio::task::spawn_blocking(move || TextModel::from_files(&files)).await;
                let text = Arc::new(parsed.map_err(|e| overfill_text::TextError::Tokenizer(e.to_string()))??);
                self.inner.texts.lock().insert(digest, text.clone());
                text
            }
        };
        if text.tokenizer_sha256() != schema.tokenizer_sha256 {
            let file = text.tokenizer_sha256().to_owned();
            return Err(JoinError::Tokenizer { schema: schema.tokenizer_sha256.clone(), file });
        }
        Ok(text)
    }

    fn set(&self, url: &str, result: Result<Arc<Node>, String>) {
        let mut states = self.inner.states.lock();
        let Some(state) = states.get_mut(url) else { return };
        (state.node, state.error) = match result {
            Ok(node) => (Some(node), String::new()),
            Err(error) => (None, error),
        };
        let up = |role| states.values().filter(move |s| s.role == role).filter_map(|s| s.node.clone()).collect();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
        // Under the lock of the states, so that two changes can't overtake each other.
        let mut view = self.inner.view.write();
        *view = Arc::new(View::new(up(v1::Role::Prefill), up(v1::Role::Decode), &view.models, now));
        drop(view);
        self.inner.changed.send_modify(|n| *n += 1);
    }
}

/// The mismatch that keeps a decode node from being used: there are prefill nodes, but none fits.
fn unpaired(node: &Node, view: &View) -> Option<String> {
    if node.info.role() != v1::Role::Decode {
        return None;
    }
    let mut mismatch = None;
    for prefill in &view.prefill {
        match View::check_pair(prefill, node) {
            Ok(()) => return None,
            Err(e) => mismatch = Some(format!("{e} ({})", prefill.url)),
        }
    }
    mismatch
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
