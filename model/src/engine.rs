//! The interface between a node and the device that computes. An engine owns a model's weights and KV cache on one
//! device.
//!
//! [`crate::cpu`] and `crate::cuda` implement it with kernels of this crate. For tests, [`crate::tensor`] implements it
//! with candle's tensor operations.

use std::sync::Arc;

use overfill_kv::KvStore;

use crate::{LoadOptions, ModelConfig, ModelError, Outputs, Rows, SequenceSlice, Weights};

/// Receives a notification for each layer whose KV is final for all tokens of one batch.
///
/// Each layer is announced once, in order. The engine may call from any thread, and also after [`Engine::run`] has
/// returned: a GPU reports a finished layer with an event. The engine holds the sink until it has announced the last
/// layer, or until no kernel of the batch is running any more. So whatever the sink owns (for example a lease of the
/// batch's blocks) outlives every write into those blocks.
pub trait LayerSink: Send + Sync {
    /// Layer `layer`'s KV of the batch is in the engine's [`KvStore`]. Must not block.
    fn layer_ready(&self, layer: usize);
}

impl<F: Fn(usize) + Send + Sync> LayerSink for F {
    fn layer_ready(&self, layer: usize) {
        self(layer);
    }
}

/// A model on one device: weights, KV and the forward pass.
pub trait Engine: Send {
    /// Runs a ragged batch. Writes the KV of every slice's tokens into its blocks and notifies `layers` of each layer.
    /// On return, `out` holds what the slices requested.
    ///
    /// A slice's result does not depend on the rest of the batch, nor on how a prompt was split into slices.
    ///
    /// # Errors
    /// An inconsistent batch, or a device fault. The batch's KV is then undefined in layers that `layers` was not
    /// notified of.
    fn run(
        &mut self,
        batch: &[SequenceSlice<'_>],
        layers: &Arc<dyn LayerSink>,
        out: &mut Outputs,
    ) -> Result<(), ModelError>;

    /// The KV cache that [`Self::run`] reads and writes, `[layers][blocks][K|V][kv_heads][16][head_dim]`.
    fn kv(&self) -> Arc<dyn KvStore>;

    /// Loads another model that reads and writes this engine's KV cache. The two engines must not run at the same time. The
    /// caller has checked that the KV of both has the same layout.
    ///
    /// # Errors
    /// The weights do not fit the device, or the configuration.
    fn load_sibling(
        &self,
        config: &ModelConfig,
        weights: &Weights,
        options: &LoadOptions,
    ) -> Result<Box<dyn Engine>, ModelError>;

    /// Changes the number of rows to optimise for, as if the model had been loaded with it.
    fn set_rows(&mut self, rows: Rows);

    /// Whether decode steps run as captured graphs, where the device has them. They do, except in measurements of what
    /// that is worth.
    fn set_graphs(&mut self, on: bool) {
        let _ = on;
    }

    /// Bytes of the weights in memory; `None` where the engine does not know.
    fn weight_bytes(&self) -> Option<usize>;

    /// Bytes of weights that a decode step reads; `None` where the engine does not know.
    fn step_weight_bytes(&self) -> Option<usize>;
}

/// A sink that ignores notifications, for callers that do not send KV while the batch runs.
pub fn no_layers() -> Arc<dyn LayerSink> {
    Arc::new(|_| {})
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use candle_core::Device;
    use overfill_kv::{BLOCK_TOKENS, BlockId, KvDtype, SamplingParams};
    use parking_lot::Mutex;

    use super::*;
    use crate::{
        Choice, ModelConfig, SamplingContext, Want, WeightDtype, WeightFormat, Weights, cpu::CpuEngine, report, sample,
        tensor::TensorEngine,
    };

    const PAIRS: [&str; 12] = [
        "llama-tied",
        "llama-untied",
        "llama-depth",
        "qwen2",
        "qwen3",
        "mistral",
        "gemma2",
        "gemma3",
        "phi3",
        "smollm3",
        "olmo2",
        "granite",
    ];

    fn engines(pair: &str) -> (ModelConfig, [Box<dyn Engine>; 2]) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(pair).join("full");
        let config = ModelConfig::from_folder(&folder).unwrap();
        let weights = Weights::open(&folder).unwrap();
        let (kv, f32) = (KvDtype::Bf16, WeightFormat::F32);
        let kernels = CpuEngine::load(&config, &weights, f32, Rows::Few, kv, 7).unwrap();
        let tensors = TensorEngine::load(&config, &weights, WeightDtype::F32, &Device::Cpu, kv, 7).unwrap();
        (config, [Box::new(kernels), Box::new(tensors)])
    }

