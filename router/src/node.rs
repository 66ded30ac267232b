//! What the router knows of a node, and of all nodes together.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use overfill_kv::{KvSchema, SchemaMismatch};
use overfill_proto::{MAX_MESSAGE_BYTES, v1};
use overfill_text::TextModel;
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};
use tonic::transport::Channel;

use crate::{breaker::Breaker, pick};

/// One incarnation of a node: a restarted node is another one.
pub struct Node {
    /// Unique in this router's life.
    pub key: u64,
    /// Where it is.
    pub url: String,
    /// As it described itself.
    pub info: v1::NodeInfo,
    /// Of its KV, checked.
    pub schema: KvSchema,
    /// Tokenizer and templates; prefill nodes only.
    pub text: Option<Arc<TextModel>>,
    channel: Channel,
    load: Mutex<v1::NodeLoad>,
    // What this router has put there. Load reports lag by up to 50 ms; these don't.
    own_requests: AtomicU32,
    own_tokens: AtomicU64,
    breaker: Mutex<Breaker>,
    left: CancellationToken,
}

impl Node {
    /// A node just described.
    pub fn new(
        key: u64,
        url: String,
        info: v1::NodeInfo,
        schema: KvSchema,
        text: Option<Arc<TextModel>>,
        channel: Channel,
        load: v1::NodeLoad,
    ) -> Self {
        Self {
            key,
            url,
            info,
            schema,
            text,
            channel,
            load: Mutex::new(load),
            own_requests: AtomicU32::new(0),
            own_tokens: AtomicU64::new(0),
            breaker: Mutex::new(Breaker::default()),
            left: CancellationToken::new(),
        }
    }

    /// Its load as last reported.
    pub fn load(&self) -> v1::NodeLoad {
        *self.load.lock()
    }

    /// A new report.
    pub fn set_load(&self, load: v1::NodeLoad) {
        *self.load.lock() = load;
    }

    /// May a request be sent to it?
    pub fn admits(&self) -> bool {
        !self.load().draining && self.breaker.lock().admits(Instant::now())
    }

    /// It did what a request wanted of it.
    pub fn succeeded(&self) {
        self.breaker.lock().succeeded();
    }

    /// It failed a request.
    pub fn failed(&self) {
        self.breaker.lock().failed(Instant::now());
    }

    /// It, or another node, failed a request.
    pub fn suspected(&self) {
        self.breaker.lock().suspected(Instant::now());
    }

    /// It can't be used any more: requests on it end.
    pub fn leave(&self) {
        self.left.cancel();
    }

