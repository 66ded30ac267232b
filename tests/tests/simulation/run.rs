//! Runs one simulation and checks it.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
    time::Duration,
};

use overfill_cluster::discovery::Members;
use overfill_router::{Config, RequestSettings};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::sync::{mpsc, watch};
use turmoil::Sim;

use crate::{
    MAX_ASKED,
    client::{Ask, End, Record, RouterPlace},
    entropy,
    ghost::ghost,
    guard::Witness,
    net::{GRPC_PORT, Tap, grpc_dialer, link},
    node::{SimulatedHost, Surroundings, transfer},
    plan::{self, Event, LONG, Plan, Prompts},
};

/// Allowed delay from ticks, latency and a client's last read.
const SLACK: Duration = Duration::from_secs(1);
/// Time after the last request, or its deadline, within which all resources must be released. A node that waits for a verdict writes
/// nothing, so if a partition has swallowed the end of its connection, only unanswered pings tell it, after 20 seconds.
const RELEASE: Duration = Duration::from_secs(22);
/// Time after the last fault within which all nodes must be usable. A circuit breaker opens for at most 30 seconds.
const RECOVERY: Duration = Duration::from_secs(45);
/// Time after which discovery drops a node that does not renew its lease.
const LEASE: Duration = Duration::from_secs(1);

/// Result of a simulation.
#[derive(Debug)]
pub struct Outcome {
    /// The first violation, if any.
    pub verdict: Result<(), String>,
    /// Digest of all tokens and their times. Equal runs have equal digests.
    pub digest: u64,
    /// Summary for the log.
    pub summary: String,
}

/// Simulates a seed on a new thread, since the thread's earlier use of randomness would change the result.
pub fn simulate(seed: u64) -> Outcome {
    let run = move || {
        entropy::seed_this_thread(seed);
        let mut cluster = Cluster::new(seed);
        let verdict = cluster.run();
        cluster.outcome(verdict)
    };
    match std::thread::spawn(run).join() {
        Ok(outcome) => outcome,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            let verdict = Err(format!("panic: {}", text.unwrap_or_default()));
            Outcome { verdict, digest: 0, summary: String::new() }
        }
    }
}

/// End of a fault, or of a client's patience.
enum Ending {
    Link(String, String),
    OneWay(String, String),
    Held(String, String),
    Restart(String),
    Unstick(String),
    SpeedUp(String),
    Register(String),
    Lease(String, String),
    Leave(Arc<Record>),
}

struct Cluster {
    sim: Sim<'static>,
    rng: StdRng,
    prompts: Prompts,
    plan: Plan,
    places: Vec<SimulatedHost>,
    router: RouterPlace,
    around: Surroundings,
    ghosts: mpsc::Sender<(String, Vec<u8>)>,
    records: Vec<Arc<Record>>,
    /// Endings by time, then in the order in which they were scheduled.
    endings: BTreeMap<(Duration, usize), Ending>,
    begun: usize,
    /// The pending ending of each faulty link. A later fault of a link replaces an earlier one.
    links: BTreeMap<(String, String), usize>,
    /// Hosts that will restart.
    restarts: BTreeSet<String>,
    faults: usize,
}

