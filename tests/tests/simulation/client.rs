//! The simulated router with the real router's core, and clients that check every token.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use futures::StreamExt as _;
use overfill_cluster::{Shutdown, discovery::Members};
use overfill_kv::{FinishReason, Mode, SamplingParams};
use overfill_router::{
    Config,
    parts::{Core, Generation, Metrics, Nodes, Output, follow_capacity, new_request_id},
};
use overfill_simulated::EOS;
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    MAX_ASKED,
    content::{PRUNED, output},
    guard::Witness,
};

/// Time after which a client retries if the router knows no model.
const ASK_AGAIN: Duration = Duration::from_millis(20);
/// Interval at which the number of usable nodes is updated.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A client's request.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Prompt token ids.
    pub prompt: Arc<[u32]>,
    /// Maximum number of tokens to generate.
    pub max_tokens: u32,
    /// What the full model does after the first token.
    pub mode: Mode,
    /// Time limit.
    pub time: Duration,
    /// Whether generation continues past the end-of-text token.
    pub ignore_eos: bool,
    /// Time that the client sleeps after each token.
    pub pause: Duration,
    /// Tenant of the client.
    pub tenant: &'static str,
    /// Priority. Lower values are served first.
    pub priority: i32,
}

/// End of a request.
#[derive(Clone, Debug, PartialEq)]
pub enum End {
    /// Complete, after this many migrations.
    Whole(u32),
    /// Failed with this error.
    Failed(String),
    /// The client disconnected.
    Cancelled,
    /// The router crashed.
    Lost,
}

/// A request with its progress.
pub struct Record {
    /// The request.
    pub ask: Ask,
    /// Simulated time at which it was sent.
    pub sent_at: Duration,
    /// Makes the client disconnect.
    pub cancel: CancellationToken,
    progress: Mutex<Progress>,
}

#[derive(Default)]
struct Progress {
    end: Option<End>,
    /// Arrival time of each token in simulated microseconds, and the token.
    trace: Vec<(u64, u32)>,
}

impl Record {
    /// Records a request sent now.
    pub fn new(ask: Ask, sent_at: Duration) -> Arc<Self> {
        Arc::new(Self { ask, sent_at, cancel: CancellationToken::new(), progress: Mutex::default() })
    }

    /// Returns how the request ended, or `None` while it runs.
    pub fn end(&self) -> Option<End> {
        self.progress.lock().end.clone()
    }

    /// Sets the end unless the request has already ended.
    pub fn set_end(&self, end: End) {
        self.progress.lock().end.get_or_insert(end);
    }

    /// Returns the arrival times in microseconds and the tokens so far.
    pub fn trace(&self) -> Vec<(u64, u32)> {
        self.progress.lock().trace.clone()
    }

    /// Time by which the request must have ended, apart from slack.
    pub fn due(&self) -> Duration {
        // Tokens that arrived before the deadline are still read after it.
        self.sent_at + self.ask.time + self.ask.pause * (self.ask.max_tokens + 1)
    }

