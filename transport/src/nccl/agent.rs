//! The handle to the thread of a GPU.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

use overfill_kv::{BlockId, BlockLease, GpuMemory, KvStore, Ticket};
use tokio::sync::oneshot;

use super::api;
use super::communicator::{Report, Transfer};
use super::worker::{Command, Worker};
use super::{CommunicatorId, NcclError, NcclOptions, Receiving, SenderId, Sending};

/// Oldest version that is supported: 2.19.
const OLDEST: i32 = 21900;
/// Commands that wait for the thread. Each attempt has a few at a time.
const COMMANDS: usize = 4096;

/// The thread that owns all communicators of a GPU. Dropping it ends them.
pub struct Agent {
    commands: Option<SyncSender<Command>>,
    thread: Option<JoinHandle<()>>,
    memory: GpuMemory,
    store: Arc<dyn KvStore>,
    version: i32,
    piece_bytes: usize,
    made: Arc<AtomicU64>,
}

impl Agent {
    /// Starts the thread, for the KV in `store`.
    ///
    /// # Errors
    /// The KV is not on a GPU, the library is missing or too old, or CUDA fails.
    pub fn open(options: NcclOptions, store: Arc<dyn KvStore>) -> Result<Self, NcclError> {
        let memory = store.gpu().ok_or(NcclError::NotOnGpu)?;
        if !api::is_installed() {
            return Err(NcclError::NoLibrary);
        }
        let version = api::version()?;
        if version < OLDEST {
            return Err(NcclError::Version(version));
        }
        let context = cudarc::driver::CudaContext::new(memory.device())?;
        let (commands, queue) = sync_channel(COMMANDS);
        let made = Arc::new(AtomicU64::new(0));
        let worker = Worker::new(context, options, queue, made.clone());
        let thread = std::thread::Builder::new()
            .name("nccl".into())
            .spawn(move || worker.run())
            .map_err(|error| NcclError::Call { call: "starting a thread", error: error.to_string() })?;
        Ok(Self {
            commands: Some(commands),
            thread: Some(thread),
            memory,
            store,
            version,
            piece_bytes: options.piece_bytes,
            made,
        })
    }

    /// Device and version.
    pub fn describe(&self) -> String {
        let (major, rest) = (self.version / 10_000, self.version % 10_000);
        format!("cuda:{}, NCCL {major}.{}.{}", self.memory.device(), rest / 100, rest % 100)
    }

    /// Communicators made so far.
    pub(crate) fn communicators(&self) -> u64 {
        self.made.load(Ordering::Relaxed)
    }

    /// Maximum size of a piece in bytes.
    pub(crate) fn piece_bytes(&self) -> usize {
        self.piece_bytes
    }

    /// This sender's name for NCCL at the receiver at `endpoint`. A new name is the ticket of the attempt, which is random and
    /// will not be used again.
    pub(crate) async fn introduce(&self, endpoint: &str, ticket: &Ticket) -> Result<SenderId, NcclError> {
        let (reply, answer) = oneshot::channel();
        self.command(Command::Introduce { endpoint: endpoint.into(), proposed: SenderId(ticket.0), reply })?;
        answer.await.map_err(|_| NcclError::Ended)?
    }

    /// The communicator with this sender, joined by this side as the receiver.
    pub(crate) async fn invite(&self, sender: SenderId) -> Result<CommunicatorId, NcclError> {
        let (reply, answer) = oneshot::channel();
        self.command(Command::Invite { sender, reply })?;
        answer.await.map_err(|_| NcclError::Ended)?
    }

    /// The sender's side of an attempt: joins the communicator that the receiver at `endpoint` has named.
    pub(crate) async fn sending(
        self: &Arc<Self>,
        endpoint: &str,
        id: CommunicatorId,
        lease: Arc<BlockLease>,
    ) -> Result<Arc<Sending>, NcclError> {
        let (reply, answer) = oneshot::channel();
        self.command(Command::Join { endpoint: endpoint.into(), id, reply })?;
        answer.await.map_err(|_| NcclError::Ended)??;
        Ok(Arc::new(Sending::new(self.clone(), id, lease)))
    }

    /// The receiver's side of an attempt.
    pub(crate) fn receiving(self: &Arc<Self>, id: CommunicatorId, lease: Arc<BlockLease>) -> Receiving {
        Receiving::new(self.clone(), id, lease)
    }

    /// A transfer of blocks of this side's store.
    pub(super) fn transfer(
        &self,
        layer: usize,
        ids: &[BlockId],
        lease: Arc<BlockLease>,
        report: Box<dyn Report>,
    ) -> Result<Transfer, NcclError> {
        let bytes = self.store.block_bytes();
        let run = |id: &BlockId| Some((self.memory.address(layer, id.0 as usize * bytes, bytes)?, bytes));
        let runs = ids.iter().map(run).collect::<Option<_>>().ok_or(NcclError::Mismatch("a block"))?;
        Ok(Transfer { runs, lease, report })
    }

    /// Posts a receive when it is its turn.
    pub(super) fn receive(&self, id: CommunicatorId, transfer: Transfer) -> Result<(), NcclError> {
        self.command(Command::Receive { id, transfer })
    }

    /// Posts the send that the receiver has posted as `number`.
    pub(super) fn send(&self, id: CommunicatorId, number: u32, transfer: Transfer) -> Result<(), NcclError> {
        self.command(Command::Send { id, number, transfer })
    }

    /// Ends a communicator whose other side does not take part.
    pub(super) fn give_up(&self, id: CommunicatorId) -> Result<(), NcclError> {
        self.command(Command::GiveUp { id })
    }

    fn command(&self, command: Command) -> Result<(), NcclError> {
        let commands = self.commands.as_ref().ok_or(NcclError::Ended)?;
        match commands.try_send(command) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(_)) => Err(NcclError::Busy("commands")),
            Err(TrySendError::Disconnected(_)) => Err(NcclError::Ended),
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // The thread ends its communicators and then itself.
        self.commands = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of NCCL has panicked");
        }
    }
}