impl Cluster {
    fn new(seed: u64) -> Self {
        let mut rng = plan::rng(seed);
        let mut prompts = Prompts::new(&mut rng);
        let plan = Plan::new(&mut rng, &mut prompts);
        let witness = Witness::default();
        let tap = Tap::new(StdRng::seed_from_u64(rng.random()), plan.damage, &witness);
        let around = Surroundings {
            transfer: transfer(plan.idle_timeout, plan.hello_timeout, plan.max_frame_bytes, tap.kv_dialer()),
            tap,
            damage: plan.damage > 0.0,
            members: Arc::new(watch::Sender::new(Members::new())),
            witness,
        };
        let mut builder = turmoil::Builder::new();
        builder
            .rng_seed(rng.random())
            .tick_duration(plan.tick)
            .min_message_latency(plan.latency.start)
            .max_message_latency(plan.latency.end)
            .tcp_capacity(plan.tcp_capacity)
            .simulation_duration(Duration::from_secs(86_400));
        if plan.random_order {
            builder.enable_random_order();
        }
        let mut sim = builder.build();
        let router = RouterPlace {
            config: config(&plan),
            members: plan.discovery.then(|| around.members.clone()),
            witness: around.witness.clone(),
            process: Arc::default(),
        };
        let start = router.clone();
        sim.host("router", move || start.clone().run());
        let places: Vec<SimulatedHost> = plan
            .nodes
            .iter()
            .map(|(name, role, size)| SimulatedHost::new(name.clone(), *role, size.clone(), &around))
            .collect();
        for place in &places {
            let start = place.clone();
            sim.host(place.name.as_str(), move || start.clone().run());
        }
        let (ghosts, asked) = mpsc::channel(MAX_ASKED);
        let haunted = around.witness.clone();
        sim.client("ghost", ghost(asked, haunted));
        Self {
            sim,
            rng,
            prompts,
            plan,
            places,
            router,
            around,
            ghosts,
            records: Vec::new(),
            endings: BTreeMap::new(),
            begun: 0,
            links: BTreeMap::new(),
            restarts: BTreeSet::new(),
            faults: 0,
        }
    }

    fn run(&mut self) -> Result<(), String> {
        let events = std::mem::take(&mut self.plan.events);
        for (at, event) in events {
            self.run_until(|this| this.now() >= at)?;
            self.apply(event);
        }
        let calm_from = self.plan.calm_from;
        self.run_until(|this| this.now() >= calm_from)?;
        self.around.tap.repair();
        self.run_until(Self::have_all_ended)?;
        self.check_sheltered()?;
        self.recover()?;
        self.probe()?;
        self.check_free()
    }

    fn now(&self) -> Duration {
        self.sim.elapsed()
    }

    fn have_all_ended(&self) -> bool {
        self.records.iter().all(|record| record.end().is_some())
    }

    /// Steps the simulation until `done`, ends faults that are due, and runs all checks after each step.
    fn run_until(&mut self, done: impl Fn(&Self) -> bool) -> Result<(), String> {
        while !done(self) {
            while let Some(entry) = self.endings.first_entry()
                && entry.key().0 <= self.sim.elapsed()
            {
                let ((_, id), ending) = entry.remove_entry();
                self.end(id, ending);
            }
            self.sim.step().map_err(|e| format!("a host failed: {e}"))?;
            self.check()?;
        }
        Ok(())
    }

    fn check(&self) -> Result<(), String> {
        if let Some(violation) = self.around.witness.verdict() {
            return Err(violation);
        }
        if let Some(panic) = crate::panicked() {
            return Err(format!("panic: {panic}"));
        }
        let late = |record: &&Arc<Record>| self.now() > record.due() + SLACK && record.end().is_none();
        match self.records.iter().find(late) {
            Some(record) => Err(format!("KV-6: {record:?} hangs")),
            None => Ok(()),
        }
    }

    fn later(&mut self, after: Duration, ending: Ending) -> usize {
        self.begun += 1;
        self.endings.insert((self.now() + after, self.begun), ending);
        self.begun
    }

    fn link_fails(&mut self, a: &str, b: &str, long: Duration, ending: Ending) {
        let id = self.later(long, ending);
        self.links.insert(link(a, b), id);
    }

    /// Returns whether `id` is still the pending ending of the link. If so, removes it.
    fn link_heals(&mut self, a: &str, b: &str, id: usize) -> bool {
        let heals = self.links.get(&link(a, b)) == Some(&id);
        if heals {
            self.links.remove(&link(a, b));
        }
        heals
    }

    fn submit(&mut self, ask: Ask, leaves: Option<Duration>) -> Arc<Record> {
        let record = Record::new(ask, self.now());
        let router = self.router.process.lock();
        match router.as_ref().filter(|router| router.clients.try_send(record.clone()).is_ok()) {
            Some(_) => {}
            None => record.set_end(End::Lost),
        }
        drop(router);
        self.records.push(record.clone());
        if let Some(leaves) = leaves {
            self.later(leaves, Ending::Leave(record.clone()));
        }
        record
    }