    /// Fills the blocks of a sequence that a layer's window has left behind at `position` with NaN.
    pub(crate) fn spoil_unneeded(engine: &dyn Engine, config: &ModelConfig, blocks: &[BlockId], position: usize) {
        for (layer, spec) in config.layers.iter().enumerate() {
            let unneeded = &blocks[..spec.first_visible(position) / BLOCK_TOKENS];
            engine.kv().write(layer, unneeded, &mut |_, bytes| bytes.fill(0xff)).unwrap();
        }
    }

    /// The kernels and the tensor operations agree on the same batches, and read nothing behind a layer's window.
    #[test]
    fn engines_agree() {
        for pair in PAIRS {
            let (config, engines) = engines(pair);
            let tokens: Vec<u32> = (0..70).map(|i| i * 7 % config.vocab_size as u32).collect();
            let blocks: Vec<BlockId> = (0..5).rev().map(BlockId).collect();
            let other: Vec<BlockId> = (5..7).map(BlockId).collect();
            let slice = |tokens, start, blocks, want| SequenceSlice { tokens, start, blocks, want };
            let steps = [
                vec![
                    slice(&tokens[..37], 0, &blocks[..], Want::Nothing),
                    slice(&tokens[3..20], 0, &other[..], Want::AllLogits),
                ],
                vec![
                    slice(&tokens[37..69], 37, &blocks[..], Want::LastLogits),
                    slice(&tokens[9..10], 17, &other[..], Want::LastLogits),
                ],
                vec![slice(&tokens[69..70], 69, &blocks[..], Want::LastLogits)],
            ];
            let [got, expected] = engines.map(|mut engine| {
                steps.each_ref().map(|batch| {
                    spoil_unneeded(&*engine, &config, batch[0].blocks, batch[0].start);
                    let heard = Arc::new(Mutex::new(Vec::new()));
                    let hears = heard.clone();
                    let layers: Arc<dyn LayerSink> = Arc::new(move |layer| hears.lock().push(layer));
                    let mut out = Outputs::default();
                    engine.run(batch, &layers, &mut out).unwrap();
                    assert_eq!(*heard.lock(), (0..config.num_hidden_layers).collect::<Vec<_>>());
                    out.logits().clone()
                })
            });
            for (got, expected) in got.iter().zip(&expected) {
                assert!(got.rows() > 0 && got.rows() == expected.rows());
                for row in 0..got.rows() {
                    for (a, b) in got.row(row).iter().zip(expected.row(row)) {
                        // KV is rounded to bf16, so values near the midpoint may round either way.
                        assert!((a - b).abs() < 2e-2, "{pair} row {row}: {a} by kernels, {b} by tensors");
                    }
                }
            }
        }
    }

    /// Logits of a decode model that takes turns with its full model: `full` computes prompts, `decode` the tokens behind them.
    /// `handed_over` is called after each prompt.
    pub(crate) fn turns(
        full: &mut dyn Engine,
        decode: &mut dyn Engine,
        mut handed_over: impl FnMut(&dyn Engine, &dyn Engine, &[BlockId]),
    ) -> Vec<Vec<f32>> {
        let tokens: Vec<u32> = (3..90).collect();
        let (mut out, mut logits) = (Outputs::default(), Vec::new());
        let tables: [Vec<BlockId>; 2] = [[4, 1, 6].map(BlockId).to_vec(), [0, 5, 2].map(BlockId).to_vec()];
        for (turn, blocks) in tables.iter().enumerate() {
            let prompt = SequenceSlice { tokens: &tokens[turn..35 + turn], start: 0, blocks, want: Want::Nothing };
            full.run(&[prompt], &no_layers(), &mut out).unwrap();
            handed_over(full, decode, blocks);
            // Both sequences go on after the second prompt.
            for position in 35 + turn..37 + turn {
                let step = |(first, blocks): (usize, &'_ Vec<BlockId>)| (position - turn + first, blocks.clone());
                let running: Vec<_> = tables[..=turn].iter().enumerate().map(step).collect();
                let batch: Vec<_> = running
                    .iter()
                    .map(|(at, blocks)| SequenceSlice {
                        tokens: &tokens[*at..=*at],
                        start: *at,
                        blocks,
                        want: Want::LastLogits,
                    })
                    .collect();
                decode.run(&batch, &no_layers(), &mut out).unwrap();
                logits.extend((0..batch.len()).map(|row| out.logits().row(row).to_vec()));
            }
        }
        logits
    }

    /// Copies the KV of blocks, as a handoff does.
    pub(crate) fn hand_over(full: &dyn Engine, decode: &dyn Engine, blocks: &[BlockId]) {
        let (from, to) = (full.kv(), decode.kv());
        for layer in 0..to.num_layers() {
            let mut bytes: Vec<Vec<u8>> = Vec::new();
            from.read(layer, blocks, &mut |_, block| bytes.push(block.to_vec())).unwrap();
            to.write(layer, blocks, &mut |i, block| block.copy_from_slice(&bytes[i])).unwrap();
        }
    }

    /// A sibling attends to its sibling's KV as to KV that was handed over.
    #[test]
    fn siblings_share_their_kv() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/llama-tied/decode");
        let (config, weights) = (ModelConfig::from_folder(&folder).unwrap(), Weights::open(&folder).unwrap());
        let (kv, f32) = (KvDtype::Bf16, WeightFormat::F32);
        let options = LoadOptions { weights: f32, kv_dtype: kv, ..LoadOptions::default() };
        let kernels = CpuEngine::load(&config, &weights, f32, options.rows, kv, 7).unwrap();
        let tensors = TensorEngine::load(&config, &weights, WeightDtype::F32, &Device::Cpu, kv, 7).unwrap();
        let apart: [Box<dyn Engine>; 2] = [Box::new(kernels), Box::new(tensors)];
        for (mut full, mut apart) in engines("llama-tied").1.into_iter().zip(apart) {
            let expected = turns(&mut *full, &mut *apart, hand_over);
            let mut sibling = full.load_sibling(&config, &weights, &options).unwrap();
            let got = turns(&mut *full, &mut *sibling, |_, _, _| {});
            assert_eq!((got.len(), &got), (6, &expected));
        }
    }

