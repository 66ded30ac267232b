//! What the router knows of one node ([`Node`]), and of all nodes together ([`View`]).

mod info;
mod view;

use std::sync::{
    Arc,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use overfill_proto::{MAX_MESSAGE_BYTES, v1};
use overfill_text::TextModel;
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};
use tonic::transport::Channel;

pub use self::{
    info::{NodeInfo, NodeLoad},
    view::{ServedModel, View},
};
use crate::{breaker::Breaker, pick};

/// One incarnation of a node: a restarted node is another one.
pub struct Node {
    /// Identifies the incarnation for as long as this router lives.
    pub key: u64,
    /// The address that the router dials.
    pub url: String,
    /// The node's description of itself.
    pub info: NodeInfo,
    /// Tokenizer and templates; prefill nodes only.
    pub text: Option<Arc<TextModel>>,
    channel: Channel,
    load: Mutex<NodeLoad>,
    /// Requests of this router on the node. Load reports lag by up to 50 ms; this does not.
    own_requests: AtomicU32,
    /// Prompt tokens of this router that the node has still to compute.
    own_tokens: AtomicU64,
    breaker: Mutex<Breaker>,
    left: CancellationToken,
}

impl Node {
    /// A node that has just joined.
    pub fn new(
        key: u64,
        url: String,
        info: NodeInfo,
        text: Option<Arc<TextModel>>,
        channel: Channel,
        load: NodeLoad,
    ) -> Self {
        Self {
            key,
            url,
            info,
            text,
            channel,
            load: Mutex::new(load),
            own_requests: AtomicU32::new(0),
            own_tokens: AtomicU64::new(0),
            breaker: Mutex::new(Breaker::default()),
            left: CancellationToken::new(),
        }
    }

    /// The load that the node last reported.
    pub fn load(&self) -> NodeLoad {
        *self.load.lock()
    }

    /// Takes a new report.
    pub fn set_load(&self, load: NodeLoad) {
        *self.load.lock() = load;
    }

    /// May a request be sent to it?
    pub fn admits(&self) -> bool {
        !self.load().draining && self.breaker.lock().admits(Instant::now())
    }

    /// The node did what a request wanted of it.
    pub fn succeeded(&self) {
        self.breaker.lock().succeeded();
    }

    /// The node failed a request.
    pub fn failed(&self) {
        self.breaker.lock().failed(Instant::now());
    }

    /// This node or another one failed a request.
    pub fn suspected(&self) {
        self.breaker.lock().suspected(Instant::now());
    }

    /// Ends the requests on the node, which can't be used any more.
    pub fn leave(&self) {
        self.left.cancel();
    }

    /// Resolves when the node can't be used any more.
    pub fn left(&self) -> WaitForCancellationFuture<'_> {
        self.left.cancelled()
    }

    /// A client of a prefill node. Cheap: all clients share the connection.
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

    /// Counts a request on the node until the guard is dropped. `tokens`: prompt tokens still to be computed.
    pub fn occupy(self: &Arc<Self>, tokens: u64) -> Slot {
        self.own_requests.fetch_add(1, Ordering::Relaxed);
        self.own_tokens.fetch_add(tokens, Ordering::Relaxed);
        let is_probe = self.breaker.lock().begin(Instant::now());
        Slot { node: self.clone(), tokens, is_probe }
    }

    /// The node as a candidate for a prompt of which it has probably cached `matched_tokens`.
    pub fn prefill_candidate(&self, matched_tokens: u64) -> pick::PrefillCandidate {
        let load = self.load();
        pick::PrefillCandidate {
            queued_tokens: load.queued_tokens.max(self.own_tokens.load(Ordering::Relaxed)),
            matched_tokens,
            requests: load.requests().max(self.own_requests.load(Ordering::Relaxed)),
        }
    }

    /// The node as a candidate for a request that is to be decoded.
    pub fn decode_candidate(&self) -> pick::DecodeCandidate {
        let load = self.load();
        pick::DecodeCandidate {
            free_blocks: load.free_blocks,
            total_blocks: self.info.total_blocks,
            requests: load.requests().max(self.own_requests.load(Ordering::Relaxed)),
            max_running: self.info.max_running_requests,
        }
    }
}

/// A request of this router on a node, for as long as it is there.
pub struct Slot {
    node: Arc<Node>,
    tokens: u64,
    is_probe: bool,
}

impl Slot {
    /// The prompt has been computed.
    pub fn prefilled(&mut self) {
        self.node.own_tokens.fetch_sub(std::mem::take(&mut self.tokens), Ordering::Relaxed);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.prefilled();
        self.node.own_requests.fetch_sub(1, Ordering::Relaxed);
        if self.is_probe {
            self.node.breaker.lock().abandoned(Instant::now());
        }
    }
}