    fn place(&self, name: &str) -> Option<&SimulatedHost> {
        self.places.iter().find(|place| place.name == name)
    }

    fn apply(&mut self, event: Event) {
        if tracing::enabled!(tracing::Level::INFO) {
            tracing::info!(at = ?self.now(), ?event, "happens");
        }
        self.faults += usize::from(!matches!(event, Event::Ask(..)));
        match event {
            Event::Ask(ask, leaves) => drop(self.submit(ask, leaves)),
            Event::Partition(a, b, long) => {
                self.sim.partition(a.as_str(), b.as_str());
                self.link_fails(&a, &b, long, Ending::Link(a.clone(), b.clone()));
            }
            // Skipped if the link has another fault, since the state of one direction is then unknown.
            Event::OneWay(a, b, _) | Event::Hold(a, b, _) if self.links.contains_key(&link(&a, &b)) => {}
            Event::OneWay(a, b, long) => {
                self.sim.partition_oneway(a.as_str(), b.as_str());
                self.link_fails(&a, &b, long, Ending::OneWay(a.clone(), b.clone()));
            }
            Event::Hold(a, b, long) => {
                self.sim.hold(a.as_str(), b.as_str());
                self.link_fails(&a, &b, long, Ending::Held(a.clone(), b.clone()));
            }
            Event::Crash(name, _) | Event::PowerOff(name, _) if !self.sim.is_host_running(name.as_str()) => {}
            Event::Crash(name, down) => self.crash(&name, down),
            Event::PowerOff(name, down) => {
                let names = self.places.iter().map(|place| place.name.clone());
                let others: Vec<String> = names.chain(["router".into()]).filter(|other| *other != name).collect();
                for other in others {
                    self.sim.partition(name.as_str(), other.as_str());
                    self.link_fails(&name, &other, down, Ending::Link(name.clone(), other.clone()));
                }
                self.crash(&name, down);
            }
            Event::Drain(name, time, down) => {
                let place = self.place(&name);
                let drain = place.and_then(|place| place.process.lock().as_ref().map(|process| process.drain.clone()));
                if drain.is_some_and(|drain| drain.try_send(time).is_ok()) {
                    self.restart_later(&name, down);
                }
            }
            Event::Stuck(name, long) => {
                self.place(&name).inspect(|place| place.pace.set_stuck(true));
                self.later(long, Ending::Unstick(name));
            }
            Event::Slow(name, factor, long) => {
                self.place(&name).inspect(|place| place.pace.slow_down(factor));
                self.later(long, Ending::SpeedUp(name));
            }
            Event::Forget(name, long) => {
                if let Some(key) = self.place(&name).map(SimulatedHost::key) {
                    self.around.members.send_modify(|members| drop(members.remove(&key)));
                    self.later(long, Ending::Register(name));
                }
            }
            Event::ForgetAll(long) => {
                self.around.members.send_modify(Members::clear);
                for name in self.places.iter().map(|place| place.name.clone()).collect::<Vec<_>>() {
                    let late = self.rng.random_range(0..300);
                    self.later(long + Duration::from_millis(late), Ending::Register(name));
                }
            }
            Event::Ghost(rank) => {
                if let Some(used) = self.around.tap.used_ticket(rank) {
                    // The ghost runs until the simulation ends.
                    let _ = self.ghosts.try_send(used);
                }
            }
        }
    }

    fn restart_later(&mut self, name: &str, down: Duration) {
        // A draining node may crash, and already has a scheduled restart.
        if self.restarts.insert(name.to_owned()) {
            self.later(down, Ending::Restart(name.to_owned()));
        }
    }

    fn crash(&mut self, name: &str, down: Duration) {
        self.restart_later(name, down);
        self.kill(name);
    }

