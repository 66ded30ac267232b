//! Where the pieces of an attempt come from, on the receiver.

use std::time::Duration;

use overfill_kv::handoff::WriteMode;

use super::frame::{self, Answer};
use super::link::Link;
use super::payload::write_full;
use crate::nccl::{Progress, Receiving};
use crate::rdma;

/// How long to wait for sends whose receives are posted when an attempt ends. The sender only has to answer.
const GRACE: Duration = Duration::from_millis(500);

/// What can write to the blocks of an attempt.
#[derive(Default)]
pub(super) enum Target {
    /// The task that reads the frames, and nothing else.
    #[default]
    Framed,
    /// The sender's device.
    Rdma(rdma::Target),
    /// This side's GPU.
    Nccl(Receiving),
}

impl Target {
    /// How the state machine sees it.
    pub fn mode(&self) -> WriteMode {
        match self {
            Self::Framed => WriteMode::Framed,
            Self::Rdma(_) | Self::Nccl(_) => WriteMode::OneSided,
        }
    }

    /// Ends all access: when this returns, nothing but the frames' task can write to the blocks (KV-1).
    pub async fn revoke(self, stream: &Link) {
        match self {
            Self::Framed => {}
            Self::Rdma(target) => target.revoke().await,
            Self::Nccl(mut receiving) => {
                receiving.withdraw();
                let finish = async {
                    while !receiving.is_empty() {
                        if let Ok(Progress::Posted(number)) = receiving.progress().await {
                            // If the sender has gone, the time limit below ends the communicator.
                            let _ = write_full(stream, &frame::encode_answer(Answer::Posted(number))).await;
                        }
                    }
                };
                // What is late is ended by force.
                let _ = tokio::time::timeout(GRACE, finish).await;
                receiving.end().await;
            }
        }
    }
}
