//! A step of extensions waits for others that are expected soon. The engine is the real one, its model only takes time.

#![allow(clippy::unwrap_used)]

use std::{sync::Arc, time::Duration};

use overfill_kv::{BlockLease, BlockPool, OutputToken, RequestId, SamplingParams, Ticket};
use overfill_model::{LayerSink, ModelError};
use overfill_node::{LoadState, NodeMetrics, Turn};
use overfill_prefill_node::{
    compute::{ChunkOutput, Compute, PromptChunk},
    engine::{Engine, EngineHandle, EngineLimits},
    extension::{ExtendError, Extended, Extension, OpenLimits},
    handoff::HandoffContext,
    job::{JobEvent, Request},
    score::{ScoreChunk, Scored},
};
use overfill_transport::{MemoryStore, TransferConfig};
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
    time::{Instant, sleep},
};
use tracing::Span;

const STEP: Duration = Duration::from_millis(10);
/// Time between an extension of a sequence and the next one.
const PAUSE: Duration = Duration::from_millis(2);
const PROMPT_TOKENS: usize = 20;

/// Always chooses token 7.
struct Sevens;

fn seven() -> OutputToken {
    OutputToken { token: 7, logprob: 0.0, top: Vec::new() }
}

impl Compute for Sevens {
    fn step(&mut self, chunks: &[PromptChunk<'_>], _: Arc<dyn LayerSink>) -> Result<Vec<ChunkOutput>, ModelError> {
        let output = |chunk: &PromptChunk<'_>| ChunkOutput {
            logprobs: Vec::new(),
            first_token: chunk.is_last().then(seven),
            choices: vec![seven(); chunk.choices()],
        };
        Ok(chunks.iter().map(output).collect())
    }

    fn score(&mut self, _: &ScoreChunk<'_>, _: &Arc<BlockLease>) -> Result<Scored, ModelError> {
        unreachable!("no score is requested")
    }
}

type Reply = oneshot::Receiver<Result<Extended, ExtendError>>;

/// An engine with open prefills.
struct Rig {
    engine: Engine<Sevens>,
    handle: EngineHandle,
    load: Arc<LoadState>,
    /// They keep the prefills open.
    open: Vec<mpsc::Receiver<JobEvent>>,
    /// Number of tokens of each.
    tokens: Vec<usize>,
}

impl Rig {
    /// With two open prefills that have been extended together often enough for their pauses to be known. The next pause is over.
    async fn new(max_running: usize) -> Self {
        let pool = BlockPool::new(64);
        let metrics = NodeMetrics::new("full", "").unwrap();
        let load = LoadState::new(pool.clone(), metrics, None, Duration::from_secs(60));
        let limits = EngineLimits {
            max_batch_tokens: 512,
            step_target: Duration::from_secs(1),
            max_running,
            max_waiting: 8,
            open: OpenLimits { max_blocks: 32, max_idle: Duration::from_secs(30) },
        };
        let context = HandoffContext {
            runtime: Handle::current(),
            store: Arc::new(MemoryStore::new(1, 64, 16)),
            pool,
            config: TransferConfig::default(),
            load: load.clone(),
        };
        let (handle, engine) = Engine::new(Sevens, "full".into(), limits, context);
        let mut rig = Self { engine, handle, load, open: Vec::new(), tokens: vec![PROMPT_TOKENS; 2] };
        for name in [0, 1] {
            let events = rig.submit(name);
            rig.open.push(events);
            assert_eq!(rig.turn().await, Turn::Computed);
        }
        for _ in 0..2 {
            sleep(PAUSE).await;
            let replies = [0, 1].map(|i| rig.ask(i));
            for mut reply in replies {
                while reply.is_empty() {
                    assert_eq!(rig.turn().await, Turn::Computed);
                }
                assert_eq!(reply.try_recv().unwrap().unwrap().tokens, [seven()]);
            }
        }
        sleep(PAUSE).await;
        rig
    }

    fn submit(&self, name: u8) -> mpsc::Receiver<JobEvent> {
        let request = Request {
            id: RequestId(name.to_string()),
            tokens: (0..PROMPT_TOKENS as u32).map(|token| token + 100 * u32::from(name)).collect(),
            generated: 0,
            sampling: SamplingParams::greedy(),
            constraint: None,
            prompt_logprobs: false,
            handoff: None,
            lease: Some(Ticket([name; 16])),
            deadline: Instant::now() + Duration::from_secs(60),
            span: Span::none(),
        };
        self.handle.submit(request).unwrap()
    }

    /// Extends an open prefill by the token that was chosen last.
    fn ask(&mut self, i: usize) -> Reply {
        let (reply, result) = oneshot::channel();
        let extension = Extension {
            id: RequestId(i.to_string()),
            lease: Ticket([i as u8; 16]),
            position: self.tokens[i],
            tokens: vec![7],
            standing: 1,
            choose: true,
            handoff: None,
            handoff_end_blocks: 0,
            arrived: Instant::now(),
            deadline: Instant::now() + Duration::from_secs(60),
            reply,
        };
        self.tokens[i] += 1;
        self.handle.extend(extension).unwrap();
        result
    }

    /// One turn of the engine. A step takes [`STEP`].
    async fn turn(&mut self) -> Turn {
        let turn = self.engine.begin();
        if turn == Turn::Computed {
            sleep(STEP).await;
        }
        self.engine.finish();
        turn
    }
}

#[tokio::test(start_paused = true)]
async fn a_step_waits_for_a_sequence_that_is_expected_soon() {
    let mut rig = Rig::new(4).await;
    let mut first = rig.ask(0);
    assert_eq!(rig.turn().await, Turn::Idle);
    sleep(PAUSE / 8).await;
    let mut second = rig.ask(1);
    assert_eq!(rig.turn().await, Turn::Computed);
    assert!(first.try_recv().unwrap().is_ok() && second.try_recv().unwrap().is_ok(), "both are in one step");
}

#[tokio::test(start_paused = true)]
async fn a_step_does_not_wait_long_for_a_sequence_that_does_not_come() {
    let mut rig = Rig::new(4).await;
    let mut first = rig.ask(0);
    assert_eq!(rig.turn().await, Turn::Idle);
    sleep(PAUSE / 2).await;
    assert_eq!(rig.turn().await, Turn::Computed);
    assert!(first.try_recv().unwrap().is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_prompt_ends_the_wait() {
    let mut rig = Rig::new(4).await;
    let mut first = rig.ask(0);
    assert_eq!(rig.turn().await, Turn::Idle);
    let _prompt = rig.submit(9);
    assert_eq!(rig.turn().await, Turn::Computed);
    assert!(first.try_recv().unwrap().is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_drain_ends_the_wait() {
    let mut rig = Rig::new(4).await;
    let mut first = rig.ask(0);
    assert_eq!(rig.turn().await, Turn::Idle);
    rig.load.drain();
    assert_eq!(rig.turn().await, Turn::Computed);
    assert!(first.try_recv().unwrap().is_ok());
}

#[tokio::test(start_paused = true)]
async fn nobody_is_waited_for_who_has_left_or_has_no_room() {
    let mut rig = Rig::new(1).await;
    let mut first = rig.ask(0);
    assert_eq!(rig.turn().await, Turn::Computed);
    assert!(first.try_recv().unwrap().is_ok());

    let mut rig = Rig::new(4).await;
    drop(rig.open.pop());
    let mut first = rig.ask(0);
    assert_eq!(rig.turn().await, Turn::Computed);
    assert!(first.try_recv().unwrap().is_ok());
}
