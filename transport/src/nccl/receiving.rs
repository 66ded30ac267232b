//! The receiver's side of one handoff.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

use overfill_kv::{BlockId, BlockLease};
use tokio::sync::oneshot;

use super::communicator::Report;
use super::{Agent, Announced, CommunicatorId, NcclError, Progress};

/// Pieces that a sender may announce before the first of them has arrived.
pub(super) const WINDOW: usize = 2;

/// Receives the pieces that the sender announces.
pub(crate) struct Receiving {
    agent: Arc<Agent>,
    id: CommunicatorId,
    lease: Arc<BlockLease>,
    ahead: VecDeque<Ahead>,
    /// Whether receives that are not posted yet should not be any more.
    withdrawn: Arc<AtomicBool>,
}

/// A piece that has not arrived.
struct Ahead {
    announced: Announced,
    /// `None` when the sender was told.
    posted: Option<oneshot::Receiver<u32>>,
    ended: oneshot::Receiver<Result<(), NcclError>>,
}

impl Receiving {
    pub(super) fn new(agent: Arc<Agent>, id: CommunicatorId, lease: Arc<BlockLease>) -> Self {
        Self { agent, id, lease, ahead: VecDeque::new(), withdrawn: Arc::default() }
    }

    /// Whether the sender may announce another piece.
    pub fn has_room(&self) -> bool {
        self.ahead.len() < WINDOW
    }

    /// Whether every announced piece has arrived.
    pub fn is_empty(&self) -> bool {
        self.ahead.is_empty()
    }

    /// Receives an announced piece into the blocks `ids` of `layer`, which belong to the attempt.
    pub fn receive(&mut self, announced: Announced, layer: usize, ids: &[BlockId]) -> Result<(), NcclError> {
        if !self.has_room() {
            return Err(NcclError::Mismatch("the number of announced pieces"));
        }
        let (tell_posted, posted) = oneshot::channel();
        let (tell_ended, ended) = oneshot::channel();
        let withdrawn = self.withdrawn.clone();
        let report = ReceiveReport { posted: Some(tell_posted), ended: tell_ended, withdrawn };
        let transfer = self.agent.transfer(layer, ids, self.lease.clone(), Box::new(report))?;
        self.agent.receive(self.id, transfer)?;
        self.ahead.push_back(Ahead { announced, posted: Some(posted), ended });
        Ok(())
    }

    /// Waits for what happens next. Never resolves if no piece is announced. Cancel safe.
    pub async fn progress(&mut self) -> Result<Progress, NcclError> {
        poll_fn(|cx| {
            for piece in &mut self.ahead {
                if let Some(posted) = &mut piece.posted
                    && let Poll::Ready(result) = Pin::new(posted).poll(cx)
                {
                    piece.posted = None;
                    // If it was not posted, `ended` says why.
                    if let Ok(number) = result {
                        return Poll::Ready(Ok(Progress::Posted(number)));
                    }
                }
            }
            let Some(first) = self.ahead.front_mut() else { return Poll::Pending };
            match Pin::new(&mut first.ended).poll(cx) {
                Poll::Ready(result) => {
                    let announced = first.announced;
                    self.ahead.pop_front();
                    Poll::Ready(result.unwrap_or(Err(NcclError::Ended)).map(|()| Progress::Arrived(announced)))
                }
                Poll::Pending => Poll::Pending,
            }
        })
        .await
    }

    /// From now on, nothing more is posted. What is posted already still needs the sender: the caller goes on with
    /// [`Self::progress`] while the sender takes part.
    pub fn withdraw(&self) {
        self.withdrawn.store(true, Ordering::Release);
    }

    /// Ends the attempt: when this returns, nothing is received into its blocks any more. The caller has given the sender
    /// time for what is posted; if pieces are left, the communicator is ended.
    pub async fn end(self) {
        if !self.ahead.is_empty()
            && let Err(error) = self.agent.give_up(self.id)
        {
            tracing::error!(%error, "a communicator whose sender is gone can't be ended; its own deadline will end it");
        }
        for piece in self.ahead {
            // Also resolves if the thread has ended; it ends all communicators first.
            let _ = piece.ended.await;
        }
    }
}

/// Tells a [`Receiving`] what becomes of one piece.
struct ReceiveReport {
    posted: Option<oneshot::Sender<u32>>,
    ended: oneshot::Sender<Result<(), NcclError>>,
    withdrawn: Arc<AtomicBool>,
}

impl Report for ReceiveReport {
    fn is_wanted(&self) -> bool {
        !self.withdrawn.load(Ordering::Acquire)
    }

    fn posted(&mut self, number: u32) {
        if let Some(posted) = self.posted.take() {
            // The attempt may have ended.
            let _ = posted.send(number);
        }
    }

    fn ended(self: Box<Self>, result: Result<(), NcclError>) {
        let _ = self.ended.send(result);
    }
}
