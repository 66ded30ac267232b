//! KV memory that checks who writes to it, and what is written.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
};

use overfill_kv::{BlockId, BlockLease, BlockPool, KvMemory, KvStore, StoreError};
use overfill_transport::MemoryStore;
use parking_lot::Mutex;

use crate::content::{BLOCK_BYTES, Content};

/// Records the first violation of an invariant. Tasks report violations here, since their panics might be lost.
#[derive(Clone, Default)]
pub struct Witness(Arc<Mutex<Option<String>>>);

impl Witness {
    /// Reports a violation.
    pub fn violated(&self, what: impl Into<String>) {
        self.0.lock().get_or_insert(what.into());
    }

    /// Returns the first violation.
    pub fn verdict(&self) -> Option<String> {
        self.0.lock().clone()
    }
}

/// Permitted use of a block by the transport.
enum Use {
    /// The block contains or will contain this block of a prompt, to be sent by a prefill node.
    Sent(Arc<Content>, usize),
    /// The block is to receive this block of a prompt on a decode node, while the lease lives.
    Filled(Arc<Content>, usize, Weak<BlockLease>),
    /// The content is in use, and the transport must not write to it.
    Sealed,
}

/// KV memory of a node, as the transport accesses it.
pub struct Guard {
    /// The memory itself, as the engine accesses it.
    pub memory: Arc<MemoryStore>,
    /// For each layer of this model, the corresponding layer of the full model.
    layers: Vec<u32>,
    pool: BlockPool,
    uses: Mutex<BTreeMap<BlockId, Use>>,
    /// Frames may arrive damaged. Their content may then be wrong until the checksum is verified.
    damage: bool,
    witness: Witness,
    name: String,
}

impl Guard {
    /// Creates the memory of node `name`.
    pub fn new(name: &str, layers: &[u32], pool: &BlockPool, damage: bool, witness: &Witness) -> Arc<Self> {
        Arc::new(Self {
            memory: Arc::new(MemoryStore::new(layers.len(), pool.total(), BLOCK_BYTES)),
            layers: layers.to_vec(),
            pool: pool.clone(),
            uses: Mutex::default(),
            damage,
            witness: witness.clone(),
            name: name.to_owned(),
        })
    }

    /// Declares that the engine computes `content` into these blocks.
    pub fn will_send(&self, blocks: &[BlockId], content: &Arc<Content>) {
        let mut uses = self.uses.lock();
        for (index, block) in blocks.iter().enumerate() {
            uses.insert(*block, Use::Sent(content.clone(), index));
        }
    }

    /// Declares that the blocks of `content` from `first` on will arrive in the blocks of `lease`. Repeated calls are
    /// no-ops.
    pub fn will_fill(&self, lease: &Arc<BlockLease>, first: usize, content: impl FnOnce() -> Content) {
        let mut uses = self.uses.lock();
        let weak = Arc::downgrade(lease);
        let known = |block| matches!(uses.get(block), Some(Use::Filled(_, _, known)) if known.ptr_eq(&weak));
        if lease.blocks().first().is_none_or(known) {
            return;
        }
        let content = Arc::new(content());
        for (i, block) in lease.blocks().iter().enumerate() {
            if let Some(Use::Filled(_, _, last)) = uses.get(block)
                && last.strong_count() > 0
            {
                let name = &self.name;
                self.witness
                    .violated(format!("KV-1: {name}: block {block:?} was allocated again while a writer has it"));
            }
            uses.insert(*block, Use::Filled(content.clone(), first + i, weak.clone()));
        }
    }

    /// Declares that the content of these blocks is in use.
    pub fn seal(&self, blocks: &[BlockId]) {
        let mut uses = self.uses.lock();
        for block in blocks {
            uses.insert(*block, Use::Sealed);
        }
    }

    fn check_sent(&self, layer: usize, id: BlockId, bytes: &[u8]) {
        let name = &self.name;
        if self.pool.holders(id) == 0 {
            self.witness.violated(format!("KV-2: {name}: block {id:?} is sent without a holder"));
        }
        match self.uses.lock().get(&id) {
            Some(Use::Sent(content, index)) if content.block(self.layers[layer], *index) == *bytes => {}
            Some(Use::Sent(_, index)) => {
                let what = format!("KV-2: {name}: block {id:?} is sent as block {index} of its prompt, but is not");
                self.witness.violated(what);
            }
            _ => self.witness.violated(format!("KV-2: {name}: block {id:?} is sent, but was not computed")),
        }
    }

    /// Checks a write of the transport. `before` and `now` are the block's content before and after it.
    fn check_written(&self, layer: usize, id: BlockId, before: &[u8], now: &[u8]) {
        let name = &self.name;
        match self.uses.lock().get(&id) {
            Some(Use::Filled(content, index, lease)) if lease.strong_count() > 0 && self.pool.holders(id) > 0 => {
                let meant = content.block(self.layers[layer], *index);
                let foreign = (0..now.len()).any(|i| now[i] != before[i] && now[i] != meant[i]);
                if foreign && !self.damage {
                    self.witness.violated(format!("KV-1: {name}: block {id:?} gets the KV of another request"));
                }
            }
            Some(Use::Filled(..)) => {
                self.witness.violated(format!("KV-1: {name}: block {id:?} is written to after its release"));
            }
            _ => self.witness.violated(format!("KV-1: {name}: block {id:?} is written to while it is in use")),
        }
    }
}

impl KvStore for Guard {
    fn num_layers(&self) -> usize {
        self.memory.num_layers()
    }

    fn num_blocks(&self) -> usize {
        self.memory.num_blocks()
    }

    fn block_bytes(&self) -> usize {
        self.memory.block_bytes()
    }

    fn memory(&self) -> KvMemory {
        self.memory.memory()
    }

    fn read(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &[u8])) -> Result<(), StoreError> {
        self.memory.read(layer, blocks, &mut |i, bytes| {
            self.check_sent(layer, blocks[i], bytes);
            f(i, bytes);
        })
    }

    fn write(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &mut [u8])) -> Result<(), StoreError> {
        self.memory.write(layer, blocks, &mut |i, bytes| {
            let before = bytes.to_vec();
            f(i, bytes);
            self.check_written(layer, blocks[i], &before, bytes);
        })
    }

    fn view(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(&[&[u8]])) -> Result<(), StoreError> {
        self.memory.view(layer, blocks, &mut |all| {
            for (id, bytes) in blocks.iter().zip(all) {
                self.check_sent(layer, *id, bytes);
            }
            f(all);
        })
    }

    fn edit(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(&mut [&mut [u8]])) -> Result<(), StoreError> {
        self.memory.edit(layer, blocks, &mut |all| {
            let before: Vec<Vec<u8>> = all.iter().map(|bytes| bytes.to_vec()).collect();
            f(all);
            for ((id, before), now) in blocks.iter().zip(&before).zip(all.iter()) {
                self.check_written(layer, *id, before, now);
            }
        })
    }
}
