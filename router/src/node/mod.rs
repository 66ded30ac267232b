//! The router's state of one node ([`Node`]) and of all nodes ([`View`]).

mod info;
mod state;
mod view;

use std::sync::{
    Arc,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use overfill_proto::{MAX_MESSAGE_BYTES, v1};
use overfill_text::TextModel;
use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};
use tokio_stream::wrappers::WatchStream;
use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};
use tonic::transport::Channel;

pub use self::{
    info::{NodeInfo, NodeLoad},
    state::NodeState,
    view::{ServedModel, View},
};
use crate::{breaker::Breaker, pick};

/// One incarnation of a node. A restarted node is a new `Node`.
pub struct Node {
    /// Id of the incarnation, unique in this router process.
    pub key: u64,
    /// URL that the router connects to.
    pub url: String,
    /// The node's description of itself.
    pub info: NodeInfo,
    /// Tokenizer and chat template. Prefill nodes only.
    pub text: Option<Arc<TextModel>>,
    channel: Channel,
    load: Mutex<NodeLoad>,
    /// Number of this router's requests on the node. Load reports lag by up to 50 ms, this counter does not.
    own_requests: AtomicU32,
    /// Number of this router's prompt tokens that the node has not computed yet.
    own_tokens: AtomicU64,
    breaker: Mutex<Breaker>,
    /// Whether the router sends requests to this node: it has a partner of the other role. The node is told.
    paired: watch::Sender<bool>,
    left: CancellationToken,
}

impl Node {
    /// Creates a node that has just joined.
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
            paired: watch::Sender::new(false),
            left: CancellationToken::new(),
        }
    }

    /// The load that the node last reported.
    pub fn load(&self) -> NodeLoad {
        *self.load.lock()
    }

    /// Stores a load report.
    pub fn set_load(&self, load: NodeLoad) {
        *self.load.lock() = load;
    }

    /// Sets whether the node has a partner of the other role.
    pub fn set_paired(&self, paired: bool) {
        self.paired.send_if_modified(|last| std::mem::replace(last, paired) != paired);
    }

    /// Whether the node has a partner of the other role: the current value, then every change.
    pub fn paired(&self) -> WatchStream<bool> {
        WatchStream::new(self.paired.subscribe())
    }

    /// Whether a request may be sent to the node.
    pub fn admits(&self) -> bool {
        !self.load().draining && self.breaker.lock().admits(Instant::now())
    }

    /// Records that the node served a request.
    pub fn succeeded(&self) {
        self.breaker.lock().succeeded();
    }

    /// Records that the node failed a request.
    pub fn failed(&self) {
        self.breaker.lock().failed(Instant::now());
    }

    /// Records that a request failed because of this node or of another one.
    pub fn suspected(&self) {
        self.breaker.lock().suspected(Instant::now());
    }

    /// Marks the node as gone, which ends its requests.
    pub fn leave(&self) {
        self.left.cancel();
    }

    /// Resolves when the node is gone.
    pub fn left(&self) -> WaitForCancellationFuture<'_> {
        self.left.cancelled()
    }

    /// A gRPC client of a prefill node. Cheap: all clients share the connection.
    pub fn prefill_client(&self) -> v1::prefill_client::PrefillClient<Channel> {
        v1::prefill_client::PrefillClient::new(self.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// A gRPC client of a decode node.
    pub fn decode_client(&self) -> v1::decode_client::DecodeClient<Channel> {
        v1::decode_client::DecodeClient::new(self.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// A gRPC client of the service that nodes of both roles have.
    pub fn node_client(&self) -> v1::node_client::NodeClient<Channel> {
        v1::node_client::NodeClient::new(self.channel.clone())
    }

    /// Counts a request on the node until the guard is dropped. `tokens`: prompt tokens still to be computed.
    pub fn occupy(self: &Arc<Self>, tokens: u64) -> Slot {
        self.own_requests.fetch_add(1, Ordering::Relaxed);
        self.own_tokens.fetch_add(tokens, Ordering::Relaxed);
        let is_probe = self.breaker.lock().begin(Instant::now());
        Slot { node: self.clone(), tokens, is_probe }
    }

    /// The node as a candidate for a prompt. `matched_tokens`: prompt tokens that the node has probably cached.
    pub fn prefill_candidate(&self, matched_tokens: u64) -> pick::PrefillCandidate {
        let load = self.load();
        pick::PrefillCandidate {
            queued_tokens: load.queued_tokens.max(self.own_tokens.load(Ordering::Relaxed)),
            matched_tokens,
            requests: load.requests().max(self.own_requests.load(Ordering::Relaxed)),
        }
    }

    /// The node as a candidate for decoding a request.
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

/// Counts one request of this router on a node until it is dropped.
pub struct Slot {
    node: Arc<Node>,
    tokens: u64,
    is_probe: bool,
}

impl Slot {
    /// Records that the prompt has been computed.
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
