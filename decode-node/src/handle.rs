//! The engine as its requests see it: a queue of commands.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
    mpsc as std_mpsc,
};

use overfill_kv::block_hashes;
use overfill_node::{LoadState, Refused};
use tokio::sync::{Notify, mpsc};

use crate::{
    extension::Chosen,
    sequence::{CLIENT_EVENTS, Job, Request, SequenceEvent},
};

/// A message to the engine.
pub(crate) enum Command {
    Submit(Box<Job>),
    Ready { arrival: u64, first_token: u32 },
    Verdict { arrival: u64, chosen: Chosen },
    Lost { arrival: u64 },
    Landed { arrival: u64, number: u64, ok: bool },
}

/// Handle for submitting requests to the engine. The engine ends when all handles are dropped and its work is done.
#[derive(Clone)]
pub struct EngineHandle {
    commands: std_mpsc::SyncSender<Command>,
    commanded: Arc<Notify>,
    load: Arc<LoadState>,
    arrivals: Arc<AtomicU64>,
    max_waiting: usize,
}

impl EngineHandle {
    pub(crate) fn new(
        commands: std_mpsc::SyncSender<Command>,
        commanded: Arc<Notify>,
        load: Arc<LoadState>,
        max_waiting: usize,
    ) -> Self {
        Self { commands, commanded, load, arrivals: Arc::default(), max_waiting }
    }

    /// Queues a request. Returns its arrival number and the receiver of its events. Dropping the receiver cancels the
    /// request.
    ///
    /// # Errors
    /// The queue is full, or the node is draining.
    pub fn submit(&self, request: Request) -> Result<(u64, mpsc::Receiver<SequenceEvent>), Refused> {
        if self.load.is_draining() {
            return Err(Refused::Draining);
        }
        let waiting = self.load.try_wait(self.max_waiting).ok_or(Refused::QueueFull(self.max_waiting))?;
        let (events, receiver) = mpsc::channel(CLIENT_EVENTS);
        let hashes = request.producer.as_ref().map(|producer| block_hashes(&request.tokens, producer));
        let arrival = self.arrivals.fetch_add(1, Ordering::Relaxed);
        let job = Job { arrival, request, hashes: hashes.unwrap_or_default(), events, waiting };
        self.send(Command::Submit(Box::new(job)))?;
        self.load.publish();
        Ok((arrival, receiver))
    }

    /// Tells the engine that the KV of the request `arrival` is complete and verified (KV-5). `first_token` is the
    /// token that the prefill node sampled.
    ///
    /// # Errors
    /// The queue is full, or the engine has ended.
    pub fn ready(&self, arrival: u64, first_token: u32) -> Result<(), Refused> {
        self.send(Command::Ready { arrival, first_token })
    }

    /// Tells the engine which tokens follow the standing ones of the request `arrival`.
    ///
    /// # Errors
    /// As [`Self::ready`].
    pub fn verdict(&self, arrival: u64, chosen: Chosen) -> Result<(), Refused> {
        self.send(Command::Verdict { arrival, chosen })
    }

    /// Tells the engine that the last extension of the request `arrival` was lost.
    ///
    /// # Errors
    /// As [`Self::ready`].
    pub fn lost(&self, arrival: u64) -> Result<(), Refused> {
        self.send(Command::Lost { arrival })
    }

    /// Tells the engine whether KV of the full model has arrived in the landing `number` of the request `arrival`, complete
    /// and verified (KV-5).
    ///
    /// # Errors
    /// As [`Self::ready`].
    pub fn landed(&self, arrival: u64, number: u64, ok: bool) -> Result<(), Refused> {
        self.send(Command::Landed { arrival, number, ok })
    }

    fn send(&self, command: Command) -> Result<(), Refused> {
        self.commands.try_send(command).map_err(|e| match e {
            std_mpsc::TrySendError::Full(_) => Refused::QueueFull(self.max_waiting),
            std_mpsc::TrySendError::Disconnected(_) => Refused::Draining,
        })?;
        self.commanded.notify_one();
        Ok(())
    }
}
