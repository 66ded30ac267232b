//! Who may run: of each model a bounded number of sequences on the nodes, and a bounded number waiting.
//!
//! Models do not wait for each other: one whose nodes are all busy, or gone, keeps nobody from the nodes of others.
//!
//! Whose turn it is: first by priority; among equals by what their tenant has had so far, in tokens, against its weight,
//! output counting double ("virtual token counter", Sheng et al., Fairness in Serving Large Language Models,
//! arXiv 2401.00588); a tenant's own sequences in order of arrival. When the queue is full, whoever fills it most gives
//! way to others. A sequence that would not be through in time is refused at once, rather than after it has cost
//! something: how long that takes is learnt from those that have ended.

mod learnt;
mod models;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::oneshot,
    time::{Instant, timeout_at},
};

use self::learnt::Learnt;
pub use self::models::Admission;
use crate::{
    GenerateError,
    tenants::{Counted, Tenant},
};

/// A token generated costs as much as so many of a prompt.
const OUTPUT_WEIGHT: f64 = 2.0;
/// Clients are told to come back after this long at most.
const MAX_RETRY: Duration = Duration::from_secs(60);

/// The bounds and the queue of one model.
struct ModelAdmission {
    queue: Arc<Mutex<Queue>>,
}

/// What a sequence is, as far as its turn goes.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    /// Lower goes first.
    pub priority: i32,
    /// Tokens of its prompt.
    pub prompt_tokens: usize,
    /// Most tokens that it generates.
    pub max_tokens: u32,
    /// By then it must run.
    pub run_by: Instant,
    /// By then it must have ended.
    pub end_by: Instant,
}

struct Queue {
    max_running: usize,
    /// Of these, as many as the nodes have places for.
    capacity: usize,
    max_waiting: usize,
    running: usize,
    waiting: usize,
    /// Those with anything running or waiting.
    accounts: HashMap<Arc<str>, Account>,
    arrivals: u64,
    learnt: Learnt,
}

#[derive(Default)]
struct Account {
    weight: f64,
    /// Tokens so far, divided by the weight.
    served: f64,
    sequences: usize,
    lines: BTreeMap<i32, VecDeque<Waiter>>,
}

struct Waiter {
    arrival: u64,
    ask: Ask,
    turn: oneshot::Sender<Result<(), GenerateError>>,
}

/// A place in the queue, or one's turn. Dropping it leaves.
pub struct Place {
    queue: Arc<Mutex<Queue>>,
    counted: Arc<Counted>,
    arrival: u64,
    ask: Ask,
    turn: Option<oneshot::Receiver<Result<(), GenerateError>>>,
}

/// The right to use the nodes. Dropping it lets the next one in.
pub struct Running {
    queue: Arc<Mutex<Queue>>,
    counted: Arc<Counted>,
    began: Instant,
    tokens: u32,
}

impl ModelAdmission {
    /// At most `max_running` run and `max_waiting` wait.
    fn new(max_running: usize, max_waiting: usize) -> Self {
        let queue = Queue {
            max_running,
            capacity: max_running,
            max_waiting,
            running: 0,
            waiting: 0,
            accounts: HashMap::new(),
            arrivals: 0,
            learnt: Learnt::default(),
        };
        Self { queue: Arc::new(Mutex::new(queue)) }
    }

    /// The nodes have places for so many: more would only wait there, where nobody knows whose turn it is.
    fn set_capacity(&self, places: usize) {
        let mut queue = self.queue.lock();
        queue.capacity = places.clamp(1, queue.max_running);
        queue.admit();
    }

    /// A place for each of these sequences, or for none. Does not wait.
    fn enter(&self, tenant: &Arc<Tenant>, asks: &[Ask]) -> Result<Vec<Place>, GenerateError> {
        let counted = Arc::new(tenant.count(asks.len())?);
        let mut queue = self.queue.lock();
        check_count(asks.len(), queue.max_running + queue.max_waiting)?;
        let free = queue.capacity.saturating_sub(queue.running + queue.waiting);
        for (i, ask) in asks.iter().enumerate().skip(free) {
            queue.check_in_time(&tenant.name, ask, i - free)?;
        }
        let beyond = (queue.waiting + asks.len()).saturating_sub(queue.max_waiting + free);
        queue.make_room(beyond, tenant, asks)?;
        let mut places = Vec::with_capacity(asks.len());
        for &ask in asks {
            let (turn, receiver) = oneshot::channel();
            let arrival = queue.arrivals;
            queue.arrivals += 1;
            queue.waiting += 1;
            let account = queue.account(tenant);
            account.sequences += 1;
            account.lines.entry(ask.priority).or_default().push_back(Waiter { arrival, ask, turn });
            places.push(Place {
                queue: self.queue.clone(),
                counted: counted.clone(),
                arrival,
                ask,
                turn: Some(receiver),
            });
        }
        queue.admit();
        Ok(places)
    }

