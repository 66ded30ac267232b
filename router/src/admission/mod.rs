//! Admission control: for each model, limits the number of running and of waiting sequences.
//!
//! Models have separate queues: a model whose nodes are all busy does not block requests for other models.
//!
//! Order: sequences with lower priority numbers go first. Within a priority, the tenant with the fewest served tokens
//! divided by its weight goes first, where output tokens count double ("virtual token counter", Sheng et al., Fairness in
//! Serving Large Language Models, arXiv 2401.00588). Sequences of one tenant go in order of arrival. When the queue is
//! full, the tenant with the most waiting sequences loses its newest one. A sequence that would miss its deadline is
//! refused at once, before it uses any resources. The estimate of its duration comes from sequences that have ended.

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

/// Cost of a generated token, in prompt tokens.
const OUTPUT_WEIGHT: f64 = 2.0;
/// Maximum retry-after time that is sent to clients.
const MAX_RETRY: Duration = Duration::from_secs(60);

/// Limits and queue of one model.
struct ModelAdmission {
    queue: Arc<Mutex<Queue>>,
}

/// A sequence's priority, cost and deadlines.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    /// Priority. Sequences with lower numbers go first.
    pub priority: i32,
    /// Number of prompt tokens.
    pub prompt_tokens: usize,
    /// Maximum number of tokens to generate.
    pub max_tokens: u32,
    /// Latest time for the sequence to start running.
    pub run_by: Instant,
    /// Latest time for the sequence to end.
    pub end_by: Instant,
}

struct Queue {
    max_running: usize,
    /// Number of sequences that the nodes compute at once, at most `max_running`.
    capacity: usize,
    max_waiting: usize,
    running: usize,
    waiting: usize,
    /// The accounts of tenants with running or waiting sequences.
    accounts: HashMap<Arc<str>, Account>,
    arrivals: u64,
    learnt: Learnt,
}

#[derive(Default)]
struct Account {
    weight: f64,
    /// Cost of the tenant's tokens so far, in prompt tokens, divided by its weight.
    served: f64,
    sequences: usize,
    lines: BTreeMap<i32, VecDeque<Waiter>>,
}

struct Waiter {
    arrival: u64,
    ask: Ask,
    turn: oneshot::Sender<Result<(), GenerateError>>,
}

/// A sequence's place in the queue. Dropping it removes the sequence from the queue.
pub struct Place {
    queue: Arc<Mutex<Queue>>,
    counted: Arc<Counted>,
    arrival: u64,
    ask: Ask,
    turn: Option<oneshot::Receiver<Result<(), GenerateError>>>,
}

/// Permission for a sequence to use the nodes. Dropping it admits the next sequence.
pub struct Running {
    queue: Arc<Mutex<Queue>>,
    counted: Arc<Counted>,
    began: Instant,
    tokens: u32,
}

impl ModelAdmission {
    /// Creates an empty queue for at most `max_running` running and `max_waiting` waiting sequences.
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

    /// Sets how many sequences the nodes compute at once. Further sequences would wait on the nodes, which do not order
    /// them by priority and tenant.
    fn set_capacity(&self, places: usize) {
        let mut queue = self.queue.lock();
        queue.capacity = places.clamp(1, queue.max_running);
        queue.admit();
    }

    /// Queues all of these sequences, or none. Does not wait.
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

    /// Adds the numbers of running and waiting sequences to each tenant's.
    fn count_tenants(&self, all: &mut BTreeMap<Arc<str>, (usize, usize)>) {
        for (name, account) in &self.queue.lock().accounts {
            let (running, waiting) = all.entry(name.clone()).or_default();
            *waiting += account.waiting();
            *running += account.sequences.saturating_sub(account.waiting());
        }
    }

    fn running(&self) -> usize {
        self.queue.lock().running
    }

    fn waiting(&self) -> usize {
        self.queue.lock().waiting
    }
}

/// Returns an error if a request has more sequences than can run and wait at once.
fn check_count(count: usize, limit: usize) -> Result<(), GenerateError> {
    if count > limit {
        let message = format!("n times the number of prompts must be at most {limit}, got {count}");
        return Err(GenerateError::invalid("n", message));
    }
    Ok(())
}

