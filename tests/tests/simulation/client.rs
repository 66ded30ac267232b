//! The simulated router: the real one's core, and clients that check every token.

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
use overfill_kv::{FinishReason, SamplingParams};
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

/// A client without a model to ask for asks again after this long.
const ASK_AGAIN: Duration = Duration::from_millis(20);
/// How often it is looked which nodes can be used.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A request, as its client makes it.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Its prompt.
    pub prompt: Arc<[u32]>,
    /// Most tokens that it wants.
    pub max_tokens: u32,
    /// How long it may take.
    pub time: Duration,
    /// Does it go on behind the end of text?
    pub ignore_eos: bool,
    /// How long the client sleeps after each token.
    pub pause: Duration,
    /// Whose it is.
    pub tenant: &'static str,
    /// Lower goes first.
    pub priority: i32,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq)]
pub enum End {
    /// With all of its tokens, after so many migrations.
    Whole(u32),
    /// With an error.
    Failed(String),
    /// Its client went away.
    Cancelled,
    /// Its router crashed.
    Lost,
}

/// A request on its way.
pub struct Record {
    /// What is wanted.
    pub ask: Ask,
    /// When it came, in the simulation's time.
    pub sent_at: Duration,
    /// Makes the client go away.
    pub cancel: CancellationToken,
    progress: Mutex<Progress>,
}

#[derive(Default)]
struct Progress {
    end: Option<End>,
    /// When each token came, in microseconds of the simulation's time.
    trace: Vec<(u64, u32)>,
}

impl Record {
    /// A request that comes now.
    pub fn new(ask: Ask, sent_at: Duration) -> Arc<Self> {
        Arc::new(Self { ask, sent_at, cancel: CancellationToken::new(), progress: Mutex::default() })
    }

    /// How it ended; `None` while it has not.
    pub fn end(&self) -> Option<End> {
        self.progress.lock().end.clone()
    }

    /// It ends, if it has not yet.
    pub fn set_end(&self, end: End) {
        self.progress.lock().end.get_or_insert(end);
    }

    /// Tokens so far, and when they came.
    pub fn trace(&self) -> Vec<(u64, u32)> {
        self.progress.lock().trace.clone()
    }

    /// By then it must have ended, but for some slack.
    pub fn due(&self) -> Duration {
        // What has arrived is read after the deadline, too.
        self.sent_at + self.ask.time + self.ask.pause * (self.ask.max_tokens + 1)
    }

    async fn receive(&self, core: &Core, witness: &Witness) -> End {
        let Ask { prompt, max_tokens, time, ignore_eos, pause, tenant, priority } = &self.ask;
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
            prompt_logprobs: false,
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
                Ok(Output::PromptLogprobs(_)) => witness.violated("KV-6: log-probabilities that nobody wants"),
                Err(e) => return End::Failed(e.to_string()),
            }
            if !pause.is_zero() {
                sleep(*pause).await;
            }
        }
        witness.violated(format!("KV-6: {self:?} ended without an end"));
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

/// The router, as its host starts it again and again.
#[derive(Clone)]
pub struct RouterPlace {
    /// Its settings.
    pub config: Config,
    /// Where it finds nodes, unless they are in its settings.
    pub members: Option<Arc<watch::Sender<Members>>>,
    /// Hears of wrong tokens.
    pub witness: Witness,
    /// What runs there now, if anything does.
    pub process: Arc<Mutex<Option<RouterProcess>>>,
}

/// A running router, from outside.
pub struct RouterProcess {
    /// Its core.
    pub core: Core,
    /// The way to its clients.
    pub clients: mpsc::Sender<Arc<Record>>,
    /// Nodes that it would send requests to.
    pub usable_nodes: Arc<AtomicUsize>,
}

impl RouterPlace {
    /// What the host runs.
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
