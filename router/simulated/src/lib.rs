//! Simulated nodes without a model, for tests and benchmarks of the router.
//!
//! They use the real protocol over real sockets. Only the tokens are artificial: a function of all previous tokens, or read
//! from a script. A request therefore has the same output no matter how often it moves between nodes.

mod decode;
mod node;
mod prefill;

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use overfill_cluster::{
    grpc::{self, NODE_CONNECTIONS},
    http,
    net::Listener,
};
use overfill_kv::{KvDtype, KvSchema, PROTOCOL, ProtocolVersions, Role, RopeSpec};
use overfill_proto::v1;
use overfill_text::TextFiles;
use parking_lot::Mutex;
use tokio::{
    net::TcpListener,
    sync::{oneshot, watch},
};
use tokio_util::sync::CancellationToken;
use tonic::{Status, service::Routes};

/// Id of the end-of-text token of [`text_files`]; bytes are ids 3 to 258.
pub const EOS: u32 = 1;

/// Settings of a simulated node.
#[derive(Clone)]
pub struct Options {
    /// Name of the node's model.
    pub model: String,
    /// Layout and producer of the node's KV.
    pub schema: KvSchema,
    /// Tokenizer and template; prefill nodes only.
    pub files: TextFiles,
    /// Maximum length of prompt and output together, in tokens.
    pub max_context_tokens: u32,
    /// Versions of the protocol that the node claims to speak.
    pub protocol: ProtocolVersions,
    /// Name of the node's cluster.
    pub cluster: String,
    /// Time to prefill a prompt.
    pub prefill_time: Duration,
    /// Time to decode a token.
    pub token_time: Duration,
    /// Delay between the handoff and the prefill node's report of the first token. The decode node then reports first.
    pub report_delay: Duration,
    /// Output tokens, repeated cyclically. Without a script the output is letters that depend on all previous tokens.
    pub script: Option<Vec<u32>>,
}

impl Default for Options {
    fn default() -> Self {
        let files = text_files();
        Self {
            model: "simulated".into(),
            schema: KvSchema {
                layers: vec![0, 1],
                kv_heads: 1,
                head_dim: 8,
                rope: RopeSpec { theta: 1e4, scaling: "none".into() },
                layer_attention: Vec::new(),
                dtype: KvDtype::F32,
                block_tokens: 16,
                vocab_size: 259,
                tokenizer_sha256: sha256(&files),
                full_model: Some("simulated".into()),
            },
            files,
            max_context_tokens: 4096,
            protocol: PROTOCOL,
            cluster: String::new(),
            prefill_time: Duration::ZERO,
            token_time: Duration::ZERO,
            report_delay: Duration::ZERO,
            script: None,
        }
    }
}