    /// Tokens and scores that an engine returns match the logits of the same batch.
    #[test]
    fn choices_and_scores_are_those_of_the_logits() {
        let (_, engines) = engines("llama-tied");
        let tokens: Vec<u32> = (1..20).collect();
        let blocks: Vec<BlockId> = (0..2).map(BlockId).collect();
        let other: Vec<BlockId> = (2..4).map(BlockId).collect();
        let params = SamplingParams { seed: 5, logprobs: Some(3), ..SamplingParams::default() };
        let next = Choice { params: &params, context: SamplingContext::following(&tokens, &[]) };
        for mut engine in engines {
            let mut run = |want: [Want<'_>; 2]| {
                let tables = [&blocks, &other];
                let batch =
                    [0, 1].map(|i| SequenceSlice { tokens: &tokens, start: 0, blocks: tables[i], want: want[i] });
                let mut out = Outputs::default();
                engine.run(&batch, &no_layers(), &mut out).unwrap();
                out
            };
            let logits = run([Want::AllLogits, Want::Nothing]);
            let last = sample(logits.logits().row(18), &params, &next.context);
            let scores: Vec<_> = (0..18).map(|i| report(logits.logits().row(i), tokens[i + 1], 2)).collect();
            let score = Want::Scores { following: &tokens[1..], top: 2, next: Some(next) };
            let mut out = run([score, Want::Next(next)]);
            assert_eq!(out.take_scores(0), scores);
            assert_eq!([0, 1].map(|i| out.take_next(i).unwrap()), [last.clone(), last]);
            assert!(out.take_next(0).is_err() && out.take_next(9).is_err());
            assert_eq!(out.logits().rows(), 0);
            let mut out = run([Want::Nothing, Want::Scores { following: &tokens[1..3], top: 2, next: None }]);
            assert_eq!(out.take_scores(1), scores[..2]);
            assert!(out.take_next(1).is_err());
        }
    }

    #[test]
    fn a_batch_that_contradicts_itself_is_refused() {
        let (config, engines) = engines("qwen3");
        let blocks = [BlockId(0)];
        for mut engine in engines {
            let mut refused = |tokens: &[u32], want| {
                let batch = [SequenceSlice { tokens, start: 0, blocks: &blocks, want }];
                engine.run(&batch, &no_layers(), &mut Outputs::default()).unwrap_err().to_string()
            };
            assert!(refused(&[], Want::Nothing).contains("a slice of 0 tokens"));
            assert!(refused(&[1; 17], Want::Nothing).contains("17 tokens up to 17 has 1 blocks"));
            assert!(refused(&[config.vocab_size as u32], Want::Nothing).contains("not in the vocabulary"));
            let scores = Want::Scores { following: &[1, 2], top: 0, next: None };
            assert!(refused(&[1], scores).contains("2 scores"));
        }
    }
}