    fn kill(&mut self, name: &str) {
        self.sim.crash(name);
        if name == "router" {
            *self.router.process.lock() = None;
            self.records.iter().for_each(|record| record.set_end(End::Lost));
            return;
        }
        let process = self.place(name).and_then(|place| place.process.lock().take());
        if let Some(process) = process {
            self.later(LEASE, Ending::Lease(name.to_owned(), process.registration.incarnation));
        }
    }

    fn end(&mut self, id: usize, ending: Ending) {
        match ending {
            Ending::Link(a, b) if self.link_heals(&a, &b, id) => self.sim.repair(a.as_str(), b.as_str()),
            Ending::OneWay(a, b) if self.link_heals(&a, &b, id) => self.sim.repair_oneway(a.as_str(), b.as_str()),
            Ending::Held(a, b) if self.link_heals(&a, &b, id) => self.sim.release(a.as_str(), b.as_str()),
            Ending::Link(..) | Ending::OneWay(..) | Ending::Held(..) => {}
            Ending::Restart(name) => {
                // The node may still be draining.
                self.kill(&name);
                self.restarts.remove(&name);
                self.sim.bounce(name);
            }
            Ending::Unstick(name) => drop(self.place(&name).inspect(|place| place.pace.set_stuck(false))),
            Ending::SpeedUp(name) => drop(self.place(&name).inspect(|place| place.pace.slow_down(1))),
            Ending::Register(name) => {
                let Some(place) = self.place(&name) else { return };
                let process = place.process.lock();
                if let Some(process) = process.as_ref().filter(|process| !process.load.is_draining()) {
                    let registration = process.registration.clone();
                    self.around.members.send_modify(|members| drop(members.insert(place.key(), registration)));
                }
            }
            Ending::Lease(name, incarnation) => {
                let Some(key) = self.place(&name).map(SimulatedHost::key) else { return };
                let is_old = |members: &Members| members.get(&key).is_some_and(|r| r.incarnation == incarnation);
                self.around.members.send_if_modified(|members| is_old(members) && members.remove(&key).is_some());
            }
            Ending::Leave(record) => record.cancel.cancel(),
        }
    }

    /// Checks KV-6: no request with enough time fails if a node of each role was sheltered.
    fn check_sheltered(&self) -> Result<(), String> {
        let failed = |record: &&Arc<Record>| record.ask.time >= LONG && matches!(record.end(), Some(End::Failed(_)));
        match self.records.iter().find(failed).filter(|_| self.plan.sheltered) {
            Some(record) => Err(format!("KV-6: {record:?}, though a node of each role was sheltered")),
            None => Ok(()),
        }
    }

    /// Waits after the last fault until all nodes are usable. Fails after a time limit.
    fn recover(&mut self) -> Result<(), String> {
        let limit = self.now() + RECOVERY;
        // The router may not have noticed dead connections before this time.
        let known = self.now().max(self.plan.calm_from) + self.plan.node_timeout + SLACK;
        let usable = |this: &Self| {
            let router = this.router.process.lock();
            router
                .as_ref()
                .is_some_and(|r| r.usable_nodes.load(std::sync::atomic::Ordering::Relaxed) == this.places.len())
        };
        self.run_until(|this| this.now() > limit || (this.now() > known && usable(this)))?;
        if self.now() > limit {
            let router = self.router.process.lock();
            let list = router.as_ref().map(|router| router.core.nodes.statuses()).unwrap_or_default();
            let list: Vec<_> = list.iter().map(|node| format!("{}: {:?}", node.url, node.error)).collect();
            return Err(format!("nodes are still unusable after the last fault: {}", list.join(", ")));
        }
        Ok(())
    }