fn sha256(files: &TextFiles) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(&files.tokenizer_json).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A byte-level tokenizer: begin, end, one reserved, then a token per byte.
pub fn text_files() -> TextFiles {
    let mut extra = 256u32;
    let mut vocab = serde_json::Map::new();
    let special = ["<|bos|>", "<|eos|>", "<|turn|>"];
    for (id, name) in special.iter().enumerate() {
        vocab.insert((*name).into(), id.into());
    }
    for byte in 0..=255u8 {
        // The byte-level alphabet of GPT-2: printable Latin-1 characters stand for themselves, other bytes for characters
        // from U+0100 on.
        let c = match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => Some(char::from(byte)),
            _ => {
                extra += 1;
                char::from_u32(extra - 1)
            }
        };
        vocab.insert(c.into_iter().collect(), (u32::from(byte) + 3).into());
    }
    let added: Vec<_> = special
        .iter()
        .enumerate()
        .map(|(id, name)| {
            serde_json::json!({"id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
                               "normalized": false, "special": true})
        })
        .collect();
    let byte_level =
        serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    });
    TextFiles {
        tokenizer_json: tokenizer.to_string().into_bytes(),
        tokenizer_config_json: Some(br#"{"bos_token": "<|bos|>", "eos_token": "<|eos|>"}"#.to_vec()),
        chat_template: Some(
            b"{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}\n{% endfor %}".to_vec(),
        ),
        generation_config_json: Some(br#"{"eos_token_id": 1}"#.to_vec()),
        special_tokens_map_json: None,
    }
}

/// The ids of `text` under [`text_files`].
pub fn bytes_as_tokens(text: &str) -> Vec<u32> {
    text.bytes().map(|byte| u32::from(byte) + 3).collect()
}

/// A running node. Dropping it stops new requests and load reports. Running requests continue.
pub struct SimulatedNode {
    /// The node's address.
    pub url: String,
    state: Arc<State>,
}

impl Drop for SimulatedNode {
    fn drop(&mut self) {
        self.state.stop.cancel();
    }
}

impl SimulatedNode {
    /// Starts a prefill node on a free port.
    pub async fn prefill(options: Options) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        Self::serve(listener, Role::Prefill, options)
    }

    /// Starts a decode node on a free port.
    pub async fn decode(options: Options) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        Self::serve(listener, Role::Decode, options)
    }

    /// Starts a node on a bound listener.
    pub fn serve(listener: TcpListener, role: Role, options: Options) -> io::Result<Self> {
        let url = format!("http://{}", listener.local_addr()?);
        let state = Arc::new(State {
            info: v1::NodeInfo {
                node_id: url.trim_start_matches("http://").to_owned(),
                incarnation: format!("{:032x}", rand::random::<u128>()),
                role: v1::Role::from(role).into(),
                model: options.model.clone(),
                variants: Vec::new(),
                kv_schema: Some((&options.schema).into()),
                max_context_tokens: options.max_context_tokens,
                total_blocks: 1 << 20,
                max_running_requests: 64,
                kv_endpoint: None,
                version: env!("CARGO_PKG_VERSION").into(),
                weights: "f32".into(),
                eos_token_ids: vec![EOS],
                protocol: Some(options.protocol.into()),
                pool: role.to_string(),
                cluster: options.cluster.clone(),
                kv_transports: "tcp".into(),
            },
            options,
            load: watch::Sender::new(v1::NodeLoad { free_blocks: 1 << 20, ..Default::default() }),
            active: AtomicUsize::new(0),
            taken: AtomicUsize::new(0),
            fail_after: AtomicI64::new(-1),
            full: watch::Sender::new(false),
            paused: watch::Sender::new(false),
            paired: watch::Sender::new(false),
            losing: AtomicBool::new(false),
            open: Mutex::default(),
            verdicts: Mutex::default(),
            stop: CancellationToken::new(),
        });
        let routes = match role {
            Role::Prefill => Routes::new(v1::prefill_server::PrefillServer::new(prefill::Service(state.clone()))),
            Role::Decode => Routes::new(v1::decode_server::DecodeServer::new(decode::Service(state.clone()))),
        };
        let routes = routes.add_service(v1::node_server::NodeServer::new(node::Service(state.clone())));
        let stop = state.stop.clone().cancelled_owned();
        let (listener, limits) = (Listener::new(listener, None), grpc::limits(NODE_CONNECTIONS));
        tokio::spawn(http::serve(listener, routes.into_axum_router(), limits, http::OpenConnections::default(), stop));
        Ok(Self { url, state })
    }

    /// Number of requests on the node.
    pub fn active(&self) -> usize {
        self.state.active.load(Ordering::SeqCst)
    }

    /// Number of requests that the node has accepted since its start.
    pub fn taken(&self) -> usize {
        self.state.taken.load(Ordering::SeqCst)
    }

    /// Whether a router sends requests to the node, as it last said.
    pub fn is_paired(&self) -> bool {
        *self.state.paired.borrow()
    }

    /// Makes the node fail once, after `tokens` more tokens.
    pub fn fail_after(&self, tokens: u32) {
        self.state.fail_after.store(i64::from(tokens), Ordering::SeqCst);
    }

    /// While set, the node has no room and refuses requests.
    pub fn set_full(&self, full: bool) {
        self.state.full.send_replace(full);
        self.state.load.send_modify(|load| load.free_blocks = if full { 0 } else { 1 << 20 });
    }

    /// While set, the node reports that its engine is stalled.
    pub fn set_stalled(&self, stalled: bool) {
        self.state.load.send_modify(|load| load.stalled = stalled);
    }

    /// While set, a prefill node's handoffs are lost.
    pub fn set_losing(&self, losing: bool) {
        self.state.losing.store(losing, Ordering::SeqCst);
    }

    /// Ends all open prefills of the node, as if their KV had made room.
    pub fn close_prefills(&self) {
        self.state.open.lock().clear();
    }

    /// While set, the node generates no tokens.
    pub fn set_paused(&self, paused: bool) {
        self.state.paused.send_replace(paused);
    }
}

