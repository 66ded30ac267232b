//! Stands for NCCL in a program that was built without it. None of its types has a value.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use overfill_kv::{BlockId, BlockLease, KvStore, Ticket};

use super::{Announced, CommunicatorId, NcclError, NcclOptions, Progress, SenderId};

/// The thread of a GPU.
pub struct Agent(Infallible);

impl Agent {
    /// Always fails.
    pub fn open(_: NcclOptions, _: Arc<dyn KvStore>) -> Result<Self, NcclError> {
        Err(NcclError::NotBuilt)
    }

    pub(crate) fn communicators(&self) -> u64 {
        match self.0 {}
    }

    pub(crate) fn piece_bytes(&self) -> usize {
        match self.0 {}
    }

    /// Device and version.
    pub fn describe(&self) -> String {
        match self.0 {}
    }

    pub(crate) async fn introduce(&self, _: &str, _: &Ticket) -> Result<SenderId, NcclError> {
        match self.0 {}
    }

    pub(crate) async fn invite(&self, _: SenderId) -> Result<CommunicatorId, NcclError> {
        match self.0 {}
    }

    pub(crate) async fn sending(
        self: &Arc<Self>,
        _: &str,
        _: CommunicatorId,
        _: Arc<BlockLease>,
    ) -> Result<Arc<Sending>, NcclError> {
        match self.0 {}
    }

    pub(crate) fn receiving(self: &Arc<Self>, _: CommunicatorId, _: Arc<BlockLease>) -> Receiving {
        match self.0 {}
    }
}

pub(crate) async fn plain_sends(
    from: &Arc<Agent>,
    _: &Arc<Agent>,
    _: &dyn KvStore,
    _: Arc<BlockLease>,
) -> Result<Duration, NcclError> {
    match from.0 {}
}

pub(crate) struct Sending(Infallible);

impl Sending {
    pub async fn room(&self) -> Result<(), NcclError> {
        match self.0 {}
    }

    pub fn announce(&self, _: usize, _: &[BlockId]) {
        match self.0 {}
    }

    pub fn posted(&self, _: u32) -> Result<(), NcclError> {
        match self.0 {}
    }

    pub fn waits_for_receiver(&self) -> bool {
        match self.0 {}
    }

    pub async fn broken(&self) -> NcclError {
        match self.0 {}
    }

    pub async fn idle(&self) {
        match self.0 {}
    }
}

pub(crate) struct Receiving(Infallible);

impl Receiving {
    pub fn has_room(&self) -> bool {
        match self.0 {}
    }

    pub fn is_empty(&self) -> bool {
        match self.0 {}
    }

    pub fn receive(&mut self, _: Announced, _: usize, _: &[BlockId]) -> Result<(), NcclError> {
        match self.0 {}
    }

    pub async fn progress(&mut self) -> Result<Progress, NcclError> {
        match self.0 {}
    }

    pub fn withdraw(&self) {
        match self.0 {}
    }

    pub async fn end(self) {
        match self.0 {}
    }
}
