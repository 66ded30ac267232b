//! The thread of a GPU: makes communicators, posts transfers, and ends what fails.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cudarc::driver::CudaContext;
use tokio::sync::oneshot;

use super::api::{self, Direction, Raw};
use super::communicator::{Communicator, Transfer};
use super::endpoints::Endpoints;
use super::turns::Turns;
use super::{CommunicatorId, NcclError, NcclOptions, SenderId};

/// Pause between looks at what is under way.
const POLL: Duration = Duration::from_micros(20);
/// Pause between looks at communicators that are not used.
const IDLE_POLL: Duration = Duration::from_secs(1);
/// Communicators at once. Each takes memory of the GPU. The one that was not used for longest makes room.
const MAX_COMMUNICATORS: usize = 64;

pub(super) enum Command {
    /// A handoff to a receiver begins.
    Introduce { endpoint: String, proposed: SenderId, reply: oneshot::Sender<Result<SenderId, NcclError>> },
    /// A handoff from a sender begins.
    Invite { sender: SenderId, reply: oneshot::Sender<Result<CommunicatorId, NcclError>> },
    /// The receiver at `endpoint` has named a communicator.
    Join { endpoint: String, id: CommunicatorId, reply: oneshot::Sender<Result<(), NcclError>> },
    /// Posts a receive when it is its turn.
    Receive { id: CommunicatorId, transfer: Transfer },
    /// Posts the send that belongs to the receiver's receive with this number.
    Send { id: CommunicatorId, number: u32, transfer: Transfer },
    /// Ends a communicator.
    GiveUp { id: CommunicatorId },
}

pub(super) struct Worker {
    context: Arc<CudaContext>,
    options: NcclOptions,
    queue: Receiver<Command>,
    communicators: HashMap<CommunicatorId, Communicator>,
    /// Receives that are not posted yet.
    turns: Turns<CommunicatorId, Transfer>,
    endpoints: Endpoints,
    senders: HashMap<SenderId, CommunicatorId>,
    aborts: Vec<Abort>,
    /// Communicators made so far.
    made: Arc<AtomicU64>,
}

/// An abort that has not returned.
struct Abort {
    thread: JoinHandle<Result<(), NcclError>>,
    until: Instant,
}

impl Worker {
    pub fn new(
        context: Arc<CudaContext>,
        options: NcclOptions,
        queue: Receiver<Command>,
        made: Arc<AtomicU64>,
    ) -> Self {
        let (communicators, turns) = (HashMap::new(), Turns::new());
        Self {
            context,
            options,
            queue,
            communicators,
            turns,
            endpoints: Endpoints::default(),
            senders: HashMap::new(),
            aborts: Vec::new(),
            made,
        }
    }

