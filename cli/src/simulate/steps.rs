//! Models that only take time: as long as the profile says.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use overfill_decode_node::{
    compute::{Compute as DecodeCompute, Stepping},
    engine as decode,
};
use overfill_kv::{BlockLease, OutputToken};
use overfill_model::{LayerSink, ModelError};
use overfill_node::{LoadState, Turn};
use overfill_prefill_node::{
    compute::{ChunkOutput, Compute as PrefillCompute, PromptChunk},
    engine as prefill,
    score::{ScoreChunk, Scored},
};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use tokio::time::{Instant, sleep, sleep_until};

use super::clock::Clock;
use crate::plan::cluster::{NodeModel, draw};

/// Layers of the simulated models. The KV of a layer leaves when it is computed, so there are some.
pub const LAYERS: u32 = 4;
/// Every output token. It does not end the text.
const TOKEN: u32 = 100;
/// Seconds after which an engine that has requests looks whether blocks are free, as the shipped loops do.
const POLL_SECONDS: f64 = 0.005;
/// Resolution of timers.
const RESOLUTION: Duration = Duration::from_millis(1);

/// How long steps take.
#[derive(Clone)]
pub struct Steps {
    /// The model and its machine.
    pub model: Arc<NodeModel>,
    /// Converts simulated time.
    pub clock: Clock,
    /// Random numbers of all nodes.
    pub rng: Arc<Mutex<StdRng>>,
    /// Number of nodes that compute on the machine that all nodes share. `None`: each has its own machine.
    pub machine: Option<Arc<AtomicUsize>>,
}

impl Steps {
    fn prefill(&self, rows: usize, context: f64) -> f64 {
        self.model.prefill.seconds(rows as f64, context) * draw(&self.model.prefill_spread, 1.0, &mut self.rng.lock())
    }

    fn decode(&self, sequences: usize, context: usize) -> f64 {
        self.model.decode_seconds(sequences, context) * draw(&self.model.decode_spread, 1.0, &mut self.rng.lock())
    }

    /// Lets the time of a step pass. Calls `part` at `parts` equal distances, the last time at the end. `free`: when the
    /// step before ended exactly, which timers round up.
    async fn pass(&self, seconds: f64, parts: usize, free: &mut Instant, mut part: impl FnMut(usize)) {
        let share = self.machine.as_ref().map_or(1, |computing| computing.fetch_add(1, Relaxed) + 1);
        let time = self.clock.real(seconds * share as f64);
        let now = Instant::now();
        let began = if now.saturating_duration_since(*free) <= RESOLUTION { *free } else { now };
        for i in 0..parts {
            sleep_until(began + time * (i + 1) as u32 / parts as u32).await;
            part(i);
        }
        *free = began + time;
        if let Some(computing) = &self.machine {
            computing.fetch_sub(1, Relaxed);
        }
    }

    /// Waits until the load changes. No message says that blocks are free, so an engine that has requests polls.
    async fn wait(&self, load: &LoadState) {
        let mut watch = load.watch();
        match load.load().running + load.load().waiting {
            0 => load.changed(&mut watch).await,
            _ => tokio::select! {
                () = load.changed(&mut watch) => {}
                () = sleep(self.clock.real(POLL_SECONDS)) => {}
            },
        }
    }
}

fn token() -> OutputToken {
    OutputToken { token: TOKEN, logprob: f32::NAN, top: Vec::new() }
}

/// What a step that was computed still has to take.
type Taken<T> = Arc<Mutex<Option<T>>>;

/// The model of a prefill node.
#[derive(Clone)]
pub struct Prefiller {
    steps: Steps,
    taken: Taken<(f64, Arc<dyn LayerSink>)>,
}

impl Prefiller {
    /// A model whose steps take as long as `steps` says.
    pub fn new(steps: Steps) -> Self {
        Self { steps, taken: Taken::default() }
    }

    /// Runs `engine`, which computes with this model, until no work is left and no more can arrive.
    pub fn drive(&self, mut engine: prefill::Engine<Self>, load: Arc<LoadState>) -> impl Future<Output = ()> + use<> {
        let (steps, taken) = (self.steps.clone(), self.taken.clone());
        async move {
            let mut free = Instant::now();
            loop {
                let turn = engine.begin();
                let step = taken.lock().take();
                if let Some((seconds, layers)) = step {
                    steps.pass(seconds, LAYERS as usize, &mut free, |layer| layers.layer_ready(layer)).await;
                }
                engine.finish();
                match turn {
                    Turn::Computed => {}
                    Turn::Idle => steps.wait(&load).await,
                    Turn::Over => return,
                }
            }
        }
    }
}

impl PrefillCompute for Prefiller {
    fn step(&mut self, chunks: &[PromptChunk<'_>], layers: Arc<dyn LayerSink>) -> Result<Vec<ChunkOutput>, ModelError> {
        let rows = chunks.iter().map(|chunk| chunk.tokens.len()).sum();
        let context = chunks.iter().map(|chunk| (chunk.tokens.len() * chunk.tokens.start) as f64).sum();
        *self.taken.lock() = Some((self.steps.prefill(rows, context), layers));
        let output = |chunk: &PromptChunk<'_>| ChunkOutput {
            logprobs: Vec::new(),
            first_token: chunk.is_last().then(token),
            choices: (0..chunk.choices()).map(|_| token()).collect(),
        };
        Ok(chunks.iter().map(output).collect())
    }

    /// Takes no time: simulated routers watch no answers.
    fn score(&mut self, chunk: &ScoreChunk<'_>, _: &Arc<BlockLease>) -> Result<Scored, ModelError> {
        let tokens = || chunk.scored().map(|_| token()).collect();
        Ok(Scored { choices: tokens(), logprobs: tokens() })
    }
}

/// The model of a decode node.
#[derive(Clone)]
pub struct Decoder {
    steps: Steps,
    taken: Taken<f64>,
}

impl Decoder {
    /// A model whose steps take as long as `steps` says.
    pub fn new(steps: Steps) -> Self {
        Self { steps, taken: Taken::default() }
    }

    /// Runs `engine`, which computes with this model, until no work is left and no more can arrive.
    pub fn drive(&self, mut engine: decode::Engine<Self>, load: Arc<LoadState>) -> impl Future<Output = ()> + use<> {
        let (steps, taken) = (self.steps.clone(), self.taken.clone());
        let commanded = engine.commanded();
        async move {
            let mut free = Instant::now();
            loop {
                let turn = engine.begin();
                let step = taken.lock().take();
                if let Some(seconds) = step {
                    steps.pass(seconds, 1, &mut free, |_| ()).await;
                }
                engine.finish();
                match turn {
                    Turn::Computed => {}
                    Turn::Idle => tokio::select! {
                        () = steps.wait(&load) => {}
                        () = commanded.notified() => {}
                    },
                    Turn::Over => return,
                }
            }
        }
    }
}

impl DecodeCompute for Decoder {
    fn step(&mut self, sequences: &[Stepping<'_>]) -> Result<Vec<Option<OutputToken>>, ModelError> {
        let context = sequences.iter().map(|stepping| stepping.tokens.end).sum();
        *self.taken.lock() = Some(self.steps.decode(sequences.len(), context));
        Ok(sequences.iter().map(|stepping| stepping.is_last().then(token)).collect())
    }
}
