//! Counts the sequences that wait in this router, by model and by what they wait for. Autoscaling is based on it.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use overfill_kv::Role;
use parking_lot::Mutex;

use crate::request::Generation;

/// What a sequence waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WaitsFor {
    /// The first nodes of its model, which is not known yet.
    Model,
    /// Its turn: as many sequences of the model run as its nodes compute at once.
    Turn,
    /// Room on a node.
    Room,
    /// The first node of this role.
    Node(Role),
}

/// Work of waiting sequences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Number of sequences.
    pub sequences: u64,
    /// Number of tokens of their prompts.
    pub prompt_tokens: u64,
    /// Number of KV blocks that their prompts need on decode nodes.
    pub blocks: u64,
}

impl Work {
    /// The sum of two amounts.
    pub fn plus(self, other: Self) -> Self {
        Self {
            sequences: self.sequences + other.sequences,
            prompt_tokens: self.prompt_tokens + other.prompt_tokens,
            blocks: self.blocks + other.blocks,
        }
    }

    fn minus(self, other: Self) -> Self {
        Self {
            sequences: self.sequences - other.sequences,
            prompt_tokens: self.prompt_tokens - other.prompt_tokens,
            blocks: self.blocks - other.blocks,
        }
    }
}

/// By model and reason. An entry is removed when nobody waits any more.
type Counts = HashMap<(String, WaitsFor), Work>;

/// The sequences that wait in this router. Clones share the counts.
#[derive(Clone, Default)]
pub struct Waiting(Arc<Mutex<Counts>>);

impl Waiting {
    /// Counts a sequence from now on. It waits for its turn.
    pub fn begin(&self, generation: &Generation) -> Waiter {
        let prompt_tokens = generation.prompt.len();
        let blocks = generation.model.windows.needed_blocks(prompt_tokens) as u64;
        let work = Work { sequences: 1, prompt_tokens: prompt_tokens as u64, blocks };
        self.count(&generation.model.name, work, WaitsFor::Turn)
    }

    /// Counts a request from now on that waits for the first nodes of a model. Its tokens are not known yet.
    pub fn begin_unknown(&self, model: &str) -> Waiter {
        let work = Work { sequences: 1, ..Work::default() };
        self.count(model, work, WaitsFor::Model)
    }

    fn count(&self, model: &str, work: Work, reason: WaitsFor) -> Waiter {
        let mut waiter = Waiter { counts: self.0.clone(), model: model.to_owned(), work, reason: None };
        waiter.wait(reason);
        waiter
    }

    /// Number of sequences and requests that wait for the first node of a role, by model.
    pub fn without_nodes(&self) -> BTreeMap<String, u64> {
        let mut models = BTreeMap::new();
        for ((model, reason), work) in self.0.lock().iter() {
            if matches!(reason, WaitsFor::Model | WaitsFor::Node(_)) {
                *models.entry(model.clone()).or_default() += work.sequences;
            }
        }
        models
    }

    /// Number of requests that wait for the first nodes of a model, by model.
    pub fn without_model(&self) -> BTreeMap<String, u64> {
        let counts = self.0.lock();
        let waiting = counts.iter().filter(|((_, reason), _)| *reason == WaitsFor::Model);
        waiting.map(|((model, _), work)| (model.clone(), work.sequences)).collect()
    }

    /// The work of a model's sequences that wait for `reason`.
    pub fn work(&self, model: &str, reason: WaitsFor) -> Work {
        self.0.lock().get(&(model.to_owned(), reason)).copied().unwrap_or_default()
    }
}

/// One sequence, counted while it waits. Dropping it ends the count.
pub struct Waiter {
    counts: Arc<Mutex<Counts>>,
    model: String,
    work: Work,
    reason: Option<WaitsFor>,
}

impl Waiter {
    /// The sequence waits for `reason`.
    pub fn wait(&mut self, reason: WaitsFor) {
        self.set(Some(reason));
    }

    /// There are nodes of both roles now. If the sequence waited for the first one, it waits for room from here on.
    pub fn found_nodes(&mut self) {
        if matches!(self.reason, Some(WaitsFor::Node(_))) {
            self.wait(WaitsFor::Room);
        }
    }

    /// The sequence no longer waits.
    pub fn placed(&mut self) {
        self.set(None);
    }

    fn set(&mut self, reason: Option<WaitsFor>) {
        if self.reason == reason {
            return;
        }
        let mut counts = self.counts.lock();
        if let Some(last) = self.reason {
            let key = (self.model.clone(), last);
            let left = counts.get(&key).map_or(Work::default(), |work| work.minus(self.work));
            match left.sequences {
                0 => drop(counts.remove(&key)),
                _ => drop(counts.insert(key, left)),
            }
        }
        if let Some(reason) = reason {
            let work = counts.entry((self.model.clone(), reason)).or_default();
            *work = work.plus(self.work);
        }
        drop(counts);
        self.reason = reason;
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.placed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attempt::choose::tests::plan;

    #[tokio::test]
    async fn a_sequence_is_counted_where_it_waits_until_it_is_dropped() {
        let waiting = Waiting::default();
        let generation = plan(40, 8, &[]).generation;
        let mut waiters = [waiting.begin(&generation), waiting.begin(&generation)];
        let of = |reason| waiting.work("m", reason);
        assert_eq!(of(WaitsFor::Turn), Work { sequences: 2, prompt_tokens: 80, blocks: 6 });
        waiters[0].wait(WaitsFor::Node(Role::Decode));
        assert_eq!((of(WaitsFor::Turn).sequences, of(WaitsFor::Node(Role::Decode)).sequences), (1, 1));
        let unknown = (waiting.begin_unknown("m"), waiting.begin_unknown(""));
        assert_eq!(waiting.without_nodes(), [(String::new(), 1), ("m".to_owned(), 2)].into());
        assert_eq!(waiting.without_model(), [(String::new(), 1), ("m".to_owned(), 1)].into());
        drop(unknown);
        waiters[0].found_nodes();
        waiters[1].found_nodes();
        assert_eq!((of(WaitsFor::Turn).sequences, of(WaitsFor::Room).sequences), (1, 1));
        assert_eq!(waiting.without_nodes(), BTreeMap::new());
        waiters[0].placed();
        drop(waiters);
        assert!(waiting.0.lock().is_empty());
    }
}
