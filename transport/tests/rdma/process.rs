//! A sender in a process of its own: this test program, started again.

use std::process::{Child, Command, Stdio};

use overfill_kv::KvEndpoint;
use overfill_transport::{KvSender, TransferConfig};

use crate::rig::Rig;

const ENDPOINT: &str = "OVERFILL_TEST_RDMA_ENDPOINT";
const TICKET: &str = "OVERFILL_TEST_RDMA_TICKET";

/// The process. Killed when dropped.
pub struct Sender(Child);

impl Sender {
    /// Starts a sender that fills one layer of the reservation with this ticket, and then waits.
    pub fn start(rig: &Rig, ticket: [u8; 16]) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "process::sends_one_layer", "--nocapture"]);
        command.env(ENDPOINT, &rig.endpoint).env(TICKET, ticket[0].to_string()).stdin(Stdio::null());
        Self(command.spawn().unwrap())
    }

    pub fn signal(&mut self, name: &str) {
        let status = Command::new("kill").args(["-s", name, &self.0.id().to_string()]).status().unwrap();
        assert!(status.success());
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Not a test of its own: what the process does. Without the variables, it does nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sends_one_layer() {
    let (Ok(endpoint), Ok(ticket)) = (std::env::var(ENDPOINT), std::env::var(TICKET)) else { return };
    let Some(mut rig) = super::rdma_rig(TransferConfig::default()).await else { return };
    rig.endpoint = endpoint.clone();
    let mut plan = rig.plan([ticket.parse().unwrap(); 16], 0);
    plan.endpoint = KvEndpoint::new(endpoint);
    let (sender, sending) = KvSender::start(plan, rig.source.clone(), rig.config.clone());
    sender.layers().ready(0, 0..5);
    let _ = sending.await;
    drop(sender);
}
