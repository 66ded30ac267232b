//! Stands for RDMA in a program that was built without it. None of its types has a value.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use overfill_kv::{BlockId, KvStore, Ticket};
use tokio::sync::Semaphore;

use super::{DeviceChoice, Grant, RdmaAddress, RdmaError, Source};
use crate::tcp::format::Sums;

/// A device and the memory of a store.
pub struct Pool(Infallible);

impl Pool {
    /// Always fails.
    pub fn open(_: Option<&DeviceChoice>, _: Arc<dyn KvStore>) -> Result<Self, RdmaError> {
        Err(RdmaError::NotBuilt)
    }

    /// Device, port and address.
    pub fn describe(&self) -> String {
        match self.0 {}
    }

    pub(crate) fn is_direct(&self) -> bool {
        match self.0 {}
    }

    pub(crate) async fn queue(self: &Arc<Self>, _: &Ticket) -> Result<Queue, RdmaError> {
        match self.0 {}
    }
}

pub(crate) async fn plain_writes(from: &Arc<Pool>, _: &Arc<Pool>, _: usize) -> Result<Duration, RdmaError> {
    match from.0 {}
}

pub(crate) struct Queue(Infallible);

impl Queue {
    pub fn address(&self) -> RdmaAddress {
        match self.0 {}
    }

    pub async fn end(self) {
        match self.0 {}
    }
}

pub(crate) struct Target(Infallible);

impl Target {
    pub async fn new(queue: Queue, _: &RdmaAddress, _: &[BlockId], _: usize) -> Result<Self, RdmaError> {
        match queue.0 {}
    }

    pub fn grant(&self) -> Grant {
        match self.0 {}
    }

    pub fn is_staged(&self) -> bool {
        match self.0 {}
    }

    pub async fn arrived(&mut self, _: u32) -> Result<(), RdmaError> {
        match self.0 {}
    }

    pub fn sum(&self, _: usize, _: &[BlockId], _: Sums, _: u64) -> Result<u64, RdmaError> {
        match self.0 {}
    }

    pub fn take(&mut self, _: usize, _: &[BlockId]) -> Result<(), RdmaError> {
        match self.0 {}
    }

    pub async fn revoke(self) {
        match self.0 {}
    }
}

pub(crate) struct Writer(Infallible);

impl Writer {
    pub async fn new(queue: Queue, _: Grant, _: (usize, usize), _: usize) -> Result<Self, RdmaError> {
        match queue.0 {}
    }

    pub fn credits(&self) -> Option<Arc<Semaphore>> {
        match self.0 {}
    }

    pub fn next_number(&self) -> u32 {
        match self.0 {}
    }

    pub async fn write(&mut self, _: &Source<'_>, _: Sums, _: u64) -> Result<u64, RdmaError> {
        match self.0 {}
    }

    pub async fn close(self) {
        match self.0 {}
    }
}