    /// Runs until the agent is dropped.
    pub fn run(mut self) {
        loop {
            let command = match self.is_busy() {
                true => self.queue.recv_timeout(POLL),
                false if !self.communicators.is_empty() => self.queue.recv_timeout(IDLE_POLL),
                false => self.queue.recv().map_err(RecvTimeoutError::from),
            };
            match command {
                Ok(command) => self.on_command(command),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.poll();
        }
        let ids: Vec<_> = self.communicators.keys().copied().collect();
        ids.iter().for_each(|id| self.end(id, &NcclError::Ended));
        while !self.aborts.is_empty() {
            std::thread::sleep(POLL);
            self.poll_aborts();
        }
    }

    fn is_busy(&self) -> bool {
        !self.turns.is_empty()
            || !self.aborts.is_empty()
            || self.communicators.values().any(|communicator| !communicator.is_idle())
    }

    fn on_command(&mut self, command: Command) {
        match command {
            // A caller that has gone does not wait for the answer.
            Command::Introduce { endpoint, proposed, reply } => {
                let _ = reply.send(self.endpoints.introduce(endpoint, proposed, Instant::now()));
            }
            Command::Invite { sender, reply } => {
                let _ = reply.send(self.invite(sender));
            }
            Command::Join { endpoint, id, reply } => {
                let _ = reply.send(self.join(endpoint, id));
            }
            Command::Receive { id, transfer } => match self.use_communicator(&id, Direction::Receive) {
                Some(_) => self.turns.push(id, transfer),
                None => transfer.end(Err(NcclError::Ended)),
            },
            Command::Send { id, number, transfer } => match self.use_communicator(&id, Direction::Send) {
                Some(communicator) => {
                    if let Err((transfer, error)) = communicator.hold(number, transfer) {
                        transfer.end(Err(error.clone()));
                        self.end(&id, &error);
                    }
                }
                None => transfer.end(Err(NcclError::Ended)),
            },
            Command::GiveUp { id } => self.end(&id, &NcclError::Timeout("a piece")),
        }
    }

    fn invite(&mut self, sender: SenderId) -> Result<CommunicatorId, NcclError> {
        if let Some(id) = self.senders.get(&sender).copied() {
            self.use_communicator(&id, Direction::Receive);
            return Ok(id);
        }
        let id = api::new_id()?;
        self.create(id, Direction::Receive)?;
        self.senders.insert(sender, id);
        Ok(id)
    }

    fn join(&mut self, endpoint: String, id: CommunicatorId) -> Result<(), NcclError> {
        if self.use_communicator(&id, Direction::Send).is_some() {
            return Ok(());
        }
        // The receiver has made another one, so the one before has ended there.
        if let Some(before) = self.endpoints.name(&endpoint, id)? {
            self.end(&before, &NcclError::Ended);
        }
        let created = self.create(id, Direction::Send);
        if created.is_err() {
            self.endpoints.ended(&id, false, Instant::now());
        }
        created
    }

    fn create(&mut self, id: CommunicatorId, direction: Direction) -> Result<(), NcclError> {
        if self.communicators.len() >= MAX_COMMUNICATORS {
            let oldest = self.idle().min_by_key(|(_, last_used)| *last_used).map(|(id, _)| id);
            self.end(&oldest.ok_or(NcclError::Busy("communicators"))?, &NcclError::Ended);
        }
        tracing::info!(?id, ?direction, "joining a communicator");
        let raw = Raw::join(&self.context, &id, direction)?;
        self.communicators.insert(id, Communicator::new(raw, direction, &self.options));
        self.made.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// A communicator of this direction, which is in use from now on.
    fn use_communicator(&mut self, id: &CommunicatorId, direction: Direction) -> Option<&mut Communicator> {
        let communicator = self.communicators.get_mut(id).filter(|c| c.direction() == direction)?;
        communicator.last_used = Instant::now();
        Some(communicator)
    }

    /// Communicators that nothing waits for, and when they were used.
    fn idle(&self) -> impl Iterator<Item = (CommunicatorId, Instant)> {
        let idle = self.communicators.iter().filter(|(id, c)| c.is_idle() && !self.turns.contains(id));
        idle.map(|(id, communicator)| (*id, communicator.last_used))
    }

    /// Takes note of what has ended, and posts what may be posted.
    fn poll(&mut self) {
        let now = Instant::now();
        self.poll_aborts();
        for receive in self.turns.remove_unwanted(|receive| receive.report.is_wanted()) {
            receive.end(Err(NcclError::Ended));
        }
        let mut failed = Vec::new();
        for (id, communicator) in &mut self.communicators {
            let mut ended = 0;
            let joining = !communicator.has_joined();
            if let Err(error) = communicator.poll(now, &mut ended) {
                failed.push((*id, error));
            } else if joining && communicator.has_joined() {
                self.endpoints.joined(id);
            }
            if communicator.direction() == Direction::Receive {
                (0..ended).for_each(|_| self.turns.ended());
            }
        }
        // One whose other side has gone is noticed only when it is used.
        let unused = self.idle().filter(|(_, last_used)| now.duration_since(*last_used) >= self.options.idle_timeout);
        failed.extend(unused.map(|(id, _)| (id, NcclError::Ended)));
        failed.iter().for_each(|(id, error)| self.end(id, error));
        loop {
            let able = |id: &CommunicatorId| self.communicators.get(id).is_some_and(Communicator::is_ready);
            let Some((id, receive)) = self.turns.next(able) else { return };
            if let Some(communicator) = self.communicators.get_mut(&id)
                && let Err(error) = communicator.start(receive)
            {
                self.end(&id, &error);
            }
        }
    }

    /// Ends a communicator and its transfers.
    fn end(&mut self, id: &CommunicatorId, error: &NcclError) {
        let Some(communicator) = self.communicators.remove(id) else { return };
        self.senders.retain(|_, other| other != id);
        self.endpoints.ended(id, communicator.has_joined(), Instant::now());
        if communicator.direction() == Direction::Receive {
            (0..communicator.under_way()).for_each(|_| self.turns.ended());
        }
        let waiting = self.turns.remove(id);
        tracing::info!(?id, %error, "ending a communicator");
        let (raw, transfers) = communicator.into_parts();
        self.aborts.push(abort(raw, transfers, error.clone(), self.options.abort_timeout));
        waiting.into_iter().for_each(|transfer| transfer.end(Err(error.clone())));
    }

    /// Ends the process if an abort has failed or takes too long: the KV memory can't be used again, since the device may still
    /// write to it.
    fn poll_aborts(&mut self) {
        let now = Instant::now();
        for abort in std::mem::take(&mut self.aborts) {
            if !abort.thread.is_finished() {
                if now >= abort.until {
                    give_up("it has not returned in time");
                }
                self.aborts.push(abort);
                continue;
            }
            match abort.thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => give_up(&error.to_string()),
                Err(_) => give_up("its thread has panicked"),
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The leases of transfers that are under way would be dropped.
            give_up("the thread of NCCL has panicked");
        }
    }
}

/// Ends the process.
fn give_up(problem: &str) -> ! {
    tracing::error!(problem, "a communicator of NCCL can't be aborted; this process ends, since its KV memory is lost");
    // Not `exit`: CUDA's exit handlers would wait for the kernel that does not end.
    std::process::abort();
}

/// Ends a communicator on a thread of its own, because that can take long and others must go on. Then nothing that was queued
/// on it accesses memory any more, and its transfers end.
fn abort(raw: Raw, transfers: Vec<Transfer>, error: NcclError, within: Duration) -> Abort {
    let run = move || {
        let aborted = raw.abort();
        match &aborted {
            Ok(()) => transfers.into_iter().for_each(|transfer| transfer.end(Err(error.clone()))),
            // Their blocks are never free again. The process ends.
            Err(_) => std::mem::forget(transfers),
        }
        aborted
    };
    match std::thread::Builder::new().name("nccl-abort".into()).spawn(run) {
        Ok(thread) => Abort { thread, until: Instant::now() + within },
        Err(error) => give_up(&error.to_string()),
    }
}