    /// Resolves when it can't be used any more.
    pub fn left(&self) -> WaitForCancellationFuture<'_> {
        self.left.cancelled()
    }

    /// A client of a prefill node. Cheap: all share the connection.
    pub fn prefill_client(&self) -> v1::prefill_client::PrefillClient<Channel> {
        v1::prefill_client::PrefillClient::new(self.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// A client of a decode node.
    pub fn decode_client(&self) -> v1::decode_client::DecodeClient<Channel> {
        v1::decode_client::DecodeClient::new(self.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Counts a request on the node until the guard is dropped; `tokens` are still to be prefilled.
    pub fn place(self: &Arc<Self>, tokens: u64) -> Placed {
        self.own_requests.fetch_add(1, Ordering::Relaxed);
        self.own_tokens.fetch_add(tokens, Ordering::Relaxed);
        let is_probe = self.breaker.lock().begin(Instant::now());
        Placed { node: self.clone(), tokens, is_probe }
    }

    /// As a candidate for a prompt of which it has `matched_tokens`.
    pub fn prefill_candidate(&self, matched_tokens: u64) -> pick::PrefillCandidate {
        let load = self.load();
        pick::PrefillCandidate {
            queued_tokens: load.queued_tokens.max(self.own_tokens.load(Ordering::Relaxed)),
            matched_tokens,
            requests: (load.running_requests + load.waiting_requests).max(self.own_requests.load(Ordering::Relaxed)),
        }
    }

    /// As a candidate for a request.
    pub fn decode_candidate(&self) -> pick::DecodeCandidate {
        let load = self.load();
        pick::DecodeCandidate {
            free_blocks: load.free_blocks,
            total_blocks: self.info.total_blocks,
            requests: (load.running_requests + load.waiting_requests).max(self.own_requests.load(Ordering::Relaxed)),
            max_running: self.info.max_running_requests,
        }
    }
}

/// A request of this router on a node.
pub struct Placed {
    node: Arc<Node>,
    tokens: u64,
    is_probe: bool,
}

impl Placed {
    /// The prompt has been computed.
    pub fn prefilled(&mut self) {
        self.node.own_tokens.fetch_sub(std::mem::take(&mut self.tokens), Ordering::Relaxed);
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        self.prefilled();
        self.node.own_requests.fetch_sub(1, Ordering::Relaxed);
        if self.is_probe {
            self.node.breaker.lock().abandoned(Instant::now());
        }
    }
}

/// A model that clients may name. Known for good once it was seen: when all of its nodes are away, requests wait.
pub struct ServedModel {
    /// The decode nodes' name for it.
    pub name: String,
    /// The full model that prefills for it.
    pub full_model: String,
    /// Of the full model.
    pub text: Arc<TextModel>,
    /// Ids are below it.
    pub vocab_size: u32,
    /// Prompt + output.
    pub max_context_tokens: u32,
    /// The model's own end-of-text tokens.
    pub eos_token_ids: Arc<[u32]>,
    /// Seconds since 1970, when it was first seen.
    pub created: u64,
}

/// All nodes that are up, at one moment.
#[derive(Default)]
pub struct View {
    /// Prefill nodes.
    pub prefill: Vec<Arc<Node>>,
    /// Decode nodes.
    pub decode: Vec<Arc<Node>>,
    /// Every model ever served, by name.
    pub models: BTreeMap<String, Arc<ServedModel>>,
}

impl View {
    /// May `prefill` compute KV for `decode`?
    pub fn check_pair(prefill: &Node, decode: &Node) -> Result<(), SchemaMismatch> {
        prefill.schema.check_consumer(&decode.schema)
    }

    /// Those of a role.
    pub fn of(&self, role: v1::Role) -> &[Arc<Node>] {
        if role == v1::Role::Prefill { &self.prefill } else { &self.decode }
    }

    /// Sequences that the nodes of a model have places for: those being prefilled, and those being decoded. `None` if it
    /// has not both. Prefill nodes count for every model that they prefill for; what is too much for them waits there.
    pub fn places(&self, model: &str) -> Option<usize> {
        let pairs = |p: &Arc<Node>, d: &Arc<Node>| d.info.model == model && Self::check_pair(p, d).is_ok();
        let decode = self.decode.iter().filter(|d| self.prefill.iter().any(|p| pairs(p, d)));
        let prefill = self.prefill.iter().filter(|p| self.decode.iter().any(|d| pairs(p, d)));
        let places: Vec<_> = decode.chain(prefill).map(|node| node.info.max_running_requests as usize).collect();
        (!places.is_empty()).then(|| places.iter().sum())
    }

    /// The view of these nodes. `before` are the models known so far; `now` is in seconds since 1970.
    pub fn new(
        prefill: Vec<Arc<Node>>,
        decode: Vec<Arc<Node>>,
        before: &BTreeMap<String, Arc<ServedModel>>,
        now: u64,
    ) -> Self {
        let mut models = before.clone();
        let names: std::collections::BTreeSet<&str> = decode.iter().map(|d| d.info.model.as_str()).collect();
        for name in names {
            let pairs = decode
                .iter()
                .filter(|d| d.info.model == name)
                .flat_map(|d| prefill.iter().filter(|p| Self::check_pair(p, d).is_ok()).map(move |p| (p, d)));
            let context = |(p, d): &(&Arc<Node>, &Arc<Node>)| p.info.max_context_tokens.min(d.info.max_context_tokens);
            let Some((p, d)) = pairs.max_by_key(context) else { continue };
            let Some(text) = p.text.clone() else { continue };
            // A pruned model may have been fine-tuned to end a turn in ways that the full model's files don't name.
            let mut eos = p.info.eos_token_ids.clone();
            for id in d.info.eos_token_ids.iter().chain(text.eos_token_ids()) {
                if !eos.contains(id) {
                    eos.push(*id);
                }
            }
            let model = ServedModel {
                name: name.to_owned(),
                full_model: p.info.model.clone(),
                vocab_size: p.schema.vocab_size,
                max_context_tokens: context(&(p, d)),
                eos_token_ids: eos.into(),
                created: before.get(name).map_or(now, |m| m.created),
                text,
            };
            models.insert(name.to_owned(), Arc::new(model));
        }
        Self { prefill, decode, models }
    }
}