    async fn receive(&self, core: &Core, witness: &Witness) -> End {
        let Ask { prompt, max_tokens, mode, time, ignore_eos, pause, tenant, priority } = &self.ask;
        let arrived = Instant::now();
        let model = loop {
            match core.model(PRUNED, arrived, Some(*time)).await {
                Ok(model) => break model,
                Err(e) if arrived.elapsed() >= *time => return End::Failed(format!("no model: {e}")),
                Err(_) => sleep(ASK_AGAIN).await,
            }
        };
        let generation = Generation {
            request_id: new_request_id(),
            prompt: prompt.clone(),
            sampling: SamplingParams::greedy(),
            max_tokens: *max_tokens,
            stop_token_ids: if *ignore_eos { [].into() } else { model.eos_token_ids.clone() },
            stop: Vec::new(),
            include_stop: false,
            skip_special: true,
            shown_special: [].into(),
            prompt_logprobs: false,
            mode: Some(*mode),
            priority: *priority,
            arrived,
            time: *time,
            model,
        };
        let tenant = core.identify(None, Some(tenant));
        let place = match tenant.and_then(|tenant| core.enter(&tenant, std::slice::from_ref(&generation))) {
            Ok(mut places) => places.pop().expect("a place for each sequence"),
            Err(e) => return End::Failed(e.to_string()),
        };
        let expected = output(prompt, *max_tokens, *ignore_eos);
        let mut outputs = pin!(core.generate(place, generation));
        let mut received = String::new();
        let mut count = 0;
        while let Some(output) = outputs.next().await {
            match output {
                Ok(Output::Token { token, text, .. }) => {
                    let now = turmoil::sim_elapsed().unwrap_or_default().as_micros() as u64;
                    self.progress.lock().trace.push((now, token.token));
                    if expected.get(count) != Some(&token.token) {
                        let (got, expected) = (token.token, expected.get(count));
                        witness.violated(format!("KV-6: token {count} of {self:?} is {got}, not {expected:?}"));
                    }
                    count += 1;
                    received += &text;
                }
                Ok(Output::Finished(finished)) => {
                    received += &finished.text;
                    let stops = !ignore_eos && expected.last() == Some(&EOS);
                    let reason = if stops { FinishReason::Stop } else { FinishReason::Length };
                    let letters = expected.iter().filter(|token| **token != EOS).map(|token| (token - 3) as u8 as char);
                    let whole = count == expected.len()
                        && finished.completion_tokens as usize == count
                        && finished.reason == reason
                        && received == letters.collect::<String>();
                    if !whole {
                        witness
                            .violated(format!("KV-6: {self:?} ended with {count} tokens, {received:?}: {finished:?}"));
                    }
                    return End::Whole(finished.timings.migrations);
                }
                Ok(Output::PromptLogprobs(_)) => witness.violated("KV-6: unrequested log-probabilities"),
                Err(e) => return End::Failed(e.to_string()),
            }
            if !pause.is_zero() {
                sleep(*pause).await;
            }
        }
        witness.violated(format!("KV-6: the stream of {self:?} closed without a final event"));
        End::Failed("no end".into())
    }
}

impl std::fmt::Debug for Record {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Ask { prompt, max_tokens, time, pause, .. } = &self.ask;
        let (length, at) = (prompt.len(), self.sent_at);
        write!(f, "request at {at:?} ({length} + {max_tokens} tokens, {time:?}, pause {pause:?}")?;
        write!(f, ", {} tokens: {:?})", self.trace().len(), self.end())
    }
}

/// The router's host, which starts the router repeatedly.
#[derive(Clone)]
pub struct RouterPlace {
    /// Settings of the router.
    pub config: Config,
    /// Source of nodes, unless the settings list them.
    pub members: Option<Arc<watch::Sender<Members>>>,
    /// Receives reports of wrong tokens.
    pub witness: Witness,
    /// The running router, if any.
    pub process: Arc<Mutex<Option<RouterProcess>>>,
}

/// Handle of a running router.
pub struct RouterProcess {
    /// Core of the router.
    pub core: Core,
    /// Sends requests to the router's clients.
    pub clients: mpsc::Sender<Arc<Record>>,
    /// Number of nodes that the router considers usable.
    pub usable_nodes: Arc<AtomicUsize>,
}

impl RouterPlace {
    /// Runs a router. The host calls it at each start.
    pub async fn run(self) -> turmoil::Result {
        let shutdown = Shutdown::new();
        let nodes = Nodes::follow(&self.config, &shutdown);
        if let Some(members) = &self.members {
            nodes.follow_members(members.subscribe(), &shutdown);
        }
        let core = Core::new(nodes, Arc::new(Metrics::new()?), &self.config);
        let (clients, mut asked) = mpsc::channel::<Arc<Record>>(MAX_ASKED);
        tokio::spawn(follow_capacity(core.clone(), shutdown.token()));
        let usable_nodes = Arc::new(AtomicUsize::new(0));
        *self.process.lock() = Some(RouterProcess { core: core.clone(), clients, usable_nodes: usable_nodes.clone() });
        let nodes = core.nodes.clone();
        tokio::task::spawn_local(async move {
            loop {
                let view = nodes.view();
                let usable = view.prefill.iter().chain(&view.decode).filter(|node| node.admits());
                usable_nodes.store(usable.count(), Relaxed);
                sleep(LOOK_AGAIN).await;
            }
        });
        while let Some(record) = asked.recv().await {
            let (core, witness) = (core.clone(), self.witness.clone());
            tokio::task::spawn_local(async move {
                let end = tokio::select! {
                    biased;
                    () = record.cancel.cancelled() => End::Cancelled,
                    end = record.receive(&core, &witness) => end,
                };
                record.set_end(end);
            });
        }
        Ok(())
    }
}