impl Queue {
    /// The tenant's account. A new account starts with the lowest `served` of all tenants with waiting sequences, so that a
    /// tenant does not accumulate credit while it is idle.
    fn account(&mut self, tenant: &Tenant) -> &mut Account {
        if !self.accounts.contains_key(&tenant.name) {
            let waiting = self.accounts.values().filter(|account| !account.lines.is_empty());
            let level = waiting.map(|account| account.served).min_by(f64::total_cmp);
            let level = level.or_else(|| self.accounts.values().map(|a| a.served).min_by(f64::total_cmp));
            let account = Account { weight: tenant.weight.into(), served: level.unwrap_or(0.0), ..Account::default() };
            self.accounts.insert(tenant.name.clone(), account);
        }
        let account = self.accounts.entry(tenant.name.clone()).or_default();
        // The file with the keys may have changed.
        account.weight = tenant.weight.into();
        account
    }

    /// Admits sequences in order of turns while there is capacity.
    fn admit(&mut self) {
        while self.running < self.capacity.min(self.max_running) {
            // (priority, served, arrival) of the first sequence in each tenant's line.
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
            // The estimate is used only while others wait. It may be out of date, and running the sequence updates it.
            let late = now >= waiter.ask.end_by || (self.waiting > 0 && self.learnt.is_late(now, &waiter.ask));
            // Sending fails only while the place is being dropped. Its `drop` then does the cleanup.
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

    /// Removes one sequence from the tenant's account.
    fn leave(&mut self, name: &Arc<str>) {
        if let Some(account) = self.accounts.get_mut(name) {
            account.sequences = account.sequences.saturating_sub(1);
            if account.sequences == 0 {
                self.accounts.remove(name);
            }
        }
    }

    /// Estimates how many sequences go before the tenant's next one. `own`: number of sequences of the same request that go
    /// before it.
    fn ahead(&self, name: &str, priority: i32, own: usize) -> usize {
        let before = |account: &Account| account.lines.range(..=priority).map(|(_, line)| line.len()).sum::<usize>();
        let all: usize = self.accounts.values().map(before).sum();
        let mine = self.accounts.get(name).map_or(0, before) + own;
        // With equal weights, each of the tenant's sequences waits for at most one sequence of every other tenant.
        let others =
            self.accounts.iter().filter(|(other, account)| other.as_ref() != name && before(account) > 0).count();
        (all + own).min((mine + 1) * (others + 1))
    }

    fn check_in_time(&self, name: &str, ask: &Ask, own: usize) -> Result<(), GenerateError> {
        let Some(interval) = self.learnt.interval else { return Ok(()) };
        let wait = match self.waiting + own {
            // The first in the queue waits for one running sequence at most. Without this bound, an estimate that is far
            // too high would refuse everybody, and then it would never be corrected.
            0 => interval.min(self.learnt.seconds.unwrap_or(0.0)),
            _ => interval * (self.ahead(name, ask.priority, own) + 1) as f64,
        };
        let wait = Duration::from_secs_f64(wait);
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

    /// Evicts `beyond` waiters: the newest waiters of lower priority, or of the tenants with the most waiters.
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
            // Within a priority, a tenant loses waiters only if it has more than the new request's tenant will have.
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

    /// Removes the tenant's next waiter.
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

    /// Removes a waiter. Returns false if it was no longer waiting.
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
    /// Waits until the sequence is admitted.
    pub async fn run(mut self) -> Result<Running, GenerateError> {
        let began = Instant::now();
        let Some(turn) = &mut self.turn else {
            return Err(GenerateError::Internal("a place was used twice".into()));
        };
        let waited = || GenerateError::NoRoom { waited: began.elapsed(), detail: String::new() };
        // The receiver stays in `self` during the wait, so that `drop` still has it if the client disconnects.
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
            // The sequence had been admitted, but `run` had not seen it.
            queue.running -= 1;
            queue.leave(&self.counted.tenant.name);
            queue.admit();
        }
    }
}

impl Running {
    /// Charges the tenant for a generated token.
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
