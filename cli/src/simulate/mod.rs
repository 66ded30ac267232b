//! `overfill simulate`: a whole cluster on a virtual clock.
//!
//! `overfill plan` judges a steady load with a model of the cluster. A simulation shows what changes over time: load that
//! rises, pools that scale, nodes that start, die or are replaced. So it runs the real thing: the router's core, the
//! nodes' services with their schedulers and drains, discovery, and the handoff with its state machines. Only four parts
//! are simulated: the models, which take as long as the profile says (`steps`), connections (`network`), the autoscaler of
//! Kubernetes (`scaler`) and the start of pods (`pool`).
//!
//! What serving costs beside the steps is not known to the services, which take no simulated time. It comes from the
//! profile's `overhead`: a request is delayed before the router sees it, and its tokens after the first one are counted as
//! late as the handoff's overhead says.
//!
//! Not simulated: several routers, HTTP and text, slow clients, and networks that lose packets.

mod args;
mod client;
mod clock;
mod network;
mod node;
mod pool;
mod print;
mod record;
mod scaler;
mod steps;
mod svg;
#[cfg(test)]
mod tests;

use std::{io::Write as _, path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use overfill_cluster::{Shutdown, discovery::Members};
use overfill_kv::Role;
use overfill_router::{
    Config,
    parts::{Core, Metrics, Nodes, follow_capacity},
};
use parking_lot::Mutex;
use rand::{SeedableRng as _, rngs::StdRng};
use serde_json::json;
use tokio::{sync::watch, task::JoinSet};

pub use args::SimulateArgs;
use args::{Event, Timed};
use clock::Clock;
use network::Network;
use node::{NodeSetup, TOKEN_BYTES};
use pool::Pool;
use record::{PoolSample, Record, Sample, Summary, Used};
use scaler::{PERIOD_SECONDS, Scaler, Scaling};
use steps::Steps;

use crate::bench::serve::summary::Limits;
use crate::plan::cluster::NodeModel;
use crate::plan::mix::Mix;
use crate::plan::profile::{ModelProfile, Profile};

/// Seconds between two looks at the cluster.
const TICK_SECONDS: f64 = 1.0;
/// Seconds without an answer to pings after which the router gives up a node.
const NODE_TIMEOUT_SECONDS: f64 = 6.0;
/// Longest time between two tokens, and silence in a handoff, in seconds.
const PROGRESS_TIMEOUT_SECONDS: f64 = 120.0;

/// Runs the subcommand.
pub fn run(args: SimulateArgs) -> Result<()> {
    let (record, summary) = simulate(&args)?;
    let output = &args.output;
    if let Some(file) = &output.jsonl {
        write_lines(file, &record).with_context(|| format!("writing {}", file.display()))?;
    }
    if let Some(file) = &output.svg {
        svg::write(file, &record).map_err(|e| anyhow::anyhow!("drawing {}: {e}", file.display()))?;
    }
    match output.json {
        true => println!("{}", serde_json::to_string(&summary)?),
        false => print!("{}", print::print(&summary)),
    }
    Ok(())
}

/// Runs the simulation.
///
/// # Errors
/// A setting is wrong, or a file can't be read.
pub fn simulate(args: &SimulateArgs) -> Result<(Record, Summary)> {
    args.check()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build()?;
    let began = std::time::Instant::now();
    let (record, seconds, used) = runtime.block_on(async { Simulation::new(args)?.run(args).await })?;
    // The services still have tasks, which have nothing to do any more.
    runtime.shutdown_background();
    let limits =
        Limits { ttft_limit_seconds: args.output.ttft_limit_seconds, itl_limit_seconds: args.output.itl_limit_seconds };
    let summary = record.summary(seconds, began.elapsed().as_secs_f64(), limits, used);
    Ok((record, summary))
}

fn write_lines(file: &Path, record: &Record) -> Result<()> {
    let mut out = std::io::BufWriter::new(std::fs::File::create(file)?);
    let lines = record.samples.iter().map(|sample| json!({"sample": sample}));
    for line in lines.chain(record.requests.iter().map(|request| json!({"request": request}))) {
        writeln!(out, "{line}")?;
    }
    Ok(out.flush()?)
}

struct Simulation {
    clock: Clock,
    core: Core,
    prefill: Pool,
    decode: Pool,
    mix: Mix,
    rate: f64,
    events: Vec<Timed>,
    client: client::Client,
    itl_limit_seconds: Option<f64>,
    scaled: f64,
}

impl Simulation {
    fn new(args: &SimulateArgs) -> Result<Self> {
        let cluster = &args.cluster;
        let (prefill, decode) = args.settings.profiles(&cluster.profile, cluster.decode_profile.as_deref())?;
        let (mix, rate) = args.load.mix(prefill.kv_pool_tokens)?;
        let model = |profile: &Profile, model: &ModelProfile| {
            NodeModel::new(profile, model).map(Arc::new).context("the profile lists no steps")
        };
        let (full, pruned) = (model(&prefill, &prefill.full)?, model(&decode, decode.decoder())?);
        let clock = Clock::start(full.prefill.base(1.0).min(pruned.decode.base(1.0)));
        let rng = Arc::new(Mutex::new(StdRng::seed_from_u64(!args.seed)));
        let machine = cluster.one_machine.then(Arc::default);
        let network = Network::default();
        let router = router(args, &clock, &network);
        let (shutdown, members) = (Shutdown::new(), Arc::new(watch::Sender::new(Members::new())));
        let nodes = Nodes::follow(&router, &shutdown);
        nodes.follow_members(members.subscribe(), &shutdown);
        let core = Core::new(nodes, Arc::new(Metrics::new()?), &router);
        tokio::spawn(follow_capacity(core.clone(), shutdown.token()));
        let files = Arc::new(overfill_simulated::text_files());
        let bytes_per_second = prefill.transfer_bytes_per_second.min(decode.transfer_bytes_per_second);
        let setup = |role, model: &Arc<NodeModel>| NodeSetup {
            role,
            steps: Steps { model: model.clone(), clock, rng: rng.clone(), machine: machine.clone() },
            kv_blocks: model.kv_blocks,
            limits: args.settings.limits(args.router.max_running),
            max_waiting: cluster.node_max_waiting,
            kv_bytes_per_second: clock.rate(bytes_per_second / prefill.kv_bytes_per_token * TOKEN_BYTES as f64),
            idle_timeout: clock.real(PROGRESS_TIMEOUT_SECONDS),
            deadline: clock.limit(args.router.deadline_seconds),
            network: network.clone(),
            files: files.clone(),
        };
        let scaling = &args.scaling;
        let scaler = |min, max: Option<usize>, target, nodes| {
            let scaling = |max| Scaling { min, max, target, down_seconds: scaling.scale_down_seconds };
            max.map(|max| Scaler::new(scaling(max), nodes))
        };
        let pool = |role, model: &Arc<NodeModel>, seconds: f64, nodes, scaler| {
            Pool::new(setup(role, model), &members, cluster.pod_start_seconds + seconds, nodes, scaler)
        };
        let (p, d) = (cluster.prefill_nodes, cluster.decode_nodes);
        let prefill_scaler =
            scaler(scaling.prefill_min_nodes, scaling.prefill_max_nodes, scaling.prefill_target_seconds, p);
        let decode_scaler = scaler(scaling.decode_min_nodes, scaling.decode_max_nodes, scaling.decode_target, d);
        let mut events = args.at.clone();
        events.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Ok(Self {
            prefill: pool(Role::Prefill, &full, prefill.full.start_seconds, p, prefill_scaler)?,
            decode: pool(Role::Decode, &pruned, decode.decoder().start_seconds, d, decode_scaler)?,
            client: client::Client {
                core: core.clone(),
                clock,
                overheads: full,
                rng,
                record: Arc::default(),
                deadline_seconds: args.router.deadline_seconds,
            },
            clock,
            core,
            mix,
            rate,
            events,
            itl_limit_seconds: scaling.scaling_itl_limit_seconds,
            scaled: 0.0,
        })
    }

    /// Returns the record, the time at which the last request ended, and the nodes.
    async fn run(mut self, args: &SimulateArgs) -> Result<(Record, f64, [Used; 2])> {
        let mix = self.mix.clone();
        let mut asks = mix.asks(args.seed);
        let mut clients = JoinSet::new();
        let Some((gap, mut next)) = asks.next() else { return Ok((Record::default(), 0.0, self.used())) };
        let (mut arrival, mut tick, mut number) = (gap / self.rate, TICK_SECONDS, 0);
        loop {
            let coming = arrival <= args.duration_seconds;
            let now = if coming { arrival.min(tick) } else { tick };
            self.clock.until(now).await;
            while let Some(request) = clients.try_join_next() {
                request?;
            }
            if now >= tick {
                self.tick(tick)?;
                tick += TICK_SECONDS;
                if !coming && clients.is_empty() {
                    break;
                }
            }
            if coming && now >= arrival {
                self.client.record.lock().sent += 1;
                clients.spawn(self.client.clone().request(number, next));
                number += 1;
                let Some((gap, ask)) = asks.next() else { break };
                (arrival, next) = (arrival + gap / self.rate, ask);
            }
        }
        let end = self.clock.now();
        let record = std::mem::take(&mut *self.client.record.lock());
        Ok((record, end, self.used()))
    }

    fn used(&self) -> [Used; 2] {
        [(Role::Prefill, &self.prefill), (Role::Decode, &self.decode)].map(|(role, pool)| Used {
            role,
            node_seconds: pool.node_seconds,
            most: pool.most,
        })
    }

    fn tick(&mut self, now: f64) -> Result<()> {
        while let Some(Timed { event, .. }) = self.events.pop_if(|timed| timed.seconds <= now) {
            match event {
                Event::Rate(rate) => self.rate = rate,
                Event::Kill(role) => self.pool(role).kill(now),
                Event::Rollout(role) => self.pool(role).roll_out(),
            }
        }
        let itl_limit = self.itl_limit_seconds.map(|limit| self.clock.real(limit).as_secs_f64());
        let mut work = [0.0; 2];
        for ((role, _), pool) in self.core.pool_work(itl_limit) {
            match role {
                // Seconds of one node, on the clock.
                Role::Prefill => work[0] += self.clock.simulated(pool.nodes + pool.router),
                Role::Decode => work[1] += pool.nodes + pool.router,
            }
        }
        // Without a node of a role its pool has no work in the router's eyes. Requests that wait for one wake it.
        let without: u64 = self.core.waiting.without_nodes().values().sum();
        let scales = now - self.scaled >= PERIOD_SECONDS;
        if scales {
            self.scaled = now;
        }
        for (pool, load) in [&mut self.prefill, &mut self.decode].into_iter().zip(&mut work) {
            if pool.nodes() == 0 {
                *load = without as f64;
            }
            let nodes = pool.nodes();
            if let Some(scaler) = pool.scaler.as_mut().filter(|_| scales) {
                let wanted = scaler.wanted(now, *load, nodes);
                pool.resize(wanted);
            }
            pool.advance(now, TICK_SECONDS)?;
        }
        let sample = Sample {
            seconds: now,
            sent_requests: std::mem::take(&mut self.client.record.lock().sent),
            router_waiting: self.core.admission.waiting() + self.core.catalog.waiting(),
            prefill: sample(&self.prefill, work[0]),
            decode: sample(&self.decode, work[1]),
        };
        self.client.record.lock().samples.push(sample);
        Ok(())
    }

    fn pool(&mut self, role: Role) -> &mut Pool {
        match role {
            Role::Prefill => &mut self.prefill,
            Role::Decode => &mut self.decode,
        }
    }
}

fn sample(pool: &Pool, load: f64) -> PoolSample {
    let (starting, draining) = pool.in_between();
    let loads: Vec<_> = pool.serving().iter().map(|node| node.load.load()).collect();
    let blocks = pool.kv_blocks() * loads.len();
    let free: usize = loads.iter().map(|load| load.free_blocks).sum();
    PoolSample {
        serving: loads.len(),
        starting,
        draining,
        load,
        idle: loads.iter().filter(|load| load.running + load.waiting == 0).count(),
        running: loads.iter().map(|load| load.running).sum(),
        waiting: loads.iter().map(|load| load.waiting).sum(),
        used_kv_share: 1.0 - free as f64 / blocks.max(1) as f64,
    }
}

fn router(args: &SimulateArgs, clock: &Clock, network: &Network) -> Config {
    Config {
        served_models: vec![node::MODEL.into()],
        max_running: args.router.max_running,
        max_waiting: args.router.max_waiting,
        max_queue: clock.real(args.router.max_queue_seconds),
        default_deadline: clock.limit(args.router.deadline_seconds),
        node_timeout: clock.real(NODE_TIMEOUT_SECONDS),
        progress_timeout: clock.real(PROGRESS_TIMEOUT_SECONDS),
        drain_timeout: Duration::ZERO,
        // The budget is measured in real time, which barely passes.
        min_retries_per_second: 1_000_000,
        dialer: network.dialer(),
        ..Config::local(Vec::new(), Vec::new())
    }
}
