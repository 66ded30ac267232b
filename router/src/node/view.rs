//! All nodes together: who may work for whom, and which models that gives.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use overfill_kv::{Role, SchemaMismatch};
use overfill_text::TextModel;

use super::Node;

/// A model that clients may name. A model that was seen once stays known: when all of its nodes are away, requests
/// wait.
pub struct ServedModel {
    /// The name that its decode nodes give it.
    pub name: String,
    /// Name of the full model that prefills for it.
    pub full_model: String,
    /// Tokenizer and templates of the full model.
    pub text: Arc<TextModel>,
    /// Token ids are below this number.
    pub vocab_size: u32,
    /// Longest prompt and output together, in tokens.
    pub max_context_tokens: u32,
    /// The model's own end-of-text tokens.
    pub eos_token_ids: Arc<[u32]>,
    /// Seconds since 1970 when the model was first seen.
    pub created: u64,
}

/// All nodes that are up, at one moment.
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
    /// May `prefill` compute KV for `decode`?
    pub fn check_pair(prefill: &Node, decode: &Node) -> Result<(), SchemaMismatch> {
        prefill.info.schema.check_consumer(&decode.info.schema)
    }

    /// The nodes of a role.
    pub fn of(&self, role: Role) -> &[Arc<Node>] {
        match role {
            Role::Prefill => &self.prefill,
            Role::Decode => &self.decode,
        }
    }

    /// Most sequences that the nodes of a model compute at once, prefills and decodes together. `None` unless the model
    /// has nodes of both roles. A prefill node counts for every model that it prefills for; what is too much for it
    /// waits there.
    pub fn capacity(&self, model: &str) -> Option<usize> {
        let pairs = |p: &Arc<Node>, d: &Arc<Node>| d.info.model == model && Self::check_pair(p, d).is_ok();
        let decode = self.decode.iter().filter(|d| self.prefill.iter().any(|p| pairs(p, d)));
        let prefill = self.prefill.iter().filter(|p| self.decode.iter().any(|d| pairs(p, d)));
        let most: Vec<_> = decode.chain(prefill).map(|node| node.info.max_running_requests as usize).collect();
        (!most.is_empty()).then(|| most.iter().sum())
    }

    /// The view of these nodes. `before`: the models known so far. `now`: seconds since 1970.
    pub fn new(
        prefill: Vec<Arc<Node>>,
        decode: Vec<Arc<Node>>,
        before: &BTreeMap<String, Arc<ServedModel>>,
        now: u64,
    ) -> Self {
        let mut models = before.clone();
        let names: BTreeSet<&str> = decode.iter().map(|d| d.info.model.as_str()).collect();
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
                vocab_size: p.info.schema.vocab_size,
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