    fn running(&self) -> usize {
        self.queue.lock().running
    }

    fn waiting(&self) -> usize {
        self.queue.lock().waiting
    }
}

/// Can so many sequences of one request ever have places?
fn check_count(count: usize, limit: usize) -> Result<(), GenerateError> {
    if count > limit {
        let message = format!("n times the number of prompts must be at most {limit}, got {count}");
        return Err(GenerateError::invalid("n", message));
    }
    Ok(())
}

impl Queue {
    /// The tenant's account. A new one begins level with the least served of those who wait: being away saves nothing up.
    fn account(&mut self, tenant: &Tenant) -> &mut Account {
        if !self.accounts.contains_key(&tenant.name) {
            let waiting = self.accounts.values().filter(|account| !account.lines.is_empty());
            let level = waiting.map(|account| account.served).min_by(f64::total_cmp);
            let level = level.or_else(|| self.accounts.values().map(|a| a.served).min_by(f64::total_cmp));
            let account = Account { weight: tenant.weight.into(), served: level.unwrap_or(0.0), ..Account::default() };
            self.accounts.insert(tenant.name.clone(), account);
        }
        self.accounts.entry(tenant.name.clone()).or_default()
    }

    /// Gives free places to those whose turn it is.
    fn admit(&mut self) {
        while self.running < self.capacity.min(self.max_running) {
            // (priority, tokens, arrival) of the first in each tenant's line.
            let first = |account: &Account| {
                let (priority, line) = account.lines.first_key_value()?;
                Some((*priority, account.served, line.front()?.arrival))
            };
            let next = self.accounts.iter().filter_map(|(name, account)| Some((first(account)?, name)));
            let next = next.min_by(|(a, _), (b, _)| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)).then(a.2.cmp(&b.2)));
            let Some((_, name)) = next else { return };
            let name = name.clone();
            let Some(account) = self.accounts.get_mut(&name) else { return };
            let Some(waiter) = account.pop() else { return };
            self.waiting -= 1;
            let now = Instant::now();
            // Only for the sake of others who wait: what was learnt may be out of date, and whoever runs teaches anew.
            let late = now >= waiter.ask.end_by || (self.waiting > 0 && self.learnt.is_late(now, &waiter.ask));
            // Nobody listens only while a place is being dropped, and that looks after itself.
            if late {
                let _ = waiter.turn.send(Err(self.too_late(&waiter.ask)));
                self.leave(&name);
            } else {
                account.served += waiter.ask.prompt_tokens as f64 / account.weight;
                self.running += 1;
                let _ = waiter.turn.send(Ok(()));
            }
        }
    }

    /// One sequence of this tenant's is over.
    fn leave(&mut self, name: &Arc<str>) {
        if let Some(account) = self.accounts.get_mut(name) {
            account.sequences = account.sequences.saturating_sub(1);
            if account.sequences == 0 {
                self.accounts.remove(name);
            }
        }
    }

    /// How many come before the next sequence of this tenant's, whose request has `own` before it.
    fn ahead(&self, name: &str, priority: i32, own: usize) -> usize {
        let before = |account: &Account| account.lines.range(..=priority).map(|(_, line)| line.len()).sum::<usize>();
        let all: usize = self.accounts.values().map(before).sum();
        let mine = self.accounts.get(name).map_or(0, before) + own;
        // Among tenants of one weight, nobody waits for more than a turn of each for every one of their own.
        let others =
            self.accounts.iter().filter(|(other, account)| other.as_ref() != name && before(account) > 0).count();
        (all + own).min((mine + 1) * (others + 1))
    }

    fn check_in_time(&self, name: &str, ask: &Ask, own: usize) -> Result<(), GenerateError> {
        let Some(interval) = self.learnt.interval else { return Ok(()) };
        let wait = Duration::from_secs_f64(interval * (self.ahead(name, ask.priority, own) + 1) as f64);
        let begin = Instant::now() + wait;
        if begin > ask.run_by || self.learnt.is_late(begin, ask) {
            return Err(GenerateError::Overloaded { wait, retry_after: wait.min(MAX_RETRY) });
        }
        Ok(())
    }

    fn too_late(&self, ask: &Ask) -> GenerateError {
        let retry_after = self.retry_after();
        let left = ask.end_by.saturating_duration_since(Instant::now());
        GenerateError::Late { left, retry_after }
    }

    fn retry_after(&self) -> Duration {
        let wait = self.learnt.interval.unwrap_or(0.0) * self.waiting as f64;
        Duration::from_secs_f64(wait.max(1.0)).min(MAX_RETRY)
    }

    /// Sees to it that so many waiters go: the newest of those who, with lower priority or more of them, fill the queue.
    fn make_room(&mut self, mut beyond: usize, tenant: &Tenant, asks: &[Ask]) -> Result<(), GenerateError> {
        let limit = self.running + self.waiting;
        let full = GenerateError::QueueFull { limit, retry_after: self.retry_after() };
        let Some(priority) = asks.iter().map(|ask| ask.priority).min() else { return Ok(()) };
        let mut victims = Vec::new();
        let mut lengths: HashMap<(i32, Arc<str>), usize> = HashMap::new();
        for (name, account) in &self.accounts {
            for (priority, line) in &account.lines {
                lengths.insert((*priority, name.clone()), line.len());
            }
        }
        let mine = self.accounts.get(&tenant.name).map_or(0, Account::waiting) + asks.len();
        while beyond > 0 {
            let fullest = lengths.iter().filter(|(_, length)| **length > 0);
            let fullest = fullest.max_by_key(|((priority, _), length)| (*priority, **length));
            let Some(((other, name), length)) = fullest.map(|(key, length)| (key.clone(), *length)) else {
                return Err(full);
            };
            // Of one priority, only who has more than the newcomer will have gives way.
            if other < priority || (other == priority && (name == tenant.name || length <= mine)) {
                return Err(full);
            }
            lengths.insert((other, name.clone()), length - 1);
            victims.push((other, name));
            beyond -= 1;
        }
        for (priority, name) in victims {
            let waiter = self.accounts.get_mut(&name).and_then(|account| account.pop_newest(priority));
            if let Some(waiter) = waiter {
                self.waiting -= 1;
                let _ = waiter.turn.send(Err(full.clone()));
                self.leave(&name);
            }
        }
        Ok(())
    }
}

