//! Engine of a simulated decode node: the real engine, with a model that only takes time.

use std::{sync::Arc, time::Duration};

use overfill_decode_node::{
    compute::{Compute, Stepping},
    engine::Engine,
    sequence::Sequence,
};
use overfill_kv::{BLOCK_TOKENS, BlockId, KvStore as _, Mode, OutputToken};
use overfill_model::ModelError;
use overfill_node::Turn;

use crate::{
    content::{Content, FULL, LayerWindows, PRUNED, draft_token, next_token, row_place},
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
    fn step(&mut self, sequences: &[Stepping<'_>]) -> Result<Vec<Option<OutputToken>>, ModelError> {
        let token = |stepping: &Stepping<'_>| {
            let Stepping { sequence, tokens } = stepping;
            self.guard.seal(&sequence.blocks[sequence.forgotten..]);
            for position in tokens.clone() {
                self.attend(sequence, position);
            }
            let drafted = |tokens: &[u32], exact| OutputToken {
                token: if exact { draft_token(tokens) } else { next_token(tokens) },
                logprob: -1.0,
                top: Vec::new(),
            };
            let exact = sequence.flow.request.mode == Mode::Exact;
            stepping.is_last().then(|| drafted(&sequence.flow.tokens, exact))
        };
        Ok(sequences.iter().map(token).collect())
    }
}

impl Decoder {
    /// Checks KV-5: the prompt's KV is the full model's, and so is that of refreshed blocks. The rest was written here. Then
    /// writes the KV of the token at `last`.
    fn attend(&self, sequence: &Sequence, last: usize) {
        let flow = &sequence.flow;
        let (prompt, refreshed) = (flow.request.tokens.len(), flow.extensions.refreshed_tokens());
        let sent = prompt.max(refreshed);
        let [full, own] = [(sent, FULL), (last + 1, PRUNED)].map(|(n, model)| Content::new(&flow.tokens[..n], model));
        let by_position = flow.request.mode == Mode::Refresh;
        // The rule of mode refresh, exactly: no block too early, none too late.
        let due = (last / BLOCK_TOKENS).saturating_sub(1).max(prompt / BLOCK_TOKENS) * BLOCK_TOKENS;
        if by_position && refreshed != due {
            self.witness.violated(format!("{} feeds {last} with {refreshed} refreshed tokens", self.name));
        }
        // Until the first own token is written, the prompt's last block is entirely as it was sent.
        let end = if last == prompt { prompt.next_multiple_of(BLOCK_TOKENS) } else { last };
        for (layer, full_layer) in self.layers.iter().enumerate() {
            let visible = self.windows[*full_layer as usize].map_or(0, |window| (last + 1).saturating_sub(window));
            let mut wrong = None;
            let check = &mut |i: usize, bytes: &[u8]| {
                for position in (i * BLOCK_TOKENS).max(visible)..((i + 1) * BLOCK_TOKENS).min(end) {
                    let is_sent = position < sent || last == prompt;
                    let content = if is_sent { &full } else { &own };
                    if bytes[row_place(position)] != content.row(*full_layer, position) {
                        wrong.get_or_insert(position);
                    }
                }
            };
            self.guard.memory.read(layer, &sequence.blocks, check).expect("a sequence's blocks are the node's");
            if let Some(position) = wrong {
                let (name, id) = (&self.name, &flow.request.id);
                let what = format!(
                    "KV-5: {name} decodes {id} (prompt of {prompt}, {refreshed} refreshed, now {last}) over wrong KV: layer {layer}, position {position}"
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
        for (tokens, block, place) in engine.landings() {
            guard.will_fill(place, block, || Content::new(&tokens[..(block + 1) * BLOCK_TOKENS], FULL));
        }
        match turn {
            Turn::Computed => pace.step().await,
            Turn::Idle => tokio::time::sleep(POLL).await,
            Turn::Over => return,
        }
    }
}