    /// Without faults, checks that requests succeed and that a disconnected client's resources are released soon.
    fn probe(&mut self) -> Result<(), String> {
        let mut probes = Vec::new();
        for i in 0..4 {
            let ask = plan::ask(&mut self.rng, &mut self.prompts, LONG);
            let leaves = (i >= 2).then(|| Duration::from_millis(self.rng.random_range(0..600)));
            probes.push(self.submit(ask, leaves));
        }
        self.run_until(Self::have_all_ended)?;
        let failed = |record: &&Arc<Record>| !matches!(record.end(), Some(End::Whole(_) | End::Cancelled));
        match probes.iter().find(failed) {
            Some(record) => Err(format!("KV-6: {record:?} in a cluster without faults")),
            None => Ok(()),
        }
    }

    /// Checks KV-3: all resources are released after all requests have ended and earlier deadlines have passed.
    fn check_free(&mut self) -> Result<(), String> {
        let probes = self.records.len() - 4;
        let deadlines =
            self.records[..probes].iter().filter(|record| record.ask.time < LONG).map(|record| record.due());
        let limit = deadlines.max().unwrap_or_default().max(self.now()) + RELEASE;
        self.run_until(|this| this.now() > limit || this.not_free().is_none())?;
        self.not_free().map_or(Ok(()), |what| Err(format!("KV-3: {what}")))
    }

    fn not_free(&self) -> Option<String> {
        let router = self.router.process.lock();
        // The decode models write what the full model would, in mode draft. So a score that differs is of other tokens.
        let models = router.as_ref().map(|router| router.core.catalog.list()).unwrap_or_default();
        let summaries = models.iter().filter_map(|model| router.as_ref()?.core.watch.summary(&model.name));
        if let Some(wrong) = summaries.into_iter().find(|summary| summary.parted_answers > 0) {
            return Some(format!("scores of answers are wrong: {wrong:?}"));
        }
        let admission =
            router.as_ref().map(|router| (router.core.admission.running(), router.core.admission.waiting()));
        if admission != Some((0, 0)) {
            return Some(format!("the router counts {admission:?} running and waiting requests"));
        }
        self.places.iter().find_map(|place| {
            let process = place.process.lock();
            let process = process.as_ref()?;
            let (in_use, load) = (process.pool.in_use(), process.load.load());
            let free = in_use == 0 && load.is_idle() && load.stranded_bytes + load.queued_tokens == 0;
            (!free).then(|| format!("{} has {in_use} blocks in use: {load:?}", place.name))
        })
    }

    fn outcome(&self, verdict: Result<(), String>) -> Outcome {
        let mut hash = DefaultHasher::new();
        let [mut whole, mut failed, mut gone, mut migrations] = [0; 4];
        for record in &self.records {
            format!("{:?}", record.end()).hash(&mut hash);
            record.trace().hash(&mut hash);
            match record.end() {
                Some(End::Whole(n)) => (whole, migrations) = (whole + 1, migrations + n),
                Some(End::Failed(_)) => failed += 1,
                _ => gone += 1,
            }
        }
        (self.now(), self.around.tap.connections()).hash(&mut hash);
        let (faults, handoffs, now) = (self.faults, self.around.tap.connections(), self.now());
        let summary = format!(
            "{faults} faults, {whole} requests whole ({migrations} migrations), {failed} failed, {gone} gone, \
             {handoffs} handoffs, {now:?} of simulated time"
        );
        Outcome { verdict, digest: hash.finish(), summary }
    }
}

fn config(plan: &Plan) -> Config {
    use overfill_kv::Role::{Decode, Prefill};
    let urls = |role| {
        let names = plan.nodes.iter().filter(|node| node.1 == role && !plan.discovery);
        names.map(|(name, ..)| format!("http://{name}:{GRPC_PORT}")).collect()
    };
    Config {
        max_queue: plan.max_queue,
        max_attempts: plan.max_attempts,
        max_running: plan.max_running,
        // Measured in real time, which barely passes in a simulation.
        min_retries_per_second: 1_000_000,
        node_timeout: plan.node_timeout,
        progress_timeout: plan.progress_timeout,
        requests: RequestSettings { watch_share: plan.watch_share, ..RequestSettings::default() },
        dialer: grpc_dialer(),
        ..Config::local(urls(Prefill), urls(Decode))
    }
}
