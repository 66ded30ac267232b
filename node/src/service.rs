//! The gRPC service `overfill.v1.Node`: describes the node, streams its load, and drains it.

use std::time::Duration;

use futures::StreamExt as _;
use overfill_proto::{InvalidField, v1};
use tokio::time::sleep;
use tonic::{Request, Response, Status, Streaming};
use tracing::info;

use crate::{EventStream, Load, MAX_DEADLINE_SECONDS, NodeCore};

/// Minimum interval between two load reports of a stream.
const LOAD_INTERVAL: Duration = Duration::from_millis(50);

/// Implementation of the gRPC service `overfill.v1.Node`.
pub struct NodeService(pub NodeCore);

impl From<Load> for v1::NodeLoad {
    fn from(load: Load) -> Self {
        let Load {
            free_blocks,
            running,
            waiting,
            queued_tokens,
            open_handoffs,
            stranded_bytes,
            draining,
            stalled,
            prefill_tokens_per_second,
            decode_step_microseconds,
        } = load;
        Self {
            free_blocks: free_blocks as u32,
            running_requests: running as u32,
            waiting_requests: waiting as u32,
            queued_tokens,
            stranded_bytes,
            draining,
            open_handoffs: open_handoffs as u32,
            stalled,
            prefill_tokens_per_second,
            decode_step_microseconds,
        }
    }
}

impl NodeService {
    /// Stream of loads: the current one, then every change. It ends when the node has drained.
    fn reports(&self) -> EventStream<v1::NodeLoad> {
        let (state, shutdown) = (self.0.load.clone(), self.0.shutdown.clone());
        let mut watch = state.watch();
        Box::pin(async_stream::stream! {
            loop {
                let load = *watch.borrow_and_update();
                yield Ok(load.into());
                if load.draining && load.is_idle() {
                    return;
                }
                sleep(LOAD_INTERVAL).await;
                tokio::select! {
                    () = state.changed(&mut watch) => {}
                    () = shutdown.cancelled(), if !load.draining => {}
                }
            }
        })
    }
}

#[tonic::async_trait]
impl v1::node_server::Node for NodeService {
    type WatchLoadStream = EventStream<v1::NodeLoad>;
    type DrainStream = EventStream<v1::NodeLoad>;

    async fn describe(&self, _: Request<v1::DescribeRequest>) -> Result<Response<v1::DescribeResponse>, Status> {
        let load = Some(self.0.load.load().into());
        Ok(Response::new(v1::DescribeResponse { info: Some(self.0.identity.info()), load }))
    }

    async fn watch_load(
        &self,
        request: Request<Streaming<v1::WatchLoadRequest>>,
    ) -> Result<Response<Self::WatchLoadStream>, Status> {
        let (joined, mut router, mut reports) = (self.0.load.count_router(), request.into_inner(), self.reports());
        let state = self.0.load.clone();
        Ok(Response::new(Box::pin(async_stream::stream! {
            let mut listening = true;
            loop {
                tokio::select! {
                    report = reports.next() => match report {
                        Some(report) => yield report,
                        None => break,
                    },
                    message = router.message(), if listening => match message {
                        Ok(Some(message)) if message.paired => state.router_sends(),
                        Ok(Some(_)) => {}
                        // The router has left. Then this stream is dropped as well.
                        Ok(None) | Err(_) => listening = false,
                    },
                }
            }
            drop(joined);
        })))
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<Self::DrainStream>, Status> {
        let timeout = match request.into_inner().timeout_seconds {
            Some(seconds) if (0.0..=MAX_DEADLINE_SECONDS).contains(&seconds) => Some(Duration::from_secs_f64(seconds)),
            Some(other) => {
                let limit = format!("in [0, {MAX_DEADLINE_SECONDS}]");
                return Err(InvalidField::new("timeout_seconds", limit, other).into());
            }
            None => None,
        };
        info!(timeout_seconds = timeout.map(|timeout| timeout.as_secs_f64()), "drain requested");
        self.0.drain.begin(timeout);
        Ok(Response::new(self.reports()))
    }
}
