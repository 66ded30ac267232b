//! A snapshot of all nodes: which prefill and decode nodes are compatible, and which models they serve.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use overfill_kv::{ProtocolMismatch, Role, SchemaMismatch, TransportSet, Windows};
use overfill_text::TextModel;

use super::Node;

/// A model that clients can request. A model stays known after it was seen once: requests wait while all of its nodes are
/// down.
pub struct ServedModel {
    /// Name of the model, from its decode nodes.
    pub name: String,
    /// Name of the full model that prefills for it.
    pub full_model: String,
    /// Tokenizer and templates of the full model.
    pub text: Arc<TextModel>,
    /// Vocabulary size. All token ids are smaller.
    pub vocab_size: u32,
    /// Maximum length of prompt and output together, in tokens.
    pub max_context_tokens: u32,
    /// Sliding windows of the decode model's layers.
    pub windows: Windows,
    /// End-of-text token ids of the model.
    pub eos_token_ids: Arc<[u32]>,
    /// When the model was first seen, in seconds since 1970.
    pub created: u64,
}

/// Why a decode node can't use the KV of a prefill node.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PairMismatch {
    /// The nodes speak no common version of the protocol.
    #[error(transparent)]
    Protocol(#[from] ProtocolMismatch),
    /// The KV of one is not the KV that the other attends to.
    #[error(transparent)]
    Schema(#[from] SchemaMismatch),
    /// The nodes have no KV transport in common.
    #[error("kv transports do not overlap: {0} and {1}")]
    Transport(TransportSet, TransportSet),
}

/// A snapshot of all nodes that are up.
#[derive(Default)]
pub struct View {
    /// Prefill nodes that take requests.
    pub prefill: Vec<Arc<Node>>,
    /// Decode nodes that take requests.
    pub decode: Vec<Arc<Node>>,
    /// Every model ever served, by name.
    pub models: BTreeMap<String, Arc<ServedModel>>,
}

impl View {
    /// Checks that `decode` can use KV that `prefill` computes.
    pub fn check_pair(prefill: &Node, decode: &Node) -> Result<(), PairMismatch> {
        prefill.info.protocol.check_peer(decode.info.protocol)?;
        prefill.info.schema.check_consumer(&decode.info.schema)?;
        let [from, to] = [prefill, decode].map(|node| TransportSet::from_names(&node.info.kv_transports));
        match from.common(to).best() {
            Some(_) => Ok(()),
            None => Err(PairMismatch::Transport(from, to)),
        }
    }

    /// Tells every node whether it gets requests: it has a partner of the other role, or none is `expected`. In the latter
    /// case that pool is scaled to zero, and requests wait for it.
    pub fn tell_pairs(&self, expected: impl Fn(Role) -> bool) {
        let (no_decode, no_prefill) = (!expected(Role::Decode), !expected(Role::Prefill));
        for prefill in &self.prefill {
            let paired = self.decode.iter().any(|decode| Self::check_pair(prefill, decode).is_ok());
            prefill.set_paired(paired || no_decode);
        }
        for decode in &self.decode {
            let paired = self.prefill.iter().any(|prefill| Self::check_pair(prefill, decode).is_ok());
            decode.set_paired(paired || no_prefill);
        }
    }

    /// The nodes of a role.
    pub fn of(&self, role: Role) -> &[Arc<Node>] {
        match role {
            Role::Prefill => &self.prefill,
            Role::Decode => &self.decode,
        }
    }

    /// Number of sequences that the nodes of a model compute at once, the sum over prefill and decode nodes. `None` unless
    /// the model has nodes of both roles. A prefill node counts in full for every model that it serves. If it gets more
    /// sequences than it can compute, they wait on the node.
    pub fn capacity(&self, model: &str) -> Option<usize> {
        let pairs = |p: &Arc<Node>, d: &Arc<Node>| d.info.serves(model) && Self::check_pair(p, d).is_ok();
        let decode = self.decode.iter().filter(|d| self.prefill.iter().any(|p| pairs(p, d)));
        let prefill = self.prefill.iter().filter(|p| self.decode.iter().any(|d| pairs(p, d)));
        let most: Vec<_> = decode.chain(prefill).map(|node| node.info.max_running_requests as usize).collect();
        (!most.is_empty()).then(|| most.iter().sum())
    }

    /// Creates a view of these nodes. `before`: the models known so far. `now`: seconds since 1970.
    pub fn new(
        prefill: Vec<Arc<Node>>,
        decode: Vec<Arc<Node>>,
        before: &BTreeMap<String, Arc<ServedModel>>,
        now: u64,
    ) -> Self {
        let mut models = before.clone();
        let names: BTreeSet<&str> = decode.iter().flat_map(|d| d.info.models()).collect();
        for name in names {
            let pairs = decode
                .iter()
                .filter(|d| d.info.serves(name))
                .flat_map(|d| prefill.iter().filter(|p| Self::check_pair(p, d).is_ok()).map(move |p| (p, d)));
            let context = |(p, d): &(&Arc<Node>, &Arc<Node>)| p.info.max_context_tokens.min(d.info.max_context_tokens);
            let Some((p, d)) = pairs.max_by_key(context) else { continue };
            let Some(text) = p.text.clone() else { continue };
            // A pruned model may have been fine-tuned with end-of-text tokens that the full model's files do not list.
            let mut eos = p.info.eos_token_ids.clone();
            for id in d.info.eos_token_ids.iter().chain(text.eos_token_ids()) {
                if !eos.contains(id) {
                    eos.push(*id);
                }
            }
            let model = ServedModel {
                name: name.to_owned(),
                full_model: p.info.model.clone(),
                vocab_size: p.info.schema.vocab_size,
                max_context_tokens: context(&(p, d)),
                windows: d.info.schema.windows(),
                eos_token_ids: eos.into(),
                created: before.get(name).map_or(now, |m| m.created),
                text,
            };
            models.insert(name.to_owned(), Arc::new(model));
        }
        Self { prefill, decode, models }
    }
}
