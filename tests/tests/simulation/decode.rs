//! The engine of a simulated decode node: the real one, but the model takes only time.

use std::{sync::Arc, time::Duration};

use overfill_decode_node::{
    engine::{Compute, Engine},
    sequence::Sequence,
};
use overfill_kv::{BLOCK_TOKENS, BlockId, KvStore as _, OutputToken};
use overfill_model::ModelError;
use overfill_node::Turn;

use crate::{
    content::{Content, FULL, PRUNED, next_token, row_place},
    guard::{Guard, Witness},
    pace::Pace,
};

/// As the real engine's.
const POLL: Duration = Duration::from_millis(5);

/// Chooses tokens, and checks the KV that it has to work with.
pub struct Decoder {
    /// Memory.
    pub guard: Arc<Guard>,
    /// Of the full model, for each layer here.
    pub layers: Vec<u32>,
    /// The node's name.
    pub name: String,
    /// Hears of wrong KV.
    pub witness: Witness,
}

impl Compute for Decoder {
    fn step(&mut self, sequences: &[&Sequence]) -> Result<Vec<OutputToken>, ModelError> {
        let token = |sequence: &&Sequence| {
            self.guard.seal(&sequence.blocks);
            self.attend(sequence);
            OutputToken { token: next_token(&sequence.tokens), logprob: f32::NAN, top: Vec::new() }
        };
        Ok(sequences.iter().map(token).collect())
    }
}

impl Decoder {
    /// KV-5: the prompt's KV is the full model's, the rest is what was written here. Then the last token's is written.
    fn attend(&self, sequence: &Sequence) {
        let prompt = sequence.request.tokens.len();
        let last = sequence.tokens.len() - 1;
        let [full, own] =
            [(prompt, FULL), (last + 1, PRUNED)].map(|(n, model)| Content::new(&sequence.tokens[..n], model));
        // Until anything is written behind it, all of the prompt's last block is as it was sent.
        let sent = if last == prompt { prompt.next_multiple_of(BLOCK_TOKENS) } else { prompt };
        for (layer, full_layer) in self.layers.iter().enumerate() {
            let mut wrong = None;
            let check = &mut |i: usize, bytes: &[u8]| {
                for position in i * BLOCK_TOKENS..((i + 1) * BLOCK_TOKENS).min(sent.max(last)) {
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

/// Lets the engine compute until nothing is left and nothing can come.
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
