//! Engine of a simulated decode node: the real engine, with a model that only takes time.

use std::{sync::Arc, time::Duration};

use overfill_decode_node::{
    engine::{Compute, Engine},
    sequence::Sequence,
};
use overfill_kv::{BLOCK_TOKENS, BlockId, KvStore as _, OutputToken};
use overfill_model::ModelError;
use overfill_node::Turn;

use crate::{
    content::{Content, FULL, LayerWindows, PRUNED, next_token, row_place},
    guard::{Guard, Witness},
    pace::Pace,
};

/// Polling interval of the real engine.
const POLL: Duration = Duration::from_millis(5);

/// Simulated model that chooses tokens and checks the KV it reads.
pub struct Decoder {
    /// KV memory of the node.
    pub guard: Arc<Guard>,
    /// For each layer of this model, the corresponding layer of the full model.
    pub layers: Vec<u32>,
    /// Sliding windows of the full model's layers.
    pub windows: LayerWindows,
    /// Name of the node.
    pub name: String,
    /// Receives reports of wrong KV.
    pub witness: Witness,
}

impl Compute for Decoder {
    fn step(&mut self, sequences: &[&Sequence]) -> Result<Vec<OutputToken>, ModelError> {
        let token = |sequence: &&Sequence| {
            self.guard.seal(&sequence.blocks[sequence.forgotten..]);
            self.attend(sequence);
            OutputToken { token: next_token(&sequence.tokens), logprob: f32::NAN, top: Vec::new() }
        };
        Ok(sequences.iter().map(token).collect())
    }
}

impl Decoder {
    /// Checks KV-5: the prompt's KV is the full model's, the rest was written here. Then writes the KV of the last
    /// token.
    fn attend(&self, sequence: &Sequence) {
        let prompt = sequence.request.tokens.len();
        let last = sequence.tokens.len() - 1;
        let [full, own] =
            [(prompt, FULL), (last + 1, PRUNED)].map(|(n, model)| Content::new(&sequence.tokens[..n], model));
        // Until the first own token is written, the prompt's last block is entirely as it was sent.
        let sent = if last == prompt { prompt.next_multiple_of(BLOCK_TOKENS) } else { prompt };
        for (layer, full_layer) in self.layers.iter().enumerate() {
            let visible = self.windows[*full_layer as usize].map_or(0, |window| (last + 1).saturating_sub(window));
            let mut wrong = None;
            let check = &mut |i: usize, bytes: &[u8]| {
                for position in (i * BLOCK_TOKENS).max(visible)..((i + 1) * BLOCK_TOKENS).min(sent.max(last)) {
                    let content = if position < sent { &full } else { &own };
                    if bytes[row_place(position)] != content.row(*full_layer, position) {
                        wrong.get_or_insert(position);
                    }
                }
            };
            self.guard.memory.read(layer, &sequence.blocks, check).expect("a sequence's blocks are the node's");
            if let Some(position) = wrong {
                let (name, id) = (&self.name, &sequence.request.id);
                let what = format!(
                    "KV-5: {name} decodes {id} (prompt of {prompt}, now {last}) over wrong KV: layer {layer}, position {position}"
                );
                self.witness.violated(what);
            }
            let block: BlockId = sequence.blocks[last / BLOCK_TOKENS];
            let write = &mut |_: usize, bytes: &mut [u8]| {
                bytes[row_place(last)].copy_from_slice(&own.row(*full_layer, last));
            };
            self.guard.memory.write(layer, &[block], write).expect("a sequence's blocks are the node's");
        }
    }
}

/// Runs the engine until no work is left and no more can arrive.
pub async fn run(mut engine: Engine<Decoder>, guard: Arc<Guard>, pace: Pace) {
    loop {
        let turn = engine.turn();
        for (request, lease) in engine.reserved() {
            let held = overfill_kv::blocks_for(request.tokens.len()) - lease.len();
            guard.will_fill(lease, held, || Content::new(&request.tokens, FULL));
        }
        match turn {
            Turn::Computed => pace.step().await,
            Turn::Idle => tokio::time::sleep(POLL).await,
            Turn::Over => return,
        }
    }
}