impl Account {
    fn waiting(&self) -> usize {
        self.lines.values().map(VecDeque::len).sum()
    }

    /// The next one.
    fn pop(&mut self) -> Option<Waiter> {
        let mut line = self.lines.first_entry()?;
        let waiter = line.get_mut().pop_front();
        if line.get().is_empty() {
            line.remove();
        }
        waiter
    }

    fn pop_newest(&mut self, priority: i32) -> Option<Waiter> {
        let line = self.lines.get_mut(&priority)?;
        let waiter = line.pop_back();
        if line.is_empty() {
            self.lines.remove(&priority);
        }
        waiter
    }

    /// True if it was still waiting.
    fn remove(&mut self, priority: i32, arrival: u64) -> bool {
        let Some(line) = self.lines.get_mut(&priority) else { return false };
        let before = line.len();
        line.retain(|waiter| waiter.arrival != arrival);
        let found = line.len() < before;
        if line.is_empty() {
            self.lines.remove(&priority);
        }
        found
    }
}

impl Place {
    /// Waits for its turn.
    pub async fn run(mut self) -> Result<Running, GenerateError> {
        let began = Instant::now();
        let Some(turn) = &mut self.turn else {
            return Err(GenerateError::Internal("a place was used twice".into()));
        };
        let waited = || GenerateError::NoRoom { waited: began.elapsed(), detail: String::new() };
        // It stays in `self` while it is waited for: a client may leave then, and takes its place along.
        let Ok(turn) = timeout_at(self.ask.run_by, turn).await else { return Err(waited()) };
        self.turn = None;
        match turn {
            Ok(Ok(())) => Ok(Running {
                queue: self.queue.clone(),
                counted: self.counted.clone(),
                began: Instant::now(),
                tokens: 0,
            }),
            Ok(Err(refused)) => Err(refused),
            Err(_) => Err(waited()),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(mut turn) = self.turn.take() else { return };
        let mut queue = self.queue.lock();
        let account = queue.accounts.get_mut(&self.counted.tenant.name);
        if account.is_some_and(|account| account.remove(self.ask.priority, self.arrival)) {
            queue.waiting -= 1;
            queue.leave(&self.counted.tenant.name);
        } else if matches!(turn.try_recv(), Ok(Ok(()))) {
            // Its turn had come, unseen.
            queue.running -= 1;
            queue.leave(&self.counted.tenant.name);
            queue.admit();
        }
    }
}

impl Running {
    /// A token was generated.
    pub fn token(&mut self) {
        self.tokens += 1;
        if let Some(account) = self.queue.lock().accounts.get_mut(&self.counted.tenant.name) {
            account.served += OUTPUT_WEIGHT / account.weight;
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut queue = self.queue.lock();
        queue.running -= 1;
        let waiting = queue.waiting > 0;
        queue.learnt.ended(self.began.elapsed(), self.tokens, waiting);
        queue.leave(&self.counted.tenant.name);
        queue.admit();
    }
}