/// Tokens of an open prefill, and how many of its last tokens are output.
type OpenPrefill = (Vec<u32>, u32);

struct State {
    options: Options,
    info: v1::NodeInfo,
    load: watch::Sender<v1::NodeLoad>,
    active: AtomicUsize,
    taken: AtomicUsize,
    /// Number of tokens until a failure. Negative: no failure.
    fail_after: AtomicI64,
    full: watch::Sender<bool>,
    paused: watch::Sender<bool>,
    /// Whether a router sends requests to this node, as it last said.
    paired: watch::Sender<bool>,
    losing: AtomicBool,
    /// The open prefills by lease.
    open: Mutex<HashMap<Vec<u8>, OpenPrefill>>,
    /// Requests that wait for a verdict, by ticket.
    verdicts: Mutex<HashMap<Vec<u8>, oneshot::Sender<Vec<u32>>>>,
    stop: CancellationToken,
}

/// Counts an active request until it is dropped.
struct Active(Arc<State>);

impl Active {
    fn new(state: &Arc<State>) -> Result<Self, Status> {
        if *state.full.borrow() {
            return Err(Status::resource_exhausted("0 blocks are free"));
        }
        state.active.fetch_add(1, Ordering::SeqCst);
        state.taken.fetch_add(1, Ordering::SeqCst);
        state.load.send_modify(|load| load.running_requests += 1);
        Ok(Self(state.clone()))
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::SeqCst);
        self.0.load.send_modify(|load| load.running_requests -= 1);
    }
}

impl State {
    /// Waits for `time`, then fails if a test has requested a failure.
    async fn step(&self, time: Duration) -> Result<(), Status> {
        // An error would mean that the sender is gone, but `self` holds it.
        let _ = self.paused.subscribe().wait_for(|paused| !paused).await;
        if !time.is_zero() {
            tokio::time::sleep(time).await;
        }
        match self.fail_after.fetch_sub(1, Ordering::SeqCst) {
            0 => Err(Status::unavailable("simulated failure")),
            n if n < 0 => {
                self.fail_after.store(-1, Ordering::SeqCst);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// The artificial continuation of a prompt.
#[derive(Clone)]
struct Continuation {
    hash: u64,
    index: usize,
    script: Option<Vec<u32>>,
}

impl Continuation {
    /// Continues `tokens`. The last `generated` of them are earlier output.
    fn new(options: &Options, tokens: &[u32], generated: u32) -> Self {
        let mut this = Self { hash: 0xcbf2_9ce4_8422_2325, index: generated as usize, script: options.script.clone() };
        tokens.iter().for_each(|token| this.mix(*token));
        this
    }

    fn mix(&mut self, token: u32) {
        self.hash = (self.hash ^ u64::from(token)).wrapping_mul(0x0000_0100_0000_01b3);
    }

    fn next(&mut self, logprobs: Option<u32>) -> v1::OutputToken {
        let token = match &self.script {
            Some(script) => script[self.index % script.len()],
            None => u32::from(b'a') + 3 + ((self.hash >> 32) % 26) as u32,
        };
        self.index += 1;
        self.mix(token);
        output(token, logprobs)
    }
}

/// A token with artificial log-probabilities: the token itself is the most likely, followed by the next ids.
fn output(token: u32, logprobs: Option<u32>) -> v1::OutputToken {
    let Some(n) = logprobs else { return v1::OutputToken { token, logprob: f32::NAN, top: Vec::new() } };
    let top = (0..n).map(|i| v1::TokenLogprob { token: (token + i) % 259, logprob: -0.5 - i as f32 }).collect();
    v1::OutputToken { token, logprob: -0.5, top }
}

/// Handoffs between the simulated nodes of this process, by ticket. Only the first token is handed over.
static HANDOFFS: LazyLock<Mutex<HashMap<Vec<u8>, oneshot::Sender<u32>>>> = LazyLock::new(Mutex::default);
