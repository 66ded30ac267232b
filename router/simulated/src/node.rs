//! The `Node` service, which nodes of both roles have.

use std::{pin::Pin, sync::Arc};

use futures::{Stream, StreamExt as _};
use overfill_proto::v1;
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response, Status, Streaming};

use super::State;

pub(super) type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

pub(super) struct Service(pub(super) Arc<State>);

#[tonic::async_trait]
impl v1::node_server::Node for Service {
    type WatchLoadStream = Events<v1::NodeLoad>;
    type DrainStream = Events<v1::NodeLoad>;

    async fn describe(&self, _: Request<v1::DescribeRequest>) -> Result<Response<v1::DescribeResponse>, Status> {
        let (info, load) = (Some(self.0.info.clone()), Some(*self.0.load.borrow()));
        Ok(Response::new(v1::DescribeResponse { info, load }))
    }

    async fn watch_load(
        &self,
        request: Request<Streaming<v1::WatchLoadRequest>>,
    ) -> Result<Response<Self::WatchLoadStream>, Status> {
        let (state, stop) = (self.0.clone(), self.0.stop.clone().cancelled_owned());
        let reports = WatchStream::new(self.0.load.subscribe()).map(Ok).map(Some);
        // The router's messages are no reports: they only change the state.
        let messages = request.into_inner().map(move |message| {
            if let Ok(message) = message {
                state.paired.send_replace(message.paired);
            }
            None
        });
        let all = futures::stream::select(reports, messages).filter_map(std::future::ready);
        Ok(Response::new(Box::pin(all.take_until(stop))))
    }

    async fn drain(&self, _: Request<v1::DrainRequest>) -> Result<Response<Self::DrainStream>, Status> {
        Err(Status::unimplemented("a simulated node does not drain"))
    }
}
