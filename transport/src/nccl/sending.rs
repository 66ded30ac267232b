//! The sender's side of one handoff.

use std::collections::VecDeque;
use std::sync::Arc;

use overfill_kv::{BlockId, BlockLease};
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::communicator::Report;
use super::receiving::WINDOW;
use super::{Agent, CommunicatorId, NcclError};

/// Announces pieces, and sends them when the receiver has posted their receives.
pub(crate) struct Sending {
    agent: Arc<Agent>,
    id: CommunicatorId,
    lease: Arc<BlockLease>,
    /// Free places among the announced pieces.
    window: Arc<Semaphore>,
    /// Announced pieces whose receives are not posted yet: layer and blocks.
    announced: Mutex<VecDeque<(usize, Vec<BlockId>)>>,
    /// Sends that have not ended.
    sends: TaskTracker,
    failure: Arc<Mutex<Option<NcclError>>>,
    failed: CancellationToken,
}

impl Sending {
    pub(super) fn new(agent: Arc<Agent>, id: CommunicatorId, lease: Arc<BlockLease>) -> Self {
        Self {
            agent,
            id,
            lease,
            window: Arc::new(Semaphore::new(WINDOW)),
            announced: Mutex::new(VecDeque::new()),
            sends: TaskTracker::new(),
            failure: Arc::default(),
            failed: CancellationToken::new(),
        }
    }

    /// Waits until another piece may be announced. The caller limits the time.
    pub async fn room(&self) -> Result<(), NcclError> {
        // Never closed.
        self.window.acquire().await.map_err(|_| NcclError::Ended)?.forget();
        Ok(())
    }

    /// From now on, the receiver may post the receive for these blocks. Each piece needs its own [`Self::room`].
    pub fn announce(&self, layer: usize, ids: &[BlockId]) {
        self.announced.lock().push_back((layer, ids.to_vec()));
    }

    /// The receiver has posted the oldest announced piece as `number`.
    pub fn posted(&self, number: u32) -> Result<(), NcclError> {
        let piece = self.announced.lock().pop_front();
        let (layer, ids) = piece.ok_or(NcclError::Mismatch("a posted receive"))?;
        let report = SendReport {
            window: self.window.clone(),
            failure: self.failure.clone(),
            failed: self.failed.clone(),
            _token: self.sends.token(),
        };
        let transfer = self.agent.transfer(layer, &ids, self.lease.clone(), Box::new(report))?;
        self.agent.send(self.id, number, transfer)
    }

    /// Whether a piece is announced whose receive may be posted already.
    pub fn waits_for_receiver(&self) -> bool {
        !self.announced.lock().is_empty()
    }

    /// Resolves when a send has failed.
    pub async fn broken(&self) -> NcclError {
        self.failed.cancelled().await;
        self.failure.lock().clone().unwrap_or(NcclError::Ended)
    }

    /// Resolves when no send is left. Every send ends, by its deadline at the latest.
    pub async fn idle(&self) {
        self.sends.close();
        self.sends.wait().await;
    }
}

/// Tells a [`Sending`] what becomes of one piece.
struct SendReport {
    window: Arc<Semaphore>,
    failure: Arc<Mutex<Option<NcclError>>>,
    failed: CancellationToken,
    _token: TaskTrackerToken,
}

impl Report for SendReport {
    fn is_wanted(&self) -> bool {
        // The receiver waits for it.
        true
    }

    fn posted(&mut self, _: u32) {}

    fn ended(self: Box<Self>, result: Result<(), NcclError>) {
        match result {
            Ok(()) => self.window.add_permits(1),
            Err(error) => {
                self.failure.lock().get_or_insert(error);
                self.failed.cancel();
            }
        }
    }
}
