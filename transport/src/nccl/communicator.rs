//! One communicator: what is posted, in which order, and since when.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::CudaEvent;
use overfill_kv::BlockLease;

use super::api::{Call, Direction, Raw};
use super::receiving::WINDOW;
use super::{NcclError, NcclOptions};

/// Numbers of transfers have 24 bits on the wire.
const NUMBERS: u32 = 1 << 24;

/// Blocks to move.
pub(super) struct Transfer {
    /// Addresses and sizes in bytes of the blocks, in device memory.
    pub runs: Vec<(u64, usize)>,
    /// Keeps the blocks until the transfer has ended (KV-1, KV-2).
    pub lease: Arc<BlockLease>,
    /// Is told what becomes of it.
    pub report: Box<dyn Report>,
}

/// Learns what becomes of a transfer.
pub(super) trait Report: Send {
    /// Whether it should still be posted.
    fn is_wanted(&self) -> bool;
    /// It is posted as the communicator's `number`.
    fn posted(&mut self, number: u32);
    /// It has ended; the blocks are not accessed any more.
    fn ended(self: Box<Self>, result: Result<(), NcclError>);
}

impl Transfer {
    /// Ends the transfer. The lease is dropped first, so that the blocks are free when the report says so.
    pub fn end(self, result: Result<(), NcclError>) {
        drop(self.lease);
        self.report.ended(result);
    }
}

enum State {
    Joining,
    Ready,
    /// The group is being queued.
    Queueing(Transfer),
}

/// A transfer whose kernels are on the stream.
struct Flying {
    event: CudaEvent,
    until: Instant,
    transfer: Transfer,
}

pub(super) struct Communicator {
    raw: Raw,
    direction: Direction,
    state: State,
    /// Time limit of the state.
    until: Instant,
    /// Number of the next transfer, modulo [`NUMBERS`].
    next: u32,
    /// Sends whose receives are posted, by their numbers. Those before them have not come yet.
    held: BTreeMap<u32, (Instant, Transfer)>,
    flying: VecDeque<Flying>,
    /// When a handoff began that uses it, or when a transfer was under way.
    pub last_used: Instant,
    piece_timeout: Duration,
    /// The time limit of the first transfer, with which NCCL connects the ranks.
    first_timeout: Option<Duration>,
}

impl Communicator {
    pub fn new(raw: Raw, direction: Direction, options: &NcclOptions) -> Self {
        let now = Instant::now();
        Self {
            raw,
            direction,
            state: State::Joining,
            until: now + options.join_timeout,
            next: 0,
            held: BTreeMap::new(),
            flying: VecDeque::new(),
            last_used: now,
            piece_timeout: options.piece_timeout,
            first_timeout: Some(options.join_timeout),
        }
    }

    /// Whether nothing is under way or waits.
    pub fn is_idle(&self) -> bool {
        matches!(self.state, State::Ready) && self.flying.is_empty() && self.held.is_empty()
    }

    /// Whether both ranks have joined.
    pub fn has_joined(&self) -> bool {
        !matches!(self.state, State::Joining)
    }

    /// Whether a transfer may be started.
    pub fn is_ready(&self) -> bool {
        matches!(self.state, State::Ready)
    }

    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// Keeps a send until its turn: the receiver has posted it as `number`.
    pub fn hold(&mut self, number: u32, transfer: Transfer) -> Result<(), (Transfer, NcclError)> {
        let distance = number.wrapping_sub(self.next) % NUMBERS;
        // The receiver posts two at most.
        if distance > 2 * WINDOW as u32 || self.held.contains_key(&number) {
            return Err((transfer, NcclError::Mismatch("the number of a receive")));
        }
        self.held.insert(number, (Instant::now() + self.piece_timeout, transfer));
        Ok(())
    }

    /// Starts a transfer as the next one. On an error, the caller ends the communicator.
    #[allow(unsafe_code)]
    pub fn start(&mut self, mut transfer: Transfer) -> Result<(), NcclError> {
        self.until = Instant::now() + self.first_timeout.take().unwrap_or(self.piece_timeout);
        let number = self.next;
        self.next = (number + 1) % NUMBERS;
        // SAFETY: the transfer holds a share of the blocks' lease, and it is dropped only as `queue` requires. Who owns a
        // lease of blocks that a handoff fills or reads does not access them in a conflicting way.
        let queued = unsafe { self.raw.queue(&transfer.runs) };
        if queued.is_ok() {
            // Not later: NCCL connects the ranks with their first group, whose call is in progress until the other side calls
            // its own. That one waits to be told.
            transfer.report.posted(number);
        }
        self.state = State::Queueing(transfer);
        match queued? {
            Call::Done => self.queued(),
            Call::InProgress => Ok(()),
        }
    }

    /// The group is on the stream.
    fn queued(&mut self) -> Result<(), NcclError> {
        // Recorded first: without the event, nobody knows when the kernels end.
        let event = self.raw.record()?;
        if let State::Queueing(transfer) = std::mem::replace(&mut self.state, State::Ready) {
            self.flying.push_back(Flying { event, until: self.until, transfer });
        }
        Ok(())
    }

    /// Takes note of what has ended, which it adds to `ended`, and starts the next send. After an error, the caller ends the
    /// communicator.
    pub fn poll(&mut self, now: Instant, ended: &mut usize) -> Result<(), NcclError> {
        if !self.is_idle() {
            self.last_used = now;
            let progress = self.raw.progress()?;
            match (&self.state, progress) {
                (State::Joining, Call::Done) => self.state = State::Ready,
                (State::Queueing(_), Call::Done) => self.queued()?,
                (State::Joining, _) if now >= self.until => return Err(NcclError::Timeout("joining a communicator")),
                (State::Queueing(_), _) if now >= self.until => return Err(NcclError::Timeout("posting a piece")),
                _ => {}
            }
        }
        while let Some(first) = self.flying.front() {
            if first.event.try_is_complete()? {
                if let Some(Flying { transfer, .. }) = self.flying.pop_front() {
                    transfer.end(Ok(()));
                    *ended += 1;
                }
            } else if now >= first.until {
                return Err(NcclError::Timeout("a piece"));
            } else {
                break;
            }
        }
        if self.held.values().any(|(until, _)| now >= *until) {
            return Err(NcclError::Timeout("a piece that comes before another"));
        }
        if self.is_ready()
            && let Some((_, transfer)) = self.held.remove(&self.next)
        {
            self.start(transfer)?;
        }
        Ok(())
    }

    /// Number of transfers that are posted or being posted.
    pub fn under_way(&self) -> usize {
        self.flying.len() + usize::from(matches!(self.state, State::Queueing(_)))
    }

    /// Takes the communicator apart, to end it. What its transfers access is free when [`Raw::abort`] has returned.
    pub fn into_parts(self) -> (Raw, Vec<Transfer>) {
        let queueing = match self.state {
            State::Queueing(transfer) => Some(transfer),
            State::Joining | State::Ready => None,
        };
        let flying = self.flying.into_iter().map(|flying| flying.transfer);
        let held = self.held.into_values().map(|(_, transfer)| transfer);
        (self.raw, flying.chain(queueing).chain(held).collect())
    }
}
